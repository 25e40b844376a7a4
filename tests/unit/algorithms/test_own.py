"""Losses and advantages of one's own: what they may return, and the errors if they return something else."""

from pathlib import Path

import numpy as np
import pytest
import torch

from orchestrator.algorithms.losses.advantages import Episodes
from orchestrator.algorithms.losses.interface import LossSum, TokenScores
from orchestrator.algorithms.own import own_advantage
from orchestrator.algorithms.table import build
from orchestrator.core.batches import LossUnits
from orchestrator.core.errors import ConfigError, MissingInput
from orchestrator.recipe.schema import ONLINE, AlgorithmConfig, Rollouts

FILE = """
import torch
from orchestrator import LossSum

def total(scores, units):
    return scores.logps.sum() / units.tokens

def summed(scores, units):
    return LossSum(scores.logps.sum() / units.tokens, {"mine": (scores.logps.sum(), 2.0)})

def each(scores, units):
    return scores.logps

def centred(episodes):
    return episodes.rewards - episodes.rewards.mean(1, keepdim=True)

def tokens(episodes):
    return torch.ones(sum(episodes.lengths))

def wrong(episodes):
    return torch.ones(4)

NUMBER = 1
"""
UNITS = LossUnits(1, (2, 1))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / f"own_{tmp_path.name}.py"
    path.write_text(FILE)
    return path


def scores() -> TokenScores:
    logps = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    return TokenScores(logps, torch.tensor([0, 0, 1]), 1, 2, ref_logps=torch.tensor([-1.0, -1.0, -1.0]))


def config(**keys: object) -> AlgorithmConfig:
    return AlgorithmConfig.model_validate({"name": "dpo", **keys})


def test_a_scalar_takes_the_place_of_the_loss_and_the_usual_metrics_stay(file: Path) -> None:
    spec, named = build(config(loss=f"{file}:total")), build(config())
    own, usual = spec.objective(scores(), UNITS), named.objective(scores(), UNITS)
    assert float(own.total.detach()) == pytest.approx(-3.5 / 3) and own.total.requires_grad
    assert own.means.keys() == usual.means.keys() and "loss" not in own.per_example
    assert float(own.means["rewards/margins"][0]) == pytest.approx(float(usual.means["rewards/margins"][0]))
    assert spec.loss_at_reference is None and named.loss_at_reference is not None
    assert spec.needs_reference and spec.data == "preference"


def test_a_loss_sum_brings_its_own_metrics(file: Path) -> None:
    result = build(config(loss=f"{file}:summed")).objective(scores(), UNITS)
    assert isinstance(result, LossSum) and set(result.means) == {"mine"}


def test_what_is_not_one_number_is_refused_with_its_shape(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"shape \(3,\)"):
        build(config(loss=f"{file}:each")).objective(scores(), UNITS)


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "kto", "simpo", "orpo", "cpo", *ONLINE])
def test_every_algorithm_takes_one(name: str, file: Path) -> None:
    rollouts = Rollouts.model_validate({"samples": 2})
    own = build(config(name=name, loss=f"{file}:total"), rollouts)
    usual = build(config(name=name), rollouts)
    assert type(own.objective).__name__ == "OwnLoss"
    assert (own.data, own.loss_unit, own.needs_reference) == (
        usual.data,
        usual.loss_unit,
        usual.needs_reference,
    )


@pytest.mark.parametrize(
    ("place", "error", "words"),
    [
        ("nowhere.py:f", MissingInput, "algorithm.loss: no file nowhere.py"),
        ("{}:totl", ConfigError, "did you mean total"),
        ("{}:NUMBER", ConfigError, "no function NUMBER"),
        ("nowhere_at_all:f", ConfigError, "cannot be imported"),
        ("{}/ends.py:f", ConfigError, "SystemExit: 3"),
    ],
)
def test_a_function_that_is_not_there_is_an_error_of_the_recipe(
    place: str, error: type[Exception], words: str, file: Path
) -> None:
    (file.parent / "ends.py").write_text("import sys\nsys.exit(3)\n")
    place = place.format(file.parent if "ends.py" in place else file)
    with pytest.raises(error) as raised:
        build(config(loss=place))
    assert words in str(raised.value)


def test_advantages_of_completions_or_of_tokens(file: Path) -> None:
    episodes = Episodes(torch.tensor([[1.0, 0.0]]).double(), torch.zeros(3).double(), (2, 1))
    by_completion, _ = own_advantage(f"{file}:centred")(episodes)
    assert by_completion.tolist() == [0.5, 0.5, -0.5]
    by_token, _ = own_advantage(f"{file}:tokens")(episodes)
    np.testing.assert_array_equal(by_token.numpy(), np.ones(3))
    with pytest.raises(ConfigError, match=r"\(1, 2\) or \(3,\)"):
        own_advantage(f"{file}:wrong")(episodes)
    critic = Episodes(episodes.rewards, episodes.penalties, episodes.lengths, torch.zeros(3).double())
    with pytest.raises(ConfigError, match="returns"):
        own_advantage(f"{file}:centred")(critic)


def test_an_own_advantage_takes_the_place_of_the_algorithms(file: Path) -> None:
    spec = build(config(name="grpo", advantage=f"{file}:tokens"), Rollouts.model_validate({"samples": 2}))
    assert spec.online is not None and spec.online.advantage is not None
    episodes = Episodes(torch.tensor([[1.0, 0.0]]).double(), torch.zeros(3).double(), (2, 1))
    assert spec.online.advantage(episodes)[0].tolist() == [1.0, 1.0, 1.0]
