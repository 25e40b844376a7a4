"""Rollout actors and the pool that hands out their work.

    start(prompts) --chunks--> one queue --a thread per actor--> actor: weights, then groups

An idle actor takes the next chunk, so a few long completions do not leave the other actors idle. Chunks keep
the order of their batches, and every chunk names the weight version it is sampled with. An actor loads that
version before its first chunk of it, or was given it while nothing else was under way (broadcast, CUDA IPC).

Seeds belong to samples, so neither the number of actors nor the death of one changes a rollout. With
`rollouts.update: request` a chunk takes the newest version when its turn comes. Rollouts are fresher while
generation runs ahead, but their versions depend on the speed of the actors.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from orchestrator.cluster.actors import ActorResources
from orchestrator.cluster.deadlines import POLL_S, VLLM_START_S, Deadlines, Restarts
from orchestrator.cluster.failures import translate
from orchestrator.cluster.placement import Reservation
from orchestrator.cluster.rollout_actor import RolloutActor, Work
from orchestrator.core.errors import OrchestratorError, WorkerLost
from orchestrator.core.resources import WorkerGroup
from orchestrator.core.rollouts import RolloutGroup, Sampling, Span
from orchestrator.models.weight_buckets import BucketPlan, CorruptWeights
from orchestrator.recipe.schema import Recipe

MAX_SENDS = 3
"""Number of times that damaged weights are sent before the run ends."""


class PendingGroups:
    """roles.Pending: the groups of one start(), which the actors' threads fill in."""

    def __init__(self, count: int, pool: "RolloutPool") -> None:
        self.groups: list[RolloutGroup | None] = [None] * count
        self.failure: OrchestratorError | None = None
        self.pool = pool

    def result(self) -> tuple[RolloutGroup, ...]:
        return self.pool.wait(self)


@dataclass(slots=True)
class _Chunk:
    """Some prompts of a batch, done by one actor."""

    pending: PendingGroups
    """The batch."""
    places: Sequence[int]
    """Indices of the prompts in the batch."""
    work: Work
    sampling: Sampling
    version: int
    """Weight version to sample with."""
    sends: int = 0
    """Number of times that its weights arrived damaged."""


@dataclass(slots=True)
class _Shared:
    """What the actors' threads share, under one lock."""

    queue: deque[_Chunk] = field(default_factory=deque)
    running: dict[int, _Chunk] = field(default_factory=dict)
    """Chunk under way, by actor."""
    offers: dict[int, list[Any]] = field(default_factory=dict)
    """References to the buckets of a weight version; none if the actors hold it already."""
    plans: Sequence[BucketPlan] = ()
    """How the buckets of a version that the actors hold are cut."""
    spans: list[Span] = field(default_factory=list)
    since: dict[int, float] = field(default_factory=dict)
    """Start of the chunk under way, by actor."""
    chunks: int = 0
    """Chunks done so far."""
    closed: bool = False


class RolloutPool:
    """roles.Generator over any number of actors."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        parameters: int = 0,
        logs: Path | None = None,
        reservation: Reservation | None = None,
        name: str = "rollout",
    ) -> None:
        """parameters: of the model, for deadlines.
        logs: folder for the actors' output (NAME-INDEX.log); if None it goes to Ray's own logs.
        reservation: made and released by the caller, bundle i with room for actor i. It is the learners' if
        they are colocated.
        name: the actors are NAME-0, NAME-1 …
        """
        self.recipe, self.logs, self.name = recipe, logs, name
        rollouts = recipe.rollouts
        self.deadlines = Deadlines(_start_s(recipe), rollouts.timeout_s, parameters)
        demand = WorkerGroup("rollouts", rollouts.count, rollouts.cpus_per_worker, rollouts.gpus)
        self.owns_reservation = reservation is None
        self.reservation = reservation or Reservation.reserve(demand, recipe.learners.start_timeout_s)
        self.shared, self.changed = _Shared(), threading.Condition()
        self.restarts = Restarts(rollouts.max_restarts)
        self.threads: list[threading.Thread] = []
        self.actors: list[Any] = []
        try:
            self.actors += (self._new(i) for i in range(rollouts.count))
            building = [a.build.remote(recipe) for a in self.actors]
            self.pids = [self._built(i, reference) for i, reference in enumerate(building)]
        except BaseException:
            self.close()
            raise
        self.threads = [
            threading.Thread(target=self._serve, args=(i,), name=self._actor_name(i), daemon=True)
            for i in range(rollouts.count)
        ]
        for thread in self.threads:
            thread.start()

    def start(self, prompts: Work, sampling: Sampling, version: int) -> PendingGroups:
        """Queues a group for each (draw, prompt) and returns without waiting."""
        pending = PendingGroups(len(prompts), self)
        size = self._chunk_size(len(prompts), sampling.samples)
        with self.changed:
            if version not in self.shared.offers:
                raise WorkerLost(
                    f"weights {version} were never published", fix="this is a bug: publish before start"
                )
            for first in range(0, len(prompts), size):
                places = range(first, min(first + size, len(prompts)))
                work = [prompts[i] for i in places]
                self.shared.queue.append(_Chunk(pending, places, work, sampling, version))
            self.changed.notify_all()
        return pending

    def wait_until_idle(self) -> None:
        """Waits until everything that was started is done. Every chunk has its own deadline, so this
        returns."""
        with self.changed:
            while self.shared.queue or self.shared.running:
                self._await_change()

    def announce(self, version: int, references: list[Any], plans: Sequence[BucketPlan] = ()) -> None:
        """Makes a weight version available, and forgets versions that no chunk needs any more.

        references: to its buckets; empty if all actors hold the version, in buckets cut as in `plans`.
        """
        with self.changed:
            self.shared.plans = plans
            needed = {c.version for c in (*self.shared.queue, *self.shared.running.values())}
            kept = {v: r for v, r in self.shared.offers.items() if v in needed}
            self.shared.offers = kept | {version: references}

    def wait(self, pending: PendingGroups) -> tuple[RolloutGroup, ...]:
        """Waits for the groups of one start(). Every chunk has its own deadline, so this returns."""
        with self.changed:
            while pending.failure is None and any(g is None for g in pending.groups):
                self._await_change()
        if pending.failure is not None:
            raise pending.failure
        return tuple(g for g in pending.groups if g is not None)

    def _await_change(self) -> None:
        """Waits a short time for the actors' threads, with the lock held; WorkerLost if one has ended."""
        self.changed.wait(timeout=POLL_S)
        dead = [thread.name for thread in self.threads if not thread.is_alive()]
        if dead:
            raise WorkerLost(
                f"the thread of {', '.join(dead)} ended", fix="this is a bug: report it with logs/ of the run"
            )

    def spans(self) -> list[Span]:
        """When the actors worked since the last call, work under way until now included. An actor without
        work has a span of length 0."""
        now = time.perf_counter()
        with self.changed:
            for index, chunk in self.shared.running.items():
                self.shared.spans.append(Span(index, self.shared.since[index], now, chunk.version))
                self.shared.since[index] = now
            spans, self.shared.spans = self.shared.spans, []
        idle = set(range(len(self.actors))) - {span.actor for span in spans}
        return spans + [Span(index, now, now, -1) for index in sorted(idle)]

    def call(self, function: Any, *args: Any) -> list[Any]:
        """Calls function(rollout_worker, *args) on every actor; results by actor."""
        return [
            ray.get(a.call.remote(function, *args), timeout=self.recipe.rollouts.timeout_s)
            for a in self.actors
        ]

    def close(self) -> None:
        """Ends the actors and gives their resources back."""
        with self.changed:
            self.shared.closed = True
            self.shared.queue.clear()
            self.changed.notify_all()
        for actor in self.actors:
            ray.kill(actor)
        for thread in self.threads:
            thread.join(timeout=10.0)
        if self.owns_reservation:
            self.reservation.release()

    def __enter__(self) -> "RolloutPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _chunk_size(self, prompts: int, samples: int) -> int:
        """Number of prompts in a chunk.

        A single actor gets all, as it refills its rows itself. Several actors get two or more chunks each, of
        no more completions than an actor has rows.
        """
        workers = self.recipe.rollouts.count
        if workers == 1 and self.recipe.rollouts.update == "batch":
            return max(1, prompts)
        return max(1, min(-(-prompts // (2 * workers)), max(1, self.recipe.rollouts.rows // samples)))

    def _serve(self, index: int) -> None:
        """The thread of one actor: takes chunks until the pool closes."""
        while True:
            with self.changed:
                while not self.shared.queue and not self.shared.closed:
                    self.changed.wait()
                if self.shared.closed:
                    return
                chunk = self.shared.queue.popleft()
                if self.recipe.rollouts.update == "request":  # newer than at the batch's start, never older
                    chunk.version = max(self.shared.offers)
                references = self.shared.offers[chunk.version]
                self.shared.running[index], self.shared.since[index] = chunk, time.perf_counter()
            groups, failure = self._run(index, chunk, references)
            with self.changed:
                del self.shared.running[index]
                if groups is not None:
                    self.shared.chunks += 1
                    self.shared.spans.append(
                        Span(index, self.shared.since[index], time.perf_counter(), chunk.version)
                    )
                    for place, group in zip(chunk.places, groups, strict=True):
                        chunk.pending.groups[place] = group
                elif failure is not None:
                    chunk.pending.failure = failure
                elif not self.shared.closed:
                    self.shared.queue.appendleft(chunk)
                self.changed.notify_all()

    def _run(
        self, index: int, chunk: _Chunk, references: list[Any]
    ) -> tuple[tuple[RolloutGroup, ...] | None, OrchestratorError | None]:
        """Runs a chunk on an actor: (groups, None), (None, what ends the run), or (None, None) if any actor
        should do it again."""
        try:
            reference = self.actors[index].roll_out.remote(
                chunk.work, chunk.sampling, chunk.version, references
            )
            groups = tuple(
                ray.get(reference, timeout=self.deadlines.of("load" if references else "roll_out"))
            )
        except RayTaskError as error:
            chunk.sends += 1
            if isinstance(error.cause, CorruptWeights) and chunk.sends < MAX_SENDS:
                return None, None
            return None, translate(error, self._actor_name(index), "roll_out")
        except RayError as error:  # the actor died or is late, or its answer was lost with its node
            failure = self.replace(index, late=isinstance(error, GetTimeoutError), why=str(error))
            return None, failure or (None if references else self._hand_over(index, chunk.version))
        return groups, None

    def replace(self, index: int, *, late: bool, why: str) -> OrchestratorError | None:
        """Replaces an actor that died or is late by a new one, which has no weights yet; the error that ends
        the run if that happened too often."""
        with self.changed:
            if self.shared.closed:
                return None
            restarts = self.restarts.add(self.shared.chunks)
        failure = f"did not answer within {self.recipe.rollouts.timeout_s:.0f} s" if late else "died"
        if restarts > self.restarts.limit:
            return WorkerLost(
                f"{self._actor_name(index)} {failure}, and {restarts - 1} rollout actors were replaced "
                "already",
                why=why.strip().splitlines()[0] if why.strip() else "no answer",
                fix="see logs/ in the run folder; raise rollouts.timeout_s if answers really take longer",
            )
        ray.kill(self.actors[index])
        try:
            self.actors[index] = self._new(index)
            self.pids[index] = self._built(index, self.actors[index].build.remote(self.recipe))
        except OrchestratorError as error:
            return error
        return None

    def _hand_over(self, index: int, version: int) -> OrchestratorError | None:
        """Gives a new actor the version that the others were given before it came; the error that ends the
        run if that fails."""
        if self.shared.closed:
            return None
        limit, failure = self.deadlines.of("load"), None
        for _ in range(MAX_SENDS):
            references = self._dumped(version, index)
            if references is None:
                return WorkerLost(
                    f"{self._actor_name(index)} was replaced, and no other rollout actor could give it "
                    f"weights {version}",
                    fix="the run resumes from its last checkpoint; with rollouts.transport=object_store no "
                    "other actor is needed",
                )
            try:
                ray.get(self.actors[index].load.remote(version, references), timeout=limit)
                return None
            except RayError as error:
                failure = translate(error, self._actor_name(index), "load")
                if not isinstance(failure, CorruptWeights):
                    return failure
        return failure

    def _dumped(self, version: int, new: int) -> list[Any] | None:
        """References to a version from the first other actor that holds it. The actor answers once its chunk
        is done."""
        for index, actor in enumerate(self.actors):
            if index != new:
                try:
                    references = ray.get(
                        actor.dump.remote(version, self.shared.plans),
                        timeout=self.deadlines.verb_s + self.deadlines.of("dump"),
                    )
                except (RayActorError, GetTimeoutError):
                    continue  # its own thread sees that too, and replaces it
                if references is not None:
                    return references
        return None

    def _actor_name(self, index: int) -> str:
        return f"{self.name}-{index}"

    def _new(self, index: int) -> Any:
        cpus, gpus = self.recipe.rollouts.cpus_per_worker, self.recipe.rollouts.gpus
        resources = ActorResources(cpus, gpus, self.reservation.threads(index, cpus, gpus))
        name = self._actor_name(index)
        log = str(self.logs / f"{name}.log") if self.logs else None
        return self.reservation.start(
            RolloutActor, index, index, log, resources.threads, name=name, resources=resources
        )

    def _built(self, index: int, building: Any) -> int:
        """Waits until the engine of an actor is built; the actor's process id."""
        limit = self.deadlines.start_s + self.deadlines.of("build") - self.deadlines.verb_s
        try:
            return int(ray.get(building, timeout=limit))
        except GetTimeoutError:
            what = f"{self._actor_name(index)} was not ready within {limit:.0f} s"
            raise WorkerLost(what, fix="raise rollouts.start_timeout_s") from None
        except (RayTaskError, RayActorError) as error:
            raise translate(error, self._actor_name(index), "build") from error


def _start_s(recipe: Recipe) -> float:
    """Seconds until an engine is built, without the time that its bytes take."""
    rollouts = recipe.rollouts
    if rollouts.start_timeout_s is not None:
        return rollouts.start_timeout_s
    return VLLM_START_S if rollouts.engine == "vllm" and rollouts.gpus else recipe.learners.start_timeout_s
