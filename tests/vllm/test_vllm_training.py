"""The vLLM engine in a complete run: tiny GRPO through Ray, DeepSpeed and in-place weight updates."""

import importlib.util
from collections.abc import Iterator

import pytest

from tests.running import Shared, metrics, shared_ray

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None, reason="vllm is not installed: `make test-vllm`"
    ),
]

GAP = 1e-4
"""Largest gap of a run in nat per token, for fp32 models of width 64 on different kernels, before and after
each weight update."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with shared_ray(tmp_path_factory.mktemp("vllm")) as shared:
        yield shared


def test_tiny_grpo_learns_on_vllm(shared: Shared) -> None:
    """The shipped recipe with two attention heads, since vLLM's CPU kernels do not support heads of 16."""
    quiet = ("tracking.wandb=off", "learners.workers=1")
    sft, _ = shared.train(
        "tiny/sft", "sft", *quiet, "model.tiny.heads=2", "evaluation.every=null", "data.eval=null"
    )
    engine = (
        "rollouts.engine=vllm",
        "rollouts.workers=1",
        "rollouts.cpus_per_worker=1",
        "learners.start_timeout_s=300",
    )
    outcome, _ = shared.train_last("tiny/grpo", sft.export, "grpo", *quiet, *engine)
    gaps = [line["policy/train_rollout_gap_max"] for line in metrics(outcome.folder)]
    print(
        f"held-out reward {outcome.before['eval/reward/mean']:.3f} -> "
        f"{outcome.after['eval/reward/mean']:.3f}, largest gap {max(gaps):.1e} nat"
    )
    assert len(gaps) == 60 and max(gaps) < GAP
    assert outcome.after["eval/reward/mean"] >= 0.9 > outcome.before["eval/reward/mean"] + 0.2
