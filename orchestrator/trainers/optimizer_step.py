"""One optimizer step of any loop: learn, guard, apply.

groups --cut--> PackedBatch --attach--> forward_backward --guard--> optim_step
          ^                                  |
          +------- finer, after an out-of-memory error: same effective batch
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from orchestrator.algorithms.table import AlgorithmSpec
from orchestrator.core.batches import Cut, PackedBatch, SequenceGroup
from orchestrator.core.errors import ConfigError, Diverged, OutOfMemory
from orchestrator.core.reports import LearnReport, StepApplied
from orchestrator.core.roles import Learner, Reporter
from orchestrator.data.micro_batches import cut_step
from orchestrator.trainers.two_pass import with_coefficients

Attach = Callable[[PackedBatch], PackedBatch]
"""Adds reference log-probs to a batch: from the cache, live, or none for reference-free losses."""


@dataclass(slots=True)
class Clock:
    """Times of the phases of the current step."""

    phases: dict[str, float] = field(default_factory=dict)
    """Seconds of each phase."""
    spans: list[tuple[str, float, float]] = field(default_factory=list)
    """(phase, start, end) in seconds of time.perf_counter."""

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:  # an out-of-memory error takes time too
            ended = time.perf_counter()
            self.phases[name] = self.phases.get(name, 0.0) + ended - started
            self.spans.append((name, started, ended))


@dataclass(frozen=True, slots=True)
class Guards:
    """Limits that a step is checked against."""

    first_loss_tolerance: float | None = None
    """Largest difference between the first loss and the algorithm's loss_at_reference, relative to the latter
    if it is above 1; None: the first loss is not checked."""
    gradient_bytes: int = 0
    """Bytes of one reduction of the whole gradient; 0 with one worker."""
    max_skipped_in_a_row: int = 5
    """Refused steps in a row after which the run ends."""
    precision: str = "fp32"
    """learners.precision."""


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """The outcome of a step."""

    batch: PackedBatch
    learned: LearnReport
    applied: StepApplied | None
    """None if a non-finite loss or gradient was refused: then nothing advanced."""


class OptimizerStepper:
    """Takes the optimizer steps of one learner. `cut` only ever gets finer, after an out-of-memory error."""

    def __init__(
        self,
        algorithm: AlgorithmSpec,
        learner: Learner,
        cut: Cut,
        attach: Attach,
        report: Reporter,
        guards: Guards,
    ) -> None:
        self.algorithm, self.learner, self.cut = algorithm, learner, cut
        self.attach, self.report, self.guards = attach, report, guards
        self.skipped_in_a_row = 0
        self.traffic_checked = False

    def step(
        self, groups: Sequence[SequenceGroup], step: int, clock: Clock, *, kl_coefficient: float | None = None
    ) -> StepOutcome:
        """One step over `groups`; Diverged after too many refusals in a row. step: optimizer steps so far."""
        with clock.phase("data"):
            batch = self._cut(groups, kl_coefficient)
        batch, learned = self._learn(batch, step, clock)
        if step == 0:
            self._check_first_loss(learned)
        if not math.isfinite(learned.loss):
            self.learner.discard()
            return self._refused(batch, learned, step, "loss")
        with clock.phase("optim"):
            applied = self.learner.optim_step(step)
        if not applied.applied:
            return self._refused(batch, learned, step, "gradient")
        self._check_traffic(batch, applied)
        self.skipped_in_a_row = 0
        return StepOutcome(batch, learned, applied)

    def _cut(self, groups: Sequence[SequenceGroup], kl_coefficient: float | None) -> PackedBatch:
        batch = cut_step(groups, self.cut)
        return (
            batch
            if kl_coefficient is None
            else replace(batch, units=replace(batch.units, kl_coefficient=kl_coefficient))
        )

    def _learn(self, batch: PackedBatch, step: int, clock: Clock) -> tuple[PackedBatch, LearnReport]:
        """The gradient of one step. If a micro-batch does not fit, the step is cut finer and replayed."""
        while True:
            try:
                with clock.phase("reference"):
                    ready = self.attach(batch)
                if not self.algorithm.couples_batch:
                    with clock.phase("forward_backward"):
                        return ready, self.learner.forward_backward(ready, step)
                with clock.phase("first_pass"):
                    ready, whole = with_coefficients(
                        ready, self.learner, self.algorithm, step, self.guards.precision
                    )
                with clock.phase("forward_backward"):
                    return ready, whole.merged_into(self.learner.forward_backward(ready, step))
            except OutOfMemory as error:
                finer = self.cut.halved()
                smaller = cut_step(batch.groups, finer)
                if not error.in_place or _largest(smaller) >= _largest(batch):
                    raise
                self.report.note(
                    f"{error.what}: cutting the step finer ({_budget(finer)}) and replaying it; same "
                    "effective batch"
                )
                self.learner.discard()
                self.cut = finer
                batch = self._cut(batch.groups, batch.units.kl_coefficient)

    def _refused(self, batch: PackedBatch, learned: LearnReport, step: int, what: str) -> StepOutcome:
        """Notes the examples of a refused step; only the data cursor advances. Diverged after too many."""
        ids = sorted(g.id for g in batch.groups)
        self.report.note(f"step {step + 1}: non-finite {what}, no step taken; examples {ids}")
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.guards.max_skipped_in_a_row:
            raise Diverged(
                f"{self.skipped_in_a_row} steps in a row had a non-finite {what}",
                why=f"the last at step {step + 1}, examples {ids[:8]} …",
                fix="lower optimizer.learning_rate, or look at those examples with `orchestrator inspect`",
            )
        return StepOutcome(batch, learned, None)

    def _check_traffic(self, batch: PackedBatch, applied: StepApplied) -> None:
        """Compares the gradient bytes of the first step with the plan's.

        A reduction too many costs time, one too few gives a wrong result.
        """
        if self.traffic_checked:
            return
        self.traffic_checked = True
        reductions = len(batch.micro_batches[0]) if self.cut.sync == "per_micro_batch" else 1
        expected = self.guards.gradient_bytes * reductions
        if abs(applied.reduced_bytes - expected) > 0.02 * expected:
            self.report.note(
                f"warning: the first step reduced {applied.reduced_bytes:,} bytes per worker, the plan "
                f"expects {expected:,} ({self.cut.sync}); run `orchestrator verify` before you trust the "
                "result"
            )

    def _check_first_loss(self, learned: LearnReport) -> None:
        """At step 0 policy == reference, so the loss has a closed form: ln 2 for DPO. Finds stale caches."""
        expected, tolerance = self.algorithm.loss_at_reference, self.guards.first_loss_tolerance
        if expected is None or tolerance is None or not math.isfinite(learned.loss):
            return
        if abs(learned.loss - expected) > tolerance * max(1.0, abs(expected)):
            raise ConfigError(
                f"the first loss is {learned.loss:.7f}, but policy == reference must give {expected:.7f}",
                why="the reference log-probs are not those of the start weights: the cache is stale, or the "
                "model has random layers",
                fix="remove the reference cache (reference.cache_dir) and start again",
            )


def _largest(batch: PackedBatch) -> int:
    return max(micro_batch.positions for rank in batch.micro_batches for micro_batch in rank)


def _budget(cut: Cut) -> str:
    return f"{cut.examples} examples" if cut.examples is not None else f"{cut.positions} positions"
