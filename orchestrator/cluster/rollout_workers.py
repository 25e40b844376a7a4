"""Rollout actors and the pool that hands out their work.

    start(prompts) --cut into chunks--> one queue --a thread per actor takes the next chunk--> actor: weights, then groups

An actor that has time takes the next chunk, so a long tail idles nobody. Chunks keep the order of their batches, and every
chunk names the weight version it is sampled with: an actor loads that version before its first chunk of it, or was given it
while nothing else was under way (broadcast, CUDA IPC). Seeds belong to samples, so neither the number of actors nor the death
of one changes a rollout.
"""

import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from orchestrator import faults
from orchestrator.cluster.placement import Demand, Placement
from orchestrator.cluster.workers import device_name, redirect_output, translate, worker_environment
from orchestrator.config import Recipe
from orchestrator.episodes import Prompt, RolloutGroup, Sampling, Span
from orchestrator.errors import ConfigError, OrchestratorError, WorkerLost
from orchestrator.models.buckets import Bucket, BucketPlan, Channel, CorruptWeights, Meeting, check, join

Work = Sequence[tuple[int, Prompt]]
SENDS = 3
"""Times that damaged weights are sent before the run gives up."""


class RolloutActor:
    """One process that generates. Weights come as references into the object store, through a channel, or bucket by bucket."""

    def __init__(self, index: int, log: str | None, threads: int) -> None:
        if log is not None:
            redirect_output(Path(log))
        torch.set_num_threads(threads)
        self.index = index
        self.device = torch.device("cuda" if ray.get_gpu_ids() else "cpu")
        self.worker: Any = None
        self.channel: Channel | None = None
        self.plans: Sequence[BucketPlan] = ()

    def build(self, recipe: Recipe) -> int:
        from orchestrator.rollout.generator import RolloutWorker

        self.worker = RolloutWorker(recipe, self.device)
        return os.getpid()

    def roll_out(self, work: Work, sampling: Sampling, version: int, references: list[Any]) -> tuple[RolloutGroup, ...]:
        """Groups for `work` with weights `version`; takes them from `references`, if any, where it holds another version."""
        if self.worker.engine.version != version:
            if not references:
                raise WorkerLost(
                    f"rollout-{self.index} was asked to roll out weights {version}, it holds {self.worker.engine.version}",
                    fix="the run goes on from its last checkpoint; if it repeats, this is a bug",
                )
            self.load(version, references)
        faults.inject("roll_out", step=version, rank=self.index)
        return self.worker.roll_out(work, sampling, version)

    def load(self, version: int, references: list[Any]) -> None:
        """Takes a version from the object store."""
        self.worker.engine.load(version, (self._fetched(r, version) for r in references))

    def dump(self, version: int, plans: Sequence[BucketPlan]) -> list[Any] | None:
        """A version as references into the object store, for an actor that has none; None where it is not held, or where the
        engine cannot give it back."""
        receiver = getattr(self.worker.engine, "receiver", None)
        if receiver is None or self.worker.engine.version != version:
            return None
        return [ray.put(bucket) for bucket in receiver.dump(plans)]

    def join_channel(self, meeting: Meeting, plans: Sequence[BucketPlan]) -> None:
        """Becomes member index + 1, which receives buckets as in `plans`."""
        self.channel, self.plans = join(meeting, self.index + 1), plans

    def leave_channel(self) -> None:
        self.channel = None

    def receive(self, version: int) -> None:
        """A version through the channel; CorruptWeights (and no version held) where a bucket is damaged. Receives all of them
        even then: the other members take part in every broadcast."""
        assert self.channel is not None, "join_channel first"
        engine, damaged = self.worker.engine, None
        engine.commit(None)
        buffer = torch.empty(max(p.size for p in self.plans), dtype=torch.uint8, device=self.channel.device)
        for index, plan in enumerate(self.plans):
            flat = buffer[: plan.size]
            expected = self.channel.receive(flat)
            try:
                check(self._on_arrival(flat, version), expected, version, index)
            except CorruptWeights as error:
                damaged = damaged or error
            if damaged is None:
                engine.take(plan.entries, flat)
        engine.commit(version if damaged is None else None)
        if damaged is not None:
            raise damaged

    def take(self, version: int, index: int, plan: BucketPlan, shared: tuple[Any, Any], expected: int, device: str) -> None:
        """One bucket where its sender has it. shared: (function, arguments) that open it here; device: the sender's name for it.
        `commit` makes it the version held."""
        if device != device_name(self.device):
            raise ConfigError(
                f"rollout-{self.index} does not share its learner's device",
                why=f"{device_name(self.device)} against {device}",
                fix="set learners.gpus_per_worker and rollouts.gpus_per_worker to 0.5, or rollouts.transport=object_store",
            )
        if index == 0:
            self.worker.engine.commit(None)
        opened, arguments = shared
        flat = self._on_arrival(opened(*arguments), version)
        check(flat, expected, version, index)
        self.worker.engine.take(plan.entries, flat)
        if self.device.type == "cuda":
            torch.cuda.synchronize()  # the sender uses its buffer again as soon as this returns

    def commit(self, version: int) -> None:
        """All buckets of the version were taken."""
        self.worker.engine.commit(version)

    def call(self, function: Any, *args: Any) -> Any:
        """Runs function(rollout_worker, *args): for checks."""
        return function(self.worker, *args)

    def _fetched(self, reference: Any, version: int) -> Bucket:
        bucket: Bucket = ray.get(reference)
        if faults.inject("weights", step=version, rank=self.index) == "corrupt":
            data = bucket.data.copy()
            data[len(data) // 2] ^= 1
            return Bucket(bucket.entries, data, bucket.checksum)
        return bucket

    def _on_arrival(self, flat: Any, version: int) -> Any:
        if faults.inject("weights", step=version, rank=self.index) == "corrupt":
            flat[len(flat) // 2] ^= 1
        return flat


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
    """What the threads share, under one lock. offers: weight version -> references to its buckets, none where the actors hold
    it already; plans: how its buckets are cut then."""

    queue: deque[_Chunk] = field(default_factory=deque)
    running: dict[int, _Chunk] = field(default_factory=dict)
    offers: dict[int, list[Any]] = field(default_factory=dict)
    plans: Sequence[BucketPlan] = ()
    spans: list[Span] = field(default_factory=list)
    restarts: int = 0
    closed: bool = False


class RolloutPool:
    """roles.Generator over any number of actors."""

    def __init__(self, recipe: Recipe, *, logs: Path | None = None, colocated: Placement | None = None) -> None:
        """colocated: the learners' placement, whose bundle i holds room for actor i."""
        self.recipe, self.logs = recipe, logs
        rollouts = recipe.rollouts
        demand = Demand("rollouts", rollouts.workers, rollouts.cpus_per_worker, rollouts.gpus_per_worker)
        self.own = None if colocated is not None else Placement.reserve(demand, recipe.learners.start_timeout_s)
        self.placement = colocated or self.own
        self.shared, self.changed = _Shared(), threading.Condition()
        self.actors: list[Any] = [self._new(i) for i in range(rollouts.workers)]
        self.pids = [self._built(i) for i in range(rollouts.workers)]
        self.threads = [threading.Thread(target=self._serve, args=(i,), name=f"rollout-{i}", daemon=True) for i in range(rollouts.workers)]
        for thread in self.threads:
            thread.start()

    def start(self, prompts: Work, sampling: Sampling, version: int) -> PendingGroups:
        """Queues a group for each (draw, prompt) and returns at once."""
        pending = PendingGroups(len(prompts), self)
        size = self._chunk_size(len(prompts), sampling.samples)
        with self.changed:
            if version not in self.shared.offers:
                raise WorkerLost(f"weights {version} were never published", fix="this is a bug: publish before start")
            for first in range(0, len(prompts), size):
                at = range(first, min(first + size, len(prompts)))
                self.shared.queue.append(_Chunk(pending, at, [prompts[i] for i in at], sampling, version))
            self.changed.notify_all()
        return pending

    def wait_until_idle(self) -> None:
        """Waits until everything that was started is done. Every chunk has its own deadline, so this ends."""
        with self.changed:
            while self.shared.queue or self.shared.running:
                self.changed.wait()

    def offer(self, version: int, references: list[Any], plans: Sequence[BucketPlan] = ()) -> None:
        """Makes a weight version available; versions that no chunk asks for any more are forgotten. No references: all actors
        hold it, in buckets cut as in `plans`."""
        with self.changed:
            self.shared.plans = plans
            needed = {c.version for c in (*self.shared.queue, *self.shared.running.values())}
            self.shared.offers = {v: r for v, r in self.shared.offers.items() if v in needed} | {version: references}

    def wait(self, pending: PendingGroups) -> tuple[RolloutGroup, ...]:
        """The groups of one start(). Every chunk has its own deadline, so this ends."""
        with self.changed:
            while pending.failure is None and any(g is None for g in pending.groups):
                self.changed.wait()
        if pending.failure is not None:
            raise pending.failure
        return tuple(g for g in pending.groups if g is not None)

    def spans(self) -> list[Span]:
        """When the actors worked since the last call."""
        with self.changed:
            spans, self.shared.spans = self.shared.spans, []
        return spans

    def call(self, function: Any, *args: Any) -> list[Any]:
        """function(rollout_worker, *args) on every actor."""
        return [ray.get(a.call.remote(function, *args), timeout=self.recipe.rollouts.timeout_s) for a in self.actors]

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
        if self.own is not None:
            self.own.release()

    def __enter__(self) -> "RolloutPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _chunk_size(self, prompts: int, samples: int) -> int:
        """Prompts of a chunk: all for one actor, which refills its rows itself; else so many that each actor gets two or more
        chunks, but no fewer rows than fit at once where the batch allows it."""
        workers = self.recipe.rollouts.workers
        if workers == 1:
            return max(1, prompts)
        return max(1, min(-(-prompts // (2 * workers)), max(1, self.recipe.rollouts.rows_at_once // samples)))

    def _serve(self, index: int) -> None:
        """The thread of one actor: takes chunks until the pool closes."""
        while True:
            with self.changed:
                while not self.shared.queue and not self.shared.closed:
                    self.changed.wait()
                if self.shared.closed:
                    return
                chunk = self.shared.queue.popleft()
                references = self.shared.offers[chunk.version]
                self.shared.running[index] = chunk
            groups, failure = self._run(index, chunk, references)
            with self.changed:
                del self.shared.running[index]
                if groups is not None:
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
        started = time.perf_counter()
        try:
            reference = self.actors[index].roll_out.remote(chunk.work, chunk.sampling, chunk.version, references)
            groups = tuple(ray.get(reference, timeout=self.recipe.rollouts.timeout_s))
        except RayTaskError as error:
            chunk.sends += 1
            if isinstance(error.cause, CorruptWeights) and chunk.sends < SENDS:
                return None, None
            return None, translate(error, f"rollout-{index}", "roll_out")
        except RayError as error:  # the actor died or is late, or its answer was lost with its node
            failure = self.replace(index, late=isinstance(error, GetTimeoutError), why=str(error))
            return None, failure or (None if references else self._hand_over(index, chunk.version))
        with self.changed:
            self.shared.spans.append(Span(index, started, time.perf_counter(), chunk.version))
        return groups, None

    def replace(self, index: int, *, late: bool, why: str) -> OrchestratorError | None:
        """A new actor, without weights, in place of one that died or is late; what ends the run where that happened too often."""
        with self.changed:
            if self.shared.closed:
                return None
            self.shared.restarts += 1
            restarts = self.shared.restarts
        said = f"did not answer within {self.recipe.rollouts.timeout_s:.0f} s" if late else "died"
        if restarts > self.recipe.rollouts.max_restarts:
            return WorkerLost(
                f"rollout-{index} {said}, and {restarts - 1} rollout actors were replaced already",
                why=why.strip().splitlines()[0] if why.strip() else "no answer",
                fix="see logs/ in the run folder; raise rollouts.timeout_s if answers really take longer",
            )
        ray.kill(self.actors[index])
        try:
            self.actors[index] = self._new(index)
            self.pids[index] = self._built(index)
        except OrchestratorError as failure:
            return failure
        return None

    def _hand_over(self, index: int, version: int) -> OrchestratorError | None:
        """Gives a new actor the version that the others were given before it came; what ends the run where that fails."""
        if self.shared.closed:
            return None
        limit, failure = self.recipe.rollouts.timeout_s, None
        for _ in range(SENDS):
            references = self._dumped(version, index)
            if references is None:
                return WorkerLost(
                    f"rollout-{index} was replaced, and no other rollout actor could give it weights {version}",
                    fix="the run goes on from its last checkpoint; with rollouts.transport=object_store no other actor is needed",
                )
            try:
                ray.get(self.actors[index].load.remote(version, references), timeout=limit)
                return None
            except RayError as error:
                failure = translate(error, f"rollout-{index}", "load")
                if not isinstance(failure, CorruptWeights):
                    return failure
        return failure

    def _dumped(self, version: int, new: int) -> list[Any] | None:
        """References to a version from the first other actor that holds it: first it ends its chunk."""
        for index, actor in enumerate(self.actors):
            if index != new:
                try:
                    references = ray.get(actor.dump.remote(version, self.shared.plans), timeout=2 * self.recipe.rollouts.timeout_s)
                except (RayActorError, GetTimeoutError):
                    continue  # its own thread finds that out and replaces it
                if references is not None:
                    return references
        return None

    def _new(self, index: int) -> Any:
        rollouts = self.recipe.rollouts
        threads = max(1, int(rollouts.cpus_per_worker))
        assert self.placement is not None
        kind = self.placement.actor(
            RolloutActor,
            index,
            name=f"rollout-{index}",
            environment=worker_environment(threads),
            cpus=rollouts.cpus_per_worker,
            gpus=rollouts.gpus_per_worker,
        )
        return kind.remote(index, str(self.logs / f"rollout-{index}.log") if self.logs else None, threads)

    def _built(self, index: int) -> int:
        """Builds the actor's engine; its process id."""
        seconds = self.recipe.learners.start_timeout_s
        try:
            return int(ray.get(self.actors[index].build.remote(self.recipe), timeout=seconds))
        except GetTimeoutError:
            raise WorkerLost(f"rollout-{index} was not ready within {seconds:.0f} s", fix="raise learners.start_timeout_s") from None
        except (RayTaskError, RayActorError) as error:
            raise translate(error, f"rollout-{index}", "build") from error
