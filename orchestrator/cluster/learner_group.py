"""The group of learner workers: one Ray actor per DeepSpeed rank, all called at the same time."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from orchestrator.cluster.actors import ActorResources
from orchestrator.cluster.deadlines import ROOT_CAUSE_S, Deadlines
from orchestrator.cluster.failures import learner_failure
from orchestrator.cluster.learner_actor import LearnerActor
from orchestrator.cluster.placement import Reservation, learner_demand
from orchestrator.cluster.ranks import Ranks
from orchestrator.core.errors import OrchestratorError, OutOfMemory, WorkerLost
from orchestrator.recipe.schema import Learners, Rollouts

START = "learners.start_timeout_s"
"""Key of the recipe that gives more time to what comes before the first verb."""


class LearnerGroup(Ranks):
    """Ranks as actors. Every call has a deadline, and its error names the worker that is late or lost."""

    def __init__(
        self,
        learners: Learners,
        *,
        parameters: int = 0,
        logs: Path | None = None,
        name: str = "learner",
        colocated: Rollouts | None = None,
        reservation: Reservation | None = None,
    ) -> None:
        """parameters: of the model, for deadlines.
        logs: folder for the workers' output (NAME-RANK.log); if None it goes to Ray's own logs.
        colocated: rollout actors that share the bundles (see RolloutPool).
        reservation: made by the caller together with the run's other groups, and released by the caller.
        """
        self.learners, self.logs, self.name = learners, logs, name
        self.world = learners.count
        self.deadlines = Deadlines(learners.start_timeout_s, learners.timeout_s, parameters)
        self.expandable = learners.gpus > 0 and (colocated is None or colocated.transport != "cuda_ipc")
        self.owns_reservation = reservation is None
        self.reservation = reservation or Reservation.reserve(
            learner_demand(learners, colocated), learners.start_timeout_s
        )
        self.actors: list[Any] = []
        self.hosts: list[str] = []
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        self.actors = [self._new(rank) for rank in range(self.world)]
        start_s = self.deadlines.start_s
        address, port = self._collect([self.actors[0].address.remote()], "start", start_s, START)[0]
        self.hosts = self._collect([a.host.remote() for a in self.actors], "start", start_s, START)
        joins = [a.join.remote(self.world, address, port, self.deadlines.collective_s) for a in self.actors]
        self.pids: list[int] = self._collect(joins, "join the process group", start_s, START)

    def _new(self, rank: int) -> Any:
        cpus, gpus = self.learners.cpus_per_worker, self.learners.gpus
        threads = self.reservation.threads(rank, cpus, gpus)
        resources = ActorResources(cpus, gpus, threads, self.expandable)
        name = f"{self.name}-{rank}"
        log = str(self.logs / f"{name}.log") if self.logs else None
        return self.reservation.start(
            LearnerActor, rank, rank, log, resources, name=name, resources=resources
        )

    def put_buckets(self, bucket_bytes: int) -> tuple[list[Any], int]:
        """The policy's weights as references to buckets in Ray's object store, and their bytes."""
        return self._all("put_buckets", bucket_bytes)[0]

    def listen(self) -> tuple[str, int]:
        """Address and port where a new channel's members meet."""
        return self._collect(
            [self.actors[0].listen.remote(self.deadlines.start_s)], "listen", self.deadlines.start_s, START
        )[0]

    def open_channel(self, rendezvous: Any) -> str | None:
        """Rank 0 becomes the sender of a channel (models/weight_buckets.py); the reason if it could not."""
        return self._collect(
            [self.actors[0].open_channel.remote(rendezvous)],
            "open the channel for weights",
            self.deadlines.verb_s,
        )[0]

    def broadcast_buckets(self, bucket_bytes: int) -> str | None:
        """Sends the weights through the channel; the reason if it broke."""
        return self._all("broadcast_buckets", bucket_bytes)[0]

    def close(self) -> None:
        """Ends the workers and gives their resources back."""
        for actor in self.actors:
            ray.kill(actor)
        self.actors = []
        if self.owns_reservation:
            self.reservation.release()

    def __enter__(self) -> "LearnerGroup":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _share(self, value: Any) -> Any:
        return ray.put(value)

    def _each(self, verb: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        calls = zip(self.actors, arguments, strict=True)
        refs = [actor.do.options(name=verb).remote(verb, *args) for actor, args in calls]
        return self._collect(refs, verb, self.deadlines.of(verb))

    def _collect(
        self, refs: list[Any], verb: str, timeout_s: float, key: str = "learners.timeout_s"
    ) -> list[Any]:
        """Results by rank. Raises at the first failure, or WorkerLost with the workers that did not answer in
        time.

        key: of the recipe, named in the error as the one that gives more time.
        """
        deadline = time.monotonic() + timeout_s
        waiting, memory_error = list(refs), None
        while waiting:
            done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                late = [self._worker(refs.index(ref)) for ref in waiting]
                raise WorkerLost(
                    f"{', '.join(late)} did not answer `{verb}` within {timeout_s:.0f} s",
                    why="the process hangs, is stopped, or waits for another rank",
                    fix=f"see logs/ in the run folder; raise {key} if it really takes longer",
                )
            try:
                ray.get(done[0])
            except RayError as error:
                failure = learner_failure(error, self._worker(refs.index(done[0])), verb)
                if isinstance(failure, WorkerLost) and isinstance(error, RayTaskError):
                    failure = self._root_cause(failure, refs, waiting, verb)
                if not isinstance(failure, OutOfMemory):
                    raise failure from error
                failure.in_place = failure.in_place and self._can_replay()
                if not failure.in_place:
                    raise failure from error
                memory_error = failure
        if memory_error is not None:
            raise memory_error
        return ray.get(refs)

    def _root_cause(
        self, first: WorkerLost, refs: list[Any], waiting: list[Any], verb: str
    ) -> OrchestratorError:
        """The failure to report: the failure of a rank that lost its peers often arrives a moment before that
        of the peer which died or failed."""
        deadline = time.monotonic() + ROOT_CAUSE_S
        while waiting:
            done, waiting = ray.wait(waiting, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                break
            try:
                ray.get(done[0])
            except RayError as error:
                later = learner_failure(error, self._worker(refs.index(done[0])), verb)
                if not isinstance(later, WorkerLost) or not isinstance(error, RayTaskError):
                    return later
        return first

    def _worker(self, rank: int) -> str:
        """Name of a worker, with its host if there are several."""
        return f"{self.name}-{rank}" + (f" on {self.hosts[rank]}" if len(set(self.hosts)) > 1 else "")
