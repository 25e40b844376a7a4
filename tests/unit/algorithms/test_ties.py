"""Ties count one half. Which margins are ties follows from the precision; without ties TRL agrees."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.algorithms.losses.interface import TokenScores
from orchestrator.algorithms.losses.sources import by_source
from orchestrator.algorithms.losses.ties import accuracy, margin_noise, preferred, tied
from orchestrator.algorithms.table import build
from orchestrator.core.batches import LossUnits
from orchestrator.core.reports import Mean
from orchestrator.observe.metric_names import named
from orchestrator.observe.metrics import values
from orchestrator.recipe.schema import AlgorithmConfig


def margins_of(precision: str, *margins: float, tokens: int = 100, name: str = "dpo") -> dict[str, float]:
    """The metrics of pairs with these log-ratio margins, in nat, of two answers of `tokens` each."""
    n = len(margins)
    ref = torch.full((2 * n * tokens,), -1.0, dtype=torch.float64)
    policy = ref.clone().view(n, 2, tokens)
    policy[:, 0] += torch.tensor(margins, dtype=torch.float64)[:, None] / tokens
    sequence = torch.arange(2 * n).repeat_interleave(tokens)
    scores = TokenScores(policy.flatten(), sequence, n, 2, ref_logps=ref, precision=precision)
    means = build(AlgorithmConfig(name=name)).objective(scores, LossUnits(n, (n * tokens, n * tokens))).means
    return values({key: Mean(float(total), float(count)) for key, (total, count) in means.items()})


def test_a_tie_counts_one_half():
    assert margins_of("fp32", 1.0, -1.0, 0.0, 1e-7)["rewards/accuracies"] == 0.5
    assert margins_of("fp32", 1.0, 1.0, 0.0, -1e-7)["rewards/accuracies"] == 0.75


def test_an_accuracy_of_ties_alone_is_nan():
    metrics = margins_of("fp32", 0.0, 1e-7, -1e-7)
    assert math.isnan(metrics["rewards/accuracies"])
    assert metrics["rewards/margins"] == pytest.approx(0.0, abs=1e-8)
    assert "rewards/ties" not in metrics, "ties are an ingredient of the accuracy, not a metric of a step"


def test_which_margins_are_ties_follows_from_the_precision():
    """A margin of 0.01 nat over 200 tokens is a result in fp32 and rounding in bf16."""
    assert margins_of("fp32", 0.01, -1.0)["rewards/accuracies"] == 0.5
    assert margins_of("bf16", 0.01, -1.0)["rewards/accuracies"] == 0.25
    assert margins_of("bf16", 3.0, -3.0)["rewards/accuracies"] == 0.5


@given(st.lists(st.floats(-3, 3).filter(lambda m: abs(m) > 1e-3), min_size=1, max_size=8))
def test_without_ties_it_is_the_share_of_positive_margins(margins: list[float]):
    assert margins_of("fp32", *margins)["rewards/accuracies"] == pytest.approx(
        sum(m > 0 for m in margins) / len(margins)
    )


def test_ties_on_the_device_and_on_the_host_are_the_same():
    margins, noises = [0.2, -0.2, 0.1, -0.1, 0.0], [0.1] * 5
    device = preferred(torch.tensor(margins, dtype=torch.float64), torch.tensor(noises, dtype=torch.float64))
    assert device.tolist() == [1.0, 0.0, 0.5, 0.5, 0.5]
    assert accuracy(margins, noises) == float(device.mean())
    assert math.isnan(accuracy([0.1, 0.0], [0.1, 0.1]))


def test_a_nan_margin_is_neither_a_tie_nor_right():
    nan = torch.tensor([math.nan])
    assert preferred(nan, torch.zeros(1)).item() == tied(nan, torch.zeros(1)).item() == 0.0


def test_two_rewards_one_rounding_apart_are_a_tie():
    rewards = torch.tensor([[2.0, 2.0], [2.0, 2.0 + 2**-8], [2.0, 1.0]], dtype=torch.float64)
    for precision, want in (("fp32", 0.5), ("bf16", 2 / 3)):
        scores = TokenScores(
            torch.zeros(0), torch.zeros(0, dtype=torch.long), 3, 2, rewards=rewards, precision=precision
        )
        total, count = (
            build(AlgorithmConfig(name="reward"))
            .objective(scores, LossUnits(3, (0, 0)))
            .means["rewards/accuracies"]
        )
        assert float(total) / float(count) == pytest.approx(want)


def test_noise_grows_as_a_random_walk():
    assert margin_noise(400.0, "fp32") == 2 * margin_noise(100.0, "fp32")


@given(st.lists(st.integers(0, 2), min_size=1, max_size=12))
def test_sources_add_up_to_the_whole(sources: list[int]):
    draw = torch.Generator().manual_seed(len(sources))
    value, count = (torch.rand(len(sources), generator=draw, dtype=torch.float64) for _ in range(2))
    means = by_source({"a": (value, None), "b": (value, count)}, torch.tensor(sources), sorted(set(sources)))
    assert sum(float(t) for name, (t, _) in means.items() if name.startswith("a")) == pytest.approx(
        float(value.sum())
    )
    assert sum(float(c) for name, (_, c) in means.items() if name.startswith("b")) == pytest.approx(
        float(count.sum())
    )
    assert sum(float(c) for name, (_, c) in means.items() if name.startswith("a")) == len(sources)


def test_metrics_of_sources_carry_their_names_unless_there_is_one_source():
    metrics = {"loss": 1.0, "rewards/margins/source 0": 2.0, "rewards/margins/source 1": 3.0}
    assert named(metrics, ("a", "b")) == {"loss": 1.0, "rewards/margins/a": 2.0, "rewards/margins/b": 3.0}
    assert named(metrics, ("a",)) == {"loss": 1.0}


def test_the_accuracy_of_a_source_of_ties_alone_is_nan():
    means = {"rewards/accuracies": Mean(1.0, 2), "rewards/ties": Mean(1.0, 2)}
    means |= {f"rewards/accuracies/source {k}": Mean(v, 1) for k, v in ((0, 1.0), (1, 0.5))}
    means |= {f"rewards/ties/source {k}": Mean(v, 1) for k, v in ((0, 0.0), (1, 1.0))}
    metrics = named(values(means), ("a", "b"))
    assert metrics["rewards/accuracies"] == 0.5
    assert metrics["rewards/accuracies/a"] == 1.0
    assert math.isnan(metrics["rewards/accuracies/b"])
