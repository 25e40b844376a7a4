"""Learners in Ray: their names, and that a group can be built again at once under the same ones."""

from pathlib import Path

import ray
from ray.util import list_named_actors

from orchestrator.cluster.workers import LearnerGroup
from orchestrator.config import Learners
from tests.running import shared_ray


def test_workers_are_named_by_role_and_rank_and_can_be_replaced_at_once(tmp_path: Path) -> None:
    learners = Learners(workers=2, cpus_per_worker=0.5)  # pyright: ignore[reportCallIssue]
    with shared_ray(tmp_path):
        pids = []
        for _ in range(2):
            with LearnerGroup(learners) as group:
                assert sorted(list_named_actors()) == ["learner-0", "learner-1"]
                assert len(set(group.hosts)) == 1 and ray.util.get_node_ip_address() in group.hosts
                pids += group.pids
        assert len(set(pids)) == 4
