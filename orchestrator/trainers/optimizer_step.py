"""One optimizer step, whoever asks for it: learn, guard, apply.

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
"""Adds the reference log-probs to a batch: from the cache, live, or (reference-free losses) not at all."""


@dataclass(slots=True)
class Clock:
    """Seconds per phase of the current step; spans: (phase, start, end) in seconds of time.perf_counter."""

    phases: dict[str, float] = field(default_factory=dict)
    spans: list[tuple[str, float, float]] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        ended = time.perf_counter()
        self.phases[name] = self.phases.get(name, 0.0) + ended - started
        self.spans.append((name, started, ended))


@dataclass(frozen=True, slots=True)
class Guards:
    """What a step is checked against. first_loss_tolerance: how far the first loss may be from the
    algorithm's anchor, relative to it where it is above 1, None: not checked. gradient_bytes: of one whole
    reduction, 0 with one worker. precision: the learner's."""

    first_loss_tolerance: float | None = None
    gradient_bytes: int = 0
    max_skipped_in_a_row: int = 5
    precision: str = "fp32"


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """A step's outcome. applied is None where a non-finite loss or gradient was refused: then nothing
    advanced."""

    batch: PackedBatch
    learned: LearnReport
    applied: StepApplied | None


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
        """One step over `groups`. step: optimizer steps taken before it. Diverged after too many refusals in
        a row."""
        with clock.phase("data"):
            batch = self._cut(groups, kl_coefficient)
        batch, learned = self._learn(batch, step, clock)
        if step == 0:
            self._check_anchor(learned)
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
        """The gradient of one step; cut finer and replayed when a micro-batch does not fit."""
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
        """Nothing advances but the data cursor; the examples are named, and too many in a row end the run."""
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
        """Compares the gradient bytes of the first step with the plan's: a reduction too many costs time, one
        too few would be a wrong result."""
        if self.traffic_checked:
            return
        self.traffic_checked = True
        reductions = len(batch.micro_batches[0]) if self.cut.sync == "per_micro_batch" else 1
        expected = self.guards.gradient_bytes * reductions
        if abs(applied.reduced_bytes - expected) > 0.02 * expected:
            self.report.note(
                f"warning: the first step reduced {applied.reduced_bytes:,} bytes per worker, the plan says "
                f"{expected:,} ({self.cut.sync}); "
                "run `orchestrator verify` before trusting the result"
            )

    def _check_anchor(self, learned: LearnReport) -> None:
        """At step 0 policy == reference, so the loss is known in closed form: ln 2 for DPO. Catches stale
        caches."""
        anchor, tolerance = self.algorithm.loss_at_reference, self.guards.first_loss_tolerance
        if anchor is None or tolerance is None or not math.isfinite(learned.loss):
            return
        if abs(learned.loss - anchor) > tolerance * max(1.0, abs(anchor)):
            raise ConfigError(
                f"the first loss is {learned.loss:.7f}, but policy == reference must give {anchor:.7f}",
                why="the reference log-probs are not those of the start weights: a stale cache, or a model "
                "with random layers",
                fix="remove the reference cache (reference.cache_dir) and start again",
            )


def _largest(batch: PackedBatch) -> int:
    return max(micro_batch.positions for rank in batch.micro_batches for micro_batch in rank)


def _budget(cut: Cut) -> str:
    return f"{cut.examples} examples" if cut.examples is not None else f"{cut.positions} positions"
