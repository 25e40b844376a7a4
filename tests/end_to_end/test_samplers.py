"""Online runs with every kind of sampler: on-policy, the generator's log-probs are the learner's.

So all correction weights are 1.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from orchestrator.models.load import load
from orchestrator.recipe.schema import Model, TinyModel
from tests.running import Shared, metrics, shared_ray

pytestmark = pytest.mark.timeout(600)

GAP = 1e-4
"""Nat per token by which an fp32 model's kernels differ at most (measured at full support: 1e-5)."""
SMALL = (
    *(
        "run.max_steps=2",
        "rollouts.prompts=4",
        "rollouts.samples=4",
        "batch.effective=16",
        "learners.workers=1",
        "rollouts.workers=1",
    ),
    *(
        "tracking.wandb=off",
        "evaluation.every=null",
        "data.eval=null",
        "evaluation.at_start=false",
        "optimizer.warmup_steps=0",
    ),
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with shared_ray(tmp_path_factory.mktemp("samplers")) as shared:
        yield shared


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy to start from, with logits far enough apart for a temperature to matter."""
    loaded, folder = load(Model(tiny=TinyModel()), seed=3, head="lm"), tmp_path_factory.mktemp("start")
    model: Any = loaded.model
    model.get_output_embeddings().weight.data.mul_(20.0)
    model.save_pretrained(folder)
    loaded.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reward(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A reward that differs within every group, so that the first step changes the weights."""
    file = tmp_path_factory.mktemp("reward") / "variety.py"
    file.write_text(
        "def variety(completions, **_):\n    return [float(len(set(text))) for text in completions]\n"
    )
    return f"rewards.functions=[{{name: variety, function: {file}:variety}}]"


def slow(*values: object) -> object:
    return pytest.param(*values, marks=pytest.mark.slow)


#        algorithm       sampler
CASES = [
    ("grpo", ("temperature=1.4", "top_k=20", "min_p=0.02", "stop=['1','2','7']", "batching=continuous")),
    slow("dapo", ("temperature=0.6", "top_p=0.9")),
    slow("grpo", ("temperature=0.6",)),
    slow("grpo", ("temperature=1.7",)),
    slow("grpo", ("top_p=0.8",)),
    slow("gspo", ("top_k=20",)),
    slow("rloo", ("min_p=0.1",)),
    slow("cispo", ("top_k=1", "temperature=2")),
    slow("dr_grpo", ("top_k=5000", "temperature=0.8")),
    slow("reinforce_pp", ("top_p=0.7", "temperature=0.7")),
    slow("ppo", ("top_p=0.9", "stop=['a']")),
]


@pytest.mark.parametrize(("name", "sampler"), CASES, ids=str)
def test_on_policy_weights_are_one_whatever_the_sampler(
    shared: Shared, start: Path, reward: str, name: str, sampler: tuple[str, ...]
) -> None:
    folder = "-".join((name, *sampler)).translate(str.maketrans("=.,'[]", "______"))
    outcome, console = shared.train_last(
        "tiny/grpo",
        start,
        folder,
        *SMALL,
        reward,
        f"algorithm.name={name}",
        *(f"rollouts.{s}" for s in sampler),
    )
    lines = metrics(outcome.folder)
    assert len(lines) == 2 and "warning" not in console
    assert lines[0]["grad_norm"] > 0 or "top_k=1" in sampler, "greedy completions of a group are all the same"
    for line in lines:
        assert line["policy/train_rollout_gap_max"] < GAP
        assert line["policy/correction_weight"] == pytest.approx(1.0, abs=GAP)
        assert line["policy/ratio_max"] == pytest.approx(1.0, abs=GAP)
        truncates = any(s.split("=")[0] in ("top_p", "top_k", "min_p") for s in sampler)
        assert ("policy/kept_mass" in line) is truncates
        assert not truncates or 0.0 < line["policy/kept_mass"] <= 1.0 + 1e-6
