"""How the policy's weights reach the rollout actors: one transport per class, the same verb.

    learners: gather a bucket (ZeRO-3), checksum it --transport--> actor: verify, put it in place; then it takes traffic
"""

import time

from orchestrator.cluster.rollout_workers import RolloutPool
from orchestrator.cluster.workers import LearnerGroup
from orchestrator.config import Recipe
from orchestrator.episodes import WeightsDelivered
from orchestrator.roles import WeightBridge


class ObjectStoreBridge:
    """Through Ray's object store: shared memory on one node, Ray's own transfer between nodes. Works everywhere.

    The learner goes on at once; an actor fetches a version before its first piece of work of it.
    """

    def __init__(self, learners: LearnerGroup, pool: RolloutPool, bucket_bytes: int) -> None:
        self.learners, self.pool, self.bucket_bytes = learners, pool, bucket_bytes

    def publish(self, version: int) -> WeightsDelivered:
        """Makes the learners' weights available as `version`."""
        started = time.perf_counter()
        references, size = self.learners.put_buckets(self.bucket_bytes)
        self.pool.offer(version, references)
        return WeightsDelivered(version, size, time.perf_counter() - started, len(references), "object_store")


def make_bridge(recipe: Recipe, learners: LearnerGroup, pool: RolloutPool) -> WeightBridge:
    """The transport that the recipe names."""
    return ObjectStoreBridge(learners, pool, int(recipe.rollouts.bucket_mb * 1e6))
