"""Rollout actors and the pool that hands out their work.

    start(prompts) --cut into chunks--> one queue --a thread per actor takes the next chunk--> actor: weights, then groups

An actor that has time takes the next chunk, so a long tail idles nobody. Chunks keep the order of their
batches, and every chunk names the weight version it is sampled with: an actor loads that version before its
first chunk of it, or was given it while nothing else was under way (broadcast, CUDA IPC). Seeds belong to
samples, so neither the number of actors nor the death of one changes a rollout. With `rollouts.update:
request` a chunk takes the newest version there is when its turn comes: fresher rollouts while generation runs
ahead, but which version depends on who was quick.
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

from orchestrator.cluster.actors import Share
from orchestrator.cluster.deadlines import Deadlines, Restarts
from orchestrator.cluster.failures import translate
from orchestrator.cluster.placement import Placement
from orchestrator.cluster.rollout_actor import RolloutActor, Work
from orchestrator.core.errors import OrchestratorError, WorkerLost
from orchestrator.core.resources import WorkerGroup
from orchestrator.core.rollouts import RolloutGroup, Sampling, Span
from orchestrator.models.weight_buckets import BucketPlan, CorruptWeights
from orchestrator.recipe.schema import Recipe

MAX_SENDS = 3
"""Times that damaged weights are sent before the run gives up."""
VLLM_START_S = 900.0
"""For vLLM on a GPU: it compiles the model and captures its graphs, minutes on a cold cache."""
POLL_S = 5.0
"""Seconds between looks at the actors' threads while rollouts are waited for."""


class PendingGroups:
    """roles.Pending: the groups of one start(), filled by the actors' threads."""

    def __init__(self, count: int, pool: "RolloutPool") -> None:
        self.groups: list[RolloutGroup | None] = [None] * count
        self.failure: OrchestratorError | None = None
        self.pool = pool

    def result(self) -> tuple[RolloutGroup, ...]:
        return self.pool.wait(self)


@dataclass(slots=True)
class _Chunk:
    """Some prompts of a batch. at: their places in it."""

    pending: PendingGroups
    at: Sequence[int]
    work: Work
    sampling: Sampling
    version: int
    sends: int = 0


@dataclass(slots=True)
class _Shared:
    """What the threads share, under one lock. offers: weight version -> references to its buckets, none where
    the actors hold it already; plans: how its buckets are cut then; chunks: done so far."""

    queue: deque[_Chunk] = field(default_factory=deque)
    running: dict[int, _Chunk] = field(default_factory=dict)
    offers: dict[int, list[Any]] = field(default_factory=dict)
    plans: Sequence[BucketPlan] = ()
    spans: list[Span] = field(default_factory=list)
    since: dict[int, float] = field(default_factory=dict)
    chunks: int = 0
    closed: bool = False


class RolloutPool:
    """roles.Generator over any number of actors."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        parameters: int = 0,
        logs: Path | None = None,
        placement: Placement | None = None,
        name: str = "rollout",
    ) -> None:
        """parameters: of the model, for deadlines; placement: reserved and released by the caller, bundle i
        with room for actor i (the learners' where they are colocated); name: the actors are NAME-0, NAME-1 …
        """
        self.recipe, self.logs, self.name = recipe, logs, name
        rollouts = recipe.rollouts
        self.deadlines = Deadlines(_start_s(recipe), rollouts.timeout_s, parameters)
        demand = WorkerGroup("rollouts", rollouts.count, rollouts.cpus_per_worker, rollouts.gpus)
        self.reserved = placement is None
        self.placement = placement or Placement.reserve(demand, recipe.learners.start_timeout_s)
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
            threading.Thread(target=self._serve, args=(i,), name=self._who(i), daemon=True)
            for i in range(rollouts.count)
        ]
        for thread in self.threads:
            thread.start()

    def start(self, prompts: Work, sampling: Sampling, version: int) -> PendingGroups:
        """Queues a group for each (draw, prompt) and returns at once."""
        pending = PendingGroups(len(prompts), self)
        size = self._chunk_size(len(prompts), sampling.samples)
        with self.changed:
            if version not in self.shared.offers:
                raise WorkerLost(
                    f"weights {version} were never published", fix="this is a bug: publish before start"
                )
            for first in range(0, len(prompts), size):
                at = range(first, min(first + size, len(prompts)))
                self.shared.queue.append(_Chunk(pending, at, [prompts[i] for i in at], sampling, version))
            self.changed.notify_all()
        return pending

    def wait_until_idle(self) -> None:
        """Waits until everything that was started is done. Every chunk has its own deadline, so this ends."""
        with self.changed:
            while self.shared.queue or self.shared.running:
                self._look()

    def announce(self, version: int, references: list[Any], plans: Sequence[BucketPlan] = ()) -> None:
        """Makes a weight version available; versions that no chunk asks for any more are forgotten. No
        references: all actors hold it, in buckets cut as in `plans`."""
        with self.changed:
            self.shared.plans = plans
            needed = {c.version for c in (*self.shared.queue, *self.shared.running.values())}
            self.shared.offers = {v: r for v, r in self.shared.offers.items() if v in needed} | {
                version: references
            }

    def wait(self, pending: PendingGroups) -> tuple[RolloutGroup, ...]:
        """The groups of one start(). Every chunk has its own deadline, so this ends."""
        with self.changed:
            while pending.failure is None and any(g is None for g in pending.groups):
                self._look()
        if pending.failure is not None:
            raise pending.failure
        return tuple(g for g in pending.groups if g is not None)

    def _look(self) -> None:
        """Waits a little for the actors' threads, holding the lock; WorkerLost where one has ended."""
        self.changed.wait(timeout=POLL_S)
        dead = [thread.name for thread in self.threads if not thread.is_alive()]
        if dead:
            raise WorkerLost(
                f"the thread of {', '.join(dead)} ended", fix="this is a bug: report it with logs/ of the run"
            )

    def spans(self) -> list[Span]:
        """When the actors worked since the last call, work under way until now included; a span of no length
        for one that had none."""
        now = time.perf_counter()
        with self.changed:
            for index, chunk in self.shared.running.items():
                self.shared.spans.append(Span(index, self.shared.since[index], now, chunk.version))
                self.shared.since[index] = now
            spans, self.shared.spans = self.shared.spans, []
        idle = set(range(len(self.actors))) - {span.actor for span in spans}
        return spans + [Span(index, now, now, -1) for index in sorted(idle)]

    def call(self, function: Any, *args: Any) -> list[Any]:
        """function(rollout_worker, *args) on every actor."""
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
        if self.reserved:
            self.placement.release()

    def __enter__(self) -> "RolloutPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _chunk_size(self, prompts: int, samples: int) -> int:
        """Prompts of a chunk: all for one actor, which refills its rows itself; else so many that each actor
        gets two or more chunks, but no fewer rows than fit at once where the batch allows it."""
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
                if (
                    self.recipe.rollouts.update == "request"
                ):  # newer than the batch was started with, never older
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
                    for place, group in zip(chunk.at, groups, strict=True):
                        chunk.pending.groups[place] = group
                elif failure is not None:
                    chunk.pending.failure = failure
                elif not self.shared.closed:
                    self.shared.queue.appendleft(chunk)
                self.changed.notify_all()

    def _run(
        self, index: int, chunk: _Chunk, references: list[Any]
    ) -> tuple[tuple[RolloutGroup, ...] | None, OrchestratorError | None]:
        """(groups, None), (None, what ended it), or (None, None): to be done again, by whom ever."""
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
            return None, translate(error, self._who(index), "roll_out")
        except RayError as error:  # the actor died or is late, or its answer was lost with its node
            failure = self.replace(index, late=isinstance(error, GetTimeoutError), why=str(error))
            return None, failure or (None if references else self._hand_over(index, chunk.version))
        return groups, None

    def replace(self, index: int, *, late: bool, why: str) -> OrchestratorError | None:
        """A new actor, without weights, in place of one that died or is late; what ends the run where that
        happened too often."""
        with self.changed:
            if self.shared.closed:
                return None
            restarts = self.restarts.add(self.shared.chunks)
        said = f"did not answer within {self.recipe.rollouts.timeout_s:.0f} s" if late else "died"
        if restarts > self.restarts.limit:
            return WorkerLost(
                f"{self._who(index)} {said}, and {restarts - 1} rollout actors were replaced already",
                why=why.strip().splitlines()[0] if why.strip() else "no answer",
                fix="see logs/ in the run folder; raise rollouts.timeout_s if answers really take longer",
            )
        ray.kill(self.actors[index])
        try:
            self.actors[index] = self._new(index)
            self.pids[index] = self._built(index, self.actors[index].build.remote(self.recipe))
        except OrchestratorError as failure:
            return failure
        return None

    def _hand_over(self, index: int, version: int) -> OrchestratorError | None:
        """Gives a new actor the version that the others were given before it came; what ends the run where
        that fails."""
        if self.shared.closed:
            return None
        limit, failure = self.deadlines.of("load"), None
        for _ in range(MAX_SENDS):
            references = self._dumped(version, index)
            if references is None:
                return WorkerLost(
                    f"{self._who(index)} was replaced, and no other rollout actor could give it weights "
                    f"{version}",
                    fix="the run goes on from its last checkpoint; with rollouts.transport=object_store no "
                    "other actor is needed",
                )
            try:
                ray.get(self.actors[index].load.remote(version, references), timeout=limit)
                return None
            except RayError as error:
                failure = translate(error, self._who(index), "load")
                if not isinstance(failure, CorruptWeights):
                    return failure
        return failure

    def _dumped(self, version: int, new: int) -> list[Any] | None:
        """References to a version from the first other actor that holds it: first it ends its chunk."""
        for index, actor in enumerate(self.actors):
            if index != new:
                try:
                    references = ray.get(
                        actor.dump.remote(version, self.shared.plans),
                        timeout=self.deadlines.verb_s + self.deadlines.of("dump"),
                    )
                except (RayActorError, GetTimeoutError):
                    continue  # its own thread finds that out and replaces it
                if references is not None:
                    return references
        return None

    def _who(self, index: int) -> str:
        return f"{self.name}-{index}"

    def _new(self, index: int) -> Any:
        assert self.placement is not None
        cpus, gpus = self.recipe.rollouts.cpus_per_worker, self.recipe.rollouts.gpus
        share = Share(cpus, gpus, self.placement.threads(index, cpus, gpus))
        log = str(self.logs / f"{self._who(index)}.log") if self.logs else None
        return self.placement.start(
            RolloutActor, index, index, log, share.threads, name=self._who(index), share=share
        )

    def _built(self, index: int, building: Any) -> int:
        """Waits until the actor's engine is built; its process id."""
        limit = self.deadlines.start_s + self.deadlines.of("build") - self.deadlines.verb_s
        try:
            return int(ray.get(building, timeout=limit))
        except GetTimeoutError:
            raise WorkerLost(
                f"{self._who(index)} was not ready within {limit:.0f} s", fix="raise rollouts.start_timeout_s"
            ) from None
        except (RayTaskError, RayActorError) as error:
            raise translate(error, self._who(index), "build") from error


def _start_s(recipe: Recipe) -> float:
    """Seconds for an engine to be built, what its bytes take not counted."""
    rollouts = recipe.rollouts
    if rollouts.start_timeout_s is not None:
        return rollouts.start_timeout_s
    return VLLM_START_S if rollouts.engine == "vllm" and rollouts.gpus else recipe.learners.start_timeout_s
