"""Share of a GPU that vLLM may fill: its actor's part, less the weights that wait there to be verified."""

import pytest

from orchestrator.recipe.loading import load
from orchestrator.rollout.engines.vllm_engine import gpu_share

GB = 1_000_000_000


def share(*overrides: str) -> float:
    return gpu_share(
        load("tiny/grpo", [f"grpo:rollouts.{o}" for o in overrides]).stages[-1].recipe, 16 * GB, 80 * GB
    )


def test_vllm_fills_what_its_actor_was_given_of_a_gpu() -> None:
    assert share("gpus_per_worker=1") == pytest.approx(0.9)
    assert share("gpus_per_worker=0.5") == pytest.approx(0.45)


@pytest.mark.parametrize("transport", ["broadcast", "cuda_ipc"])
def test_memory_is_kept_for_weights_that_arrive_on_the_gpu(transport: str) -> None:
    assert share("gpus_per_worker=0.5", f"transport={transport}") == pytest.approx(0.45 - 16 / 80)
