"""DeepSpeed's configuration on GPUs and on CPUs: overlap, buckets, and the same accumulation contract."""

import pytest

from orchestrator.core.zero import bucket_elements
from orchestrator.learner.engine import deepspeed_config
from orchestrator.recipe.schema import Learners, Optimizer

MANY = 10**9


def config(gpus: float, stage: int, trainable: int = MANY) -> dict:
    learners = Learners(gpus_per_worker=gpus)  # pyright: ignore[reportCallIssue]
    optimizer = Optimizer(learning_rate=1e-3)  # pyright: ignore[reportCallIssue]
    return deepspeed_config(learners, optimizer, stage, "no_sync", trainable)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_only_gpus_that_reduce_in_the_backward_overlap(stage):
    assert config(1, stage)["zero_optimization"]["overlap_comm"] is (stage >= 2)
    assert config(0, stage)["zero_optimization"]["overlap_comm"] is False


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_buckets_fill_a_gpus_links_and_are_never_larger_than_the_model(stage):
    on_gpu, on_cpu = config(1, stage)["zero_optimization"], config(0, stage)["zero_optimization"]
    assert on_gpu["reduce_bucket_size"] == on_gpu["allgather_bucket_size"] == bucket_elements(True) >= 2e8
    assert on_cpu["reduce_bucket_size"] == on_cpu["allgather_bucket_size"] == bucket_elements(False) == 25e6
    assert config(1, stage, 7)["zero_optimization"]["reduce_bucket_size"] == 7
    assert on_cpu.get("stage3_prefetch_bucket_size", 0) == 0
    assert on_gpu.get("stage3_prefetch_bucket_size", 2e8) == 2e8


def test_nothing_but_speed_depends_on_the_device():
    def without_zero(gpus: float) -> dict:
        return {name: value for name, value in config(gpus, 3).items() if name != "zero_optimization"}

    on_gpu = without_zero(1)
    assert without_zero(0) == on_gpu
    assert on_gpu["communication_data_type"] == on_gpu["data_types"]["grad_accum_dtype"] == "fp32"
