"""Learners in Ray: their names, that a group can be built again under the same names, and which worker is
reported as late."""

import os
import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.util import list_named_actors

from orchestrator.cluster.deadlines import COLLECTIVE_GRACE_S
from orchestrator.cluster.joining import OBJECT_STORE_BYTES, connect, own_ray, store_for
from orchestrator.cluster.learner_group import LearnerGroup
from orchestrator.core.batches import Cut
from orchestrator.core.errors import WorkerLost
from orchestrator.learner.rank_learner import LearnerSpec
from orchestrator.recipe.loading import load
from orchestrator.recipe.schema import Learners
from tests.running import Sandbox, shared_ray


def test_workers_are_named_by_role_and_rank_as_nice_as_their_driver_and_can_be_replaced_at_once(
    tmp_path: Path,
) -> None:
    learners = Learners(workers=2, cpus_per_worker=0.5)  # pyright: ignore[reportCallIssue]
    with shared_ray(tmp_path):
        pids = []
        for _ in range(2):
            with LearnerGroup(learners) as group:
                assert sorted(list_named_actors()) == ["learner-0", "learner-1"]
                assert len(set(group.hosts)) == 1 and ray.util.get_node_ip_address() in group.hosts
                assert [os.getpriority(os.PRIO_PROCESS, pid) for pid in group.pids] == [
                    os.getpriority(os.PRIO_PROCESS, 0)
                ] * 2
                pids += group.pids
        assert len(set(pids)) == 4


def freeze(learner: Any, rank: int) -> None:
    """Sends SIGSTOP to the process of one rank, in the middle of its work."""
    if int(os.environ["RANK"]) == rank:
        os.kill(os.getpid(), signal.SIGSTOP)


def deadlines_of_groups(learner: Any) -> list[timedelta]:
    """Timeouts of every process group of this rank, those that DeepSpeed made included."""
    import torch
    from torch.distributed import distributed_c10d as c10d

    return [group._get_backend(torch.device("cpu")).options._timeout for group in c10d._world.pg_map]


def test_a_frozen_worker_is_named_by_the_driver_before_gloo_gives_up(tmp_path: Path) -> None:
    learners = Learners(workers=2, cpus_per_worker=0.5, timeout_s=60.0)  # pyright: ignore[reportCallIssue]
    recipe = load("tiny/dpo", ["model.tiny.layers=1"]).stages[0].recipe
    recipe = recipe.model_copy(update={"learners": learners})
    with shared_ray(tmp_path), LearnerGroup(learners, parameters=1_000_000_000) as group:
        group.build(LearnerSpec(recipe, Cut(2, 1, None, "padded", 1, "no_sync"), 4))
        last = group.deadlines.of("save_state")
        assert last == 60 + 12e9 / 100e6
        timeouts = group.call(deadlines_of_groups)
        assert len(timeouts[0]) > 1, "DeepSpeed has its own group"
        assert {d for rank in timeouts for d in rank} == {timedelta(seconds=last + COLLECTIVE_GRACE_S)}
        group.deadlines = type(group.deadlines)(60.0, 3.0)
        started = time.monotonic()
        with pytest.raises(WorkerLost, match=r"^learner-1 did not answer `call` within 3 s"):
            group.call(freeze, 1)
        assert time.monotonic() - started < 10


def test_a_local_ray_has_room_for_the_weights_that_go_through_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert store_for(0) == OBJECT_STORE_BYTES
    assert store_for(100_000_000) == OBJECT_STORE_BYTES + 100_000_000
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert OBJECT_STORE_BYTES <= store_for(10**13) <= 0.3 * ram
    sandbox = Sandbox(tmp_path)
    for name, value in (sandbox.environment() | {"HOME": str(Path.home())}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    try:
        with own_ray():
            connect(store_for(100_000_000))
            assert ray.cluster_resources()["object_store_memory"] == OBJECT_STORE_BYTES + 100_000_000
        assert not ray.is_initialized()
    finally:
        ray.shutdown()
        sandbox.close()
