"""How the policy's weights reach the rollout actors: one transport per class, the same verb.

    learners: gather a bucket (ZeRO-3), checksum it --transport--> actor: verify it, put it in place

An actor generates with a version only after all its buckets are verified.

object_store   all buckets into Ray's object store; an actor fetches them before its first work with the
               version
broadcast      each bucket from rank 0 to all actors together, over gloo or NCCL (weight_buckets.Channel)
cuda_ipc       each bucket from rank i to actor i on the same GPU, by a handle: nothing is copied between
               processes
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from orchestrator.cluster.actors import device_name
from orchestrator.cluster.failures import translate
from orchestrator.cluster.learner_group import LearnerGroup
from orchestrator.cluster.rollout_pool import MAX_SENDS, RolloutPool
from orchestrator.core.errors import ConfigError, OrchestratorError, WorkerLost
from orchestrator.core.roles import WeightSync
from orchestrator.core.rollouts import WeightsDelivered
from orchestrator.learner.rank_learner import RankLearner
from orchestrator.learner.weights import bucket_plans, send_each
from orchestrator.models.weight_buckets import BucketPlan, ChannelBroken, CorruptWeights, Rendezvous, checksum
from orchestrator.recipe.schema import Recipe

DEADLINE_SHARE = 0.8
"""Part of a deadline that a member of a transfer waits for another member. It gives up before the driver
does, so that only the process that hangs is late."""


class ObjectStoreSync:
    """Through Ray's object store: shared memory on one node, Ray's own transfer between nodes. Works
    everywhere.

    The learners continue without waiting. An actor fetches a version before its first chunk of it.
    """

    def __init__(self, learners: LearnerGroup, pool: RolloutPool, bucket_bytes: int) -> None:
        self.learners, self.pool, self.bucket_bytes = learners, pool, bucket_bytes

    def publish(self, version: int) -> WeightsDelivered:
        """Makes the learners' weights available as `version`."""
        started = time.perf_counter()
        references, size = self.learners.put_buckets(self.bucket_bytes)
        self.pool.announce(version, references)
        return WeightsDelivered(version, size, time.perf_counter() - started, len(references), "object_store")


@dataclass(frozen=True, slots=True)
class DeliveryFailure:
    """Why an actor does not hold a version."""

    kind: Literal["damaged", "broken", "lost", "late", "failed"]
    """lost, late: the actor has to be replaced; broken: another member may be the cause."""
    error: OrchestratorError

    @classmethod
    def of(cls, error: Exception, actor: str, verb: str) -> "DeliveryFailure":
        if isinstance(error, GetTimeoutError):
            fix = "raise rollouts.timeout_s if it really takes longer"
            return cls("late", WorkerLost(f"{actor} did not {verb} in time", fix=fix))
        failure = translate(error, actor, verb)
        if isinstance(error, RayActorError):
            return cls("lost", failure)
        if isinstance(failure, CorruptWeights):
            return cls("damaged", failure)
        return cls("broken" if isinstance(failure, ChannelBroken) else "failed", failure)


def outcomes(references: Sequence[Any], verb: str, timeout_s: float) -> dict[int, DeliveryFailure]:
    """Waits for one call to each actor; the failures, by actor."""
    _, late = ray.wait(list(references), num_returns=len(references), timeout=timeout_s)
    failed: dict[int, DeliveryFailure] = {}
    for index, reference in enumerate(references):
        try:
            if reference in late:
                raise GetTimeoutError
            ray.get(reference)
        except (RayTaskError, RayActorError, GetTimeoutError) as error:
            failed[index] = DeliveryFailure.of(error, f"rollout-{index}", verb)
    return failed


class _DirectSync(ABC):
    """Sends the weights while `publish` waits, once all work with the old version is done. If an actor dies
    meanwhile it is replaced, and the weights are sent to all actors again.

    With rollouts.max_staleness the learners wait here for rollouts in flight; with the object store they
    continue.
    """

    transport: str

    def __init__(self, learners: LearnerGroup, pool: RolloutPool, bucket_bytes: int) -> None:
        self.learners, self.pool, self.bucket_bytes = learners, pool, bucket_bytes
        self.deadline_s = min(pool.recipe.learners.timeout_s, pool.recipe.rollouts.timeout_s)
        self.plans: tuple[BucketPlan, ...] = ()

    def publish(self, version: int) -> WeightsDelivered:
        """Returns when every actor holds `version`; CorruptWeights if it arrived damaged MAX_SENDS times.

        Call it from the thread that starts rollouts.
        """
        started = time.perf_counter()
        self.pool.wait_until_idle()
        if not self.plans:
            self.plans = self.learners.call(bucket_plans, self.bucket_bytes)[0]
        sends = 0
        while failed := self._send(version):
            error = self._replace_failed(failed)
            sends += error is not None
            if error is not None and sends == MAX_SENDS:
                raise error
        self.pool.announce(version, [], self.plans)
        size = sum(plan.size for plan in self.plans)
        return WeightsDelivered(version, size, time.perf_counter() - started, len(self.plans), self.transport)

    @abstractmethod
    def _send(self, version: int) -> Mapping[int, DeliveryFailure]:
        """Sends all buckets to all actors; the failures, by actor."""

    def _replace_failed(self, failed: Mapping[int, DeliveryFailure]) -> OrchestratorError | None:
        """Replaces the actors that are lost or late. Returns the error that counts as one failed send; None
        if a lost actor explains all failures."""
        for index, failure in failed.items():
            if failure.kind == "failed":
                raise failure.error
            if failure.kind in ("lost", "late"):
                ended = self.pool.replace(index, late=failure.kind == "late", why=failure.error.what)
                if ended is not None:
                    raise ended
        damaged = [f.error for f in failed.values() if f.kind == "damaged"]
        broken = [f.error for f in failed.values() if f.kind == "broken"]
        only_broken = len(broken) == len(failed)
        return damaged[0] if damaged else broken[0] if only_broken else None


class BroadcastSync(_DirectSync):
    """From rank 0 to all actors together, through a channel that is opened again when an actor is
    replaced."""

    transport = "broadcast"

    def __init__(
        self, learners: LearnerGroup, pool: RolloutPool, bucket_bytes: int, backend: str = "gloo"
    ) -> None:
        super().__init__(learners, pool, bucket_bytes)
        self.backend = backend
        self.members: list[Any] = []

    def _send(self, version: int) -> Mapping[int, DeliveryFailure]:
        if self.members != self.pool.actors and (failed := self._open()):
            return failed
        started = time.monotonic()
        receiving = [actor.receive.remote(version) for actor in self.pool.actors]
        broken = self.learners.broadcast_buckets(self.bucket_bytes)
        rest = max(self.deadline_s - (time.monotonic() - started), (1 - DEADLINE_SHARE) * self.deadline_s)
        failed = outcomes(receiving, "receive weights", rest)
        if broken is not None or any(f.kind != "damaged" for f in failed.values()):
            self.members = []
        return failed

    def _open(self) -> Mapping[int, DeliveryFailure]:
        """Opens a new channel to the present actors; the failures, by actor."""
        self.members, actors = [], list(self.pool.actors)
        gone = outcomes(
            [a.leave_channel.remote() for a in actors], "leave the channel for weights", self.deadline_s
        )
        if gone:
            return gone
        address, port = self.learners.listen()
        limit = DEADLINE_SHARE * self.deadline_s
        rendezvous = Rendezvous(address, port, len(actors) + 1, self.backend, limit)
        joining = [a.join_channel.remote(rendezvous, self.plans) for a in actors]
        broken = self.learners.open_channel(rendezvous)
        failed = outcomes(joining, "join the channel for weights", self.deadline_s)
        if broken is not None and not failed:
            raise WorkerLost(
                "the channel for weights could not be opened", why=broken, fix="see logs/ in the run folder"
            )
        if not failed:
            self.members = actors
        return failed


class CudaIpcSync(_DirectSync):
    """From rank i to actor i, in the memory of the GPU that both use."""

    transport = "cuda_ipc"

    def _send(self, version: int) -> Mapping[int, DeliveryFailure]:
        actors, limit = list(self.pool.actors), DEADLINE_SHARE * self.deadline_s
        failures = self.learners.call(hand_buckets, actors, version, self.bucket_bytes, limit)
        failed = {index: failure for index, failure in enumerate(failures) if failure is not None}
        return failed or outcomes(
            [a.commit.remote(version) for a in self.pool.actors], "take weights", self.deadline_s
        )


def hand_buckets(
    learner: RankLearner, receivers: Sequence[Any], version: int, bucket_bytes: int, timeout_s: float
) -> DeliveryFailure | None:
    """On every rank: passes each bucket to the actor with the rank's number. The actor has taken it before
    the next bucket is gathered."""
    from torch.multiprocessing.reductions import reduce_tensor

    rank, device = learner.process_group.rank, device_name(learner.device)
    failed: list[DeliveryFailure] = []

    def hand(index: int, plan: BucketPlan, flat: Any) -> None:
        expected = checksum(flat)  # waits for the device
        try:
            ray.get(
                receivers[rank].take.remote(version, index, plan, reduce_tensor(flat), expected, device),
                timeout=timeout_s,
            )
        except RayError as error:
            failed.append(DeliveryFailure.of(error, f"rollout-{rank}", "take weights"))
            raise ChannelBroken(f"rollout-{rank} takes no more buckets") from error

    send_each(learner, bucket_bytes, hand)
    return failed[0] if failed else None


def make_weight_sync(recipe: Recipe, learners: LearnerGroup, pool: RolloutPool) -> WeightSync:
    """The transport that the recipe names.

    auto is the object store, which works everywhere. CUDA IPC saves its copies if learner and actor share a
    GPU, but its handles have not run on one yet, so the recipe has to name it.
    """
    rollouts, size = recipe.rollouts, int(recipe.rollouts.bucket_mb * 1e6)
    shared = shares_gpus(recipe)
    if rollouts.transport == "cuda_ipc" and not shared:
        raise ConfigError(
            "rollouts.transport=cuda_ipc needs a learner and a rollout actor on each GPU",
            why=f"placement={rollouts.placement}, GPUs per learner: {recipe.learners.gpus:g}, per actor: "
            f"{rollouts.gpus:g}",
            fix="set rollouts.placement=colocated and "
            "learners.gpus_per_worker=rollouts.gpus_per_worker=0.5, or rollouts.transport=auto",
        )
    if rollouts.transport == "broadcast":
        on_gpus = recipe.learners.gpus > 0 and rollouts.gpus > 0 and not shared
        backend = "nccl" if on_gpus else "gloo"  # NCCL takes one process per GPU
        return BroadcastSync(learners, pool, size, backend)
    if rollouts.transport == "cuda_ipc":
        return CudaIpcSync(learners, pool, size)
    return ObjectStoreSync(learners, pool, size)


def shares_gpus(recipe: Recipe) -> bool:
    """Whether learner i and rollout actor i have parts of one GPU."""
    learner, actor = recipe.learners.gpus, recipe.rollouts.gpus
    return recipe.rollouts.placement == "colocated" and learner > 0 and actor > 0 and learner + actor <= 1
