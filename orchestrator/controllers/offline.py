"""The offline loop: SFT, reward models and the preference family.

    batches --cut--> PackedBatch --reference log-probs--> forward_backward --> optim_step --> report, evaluate, save
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from orchestrator.algorithms import Algorithm
from orchestrator.controllers.coupled import with_coefficients
from orchestrator.controllers.evaluation import Evaluator
from orchestrator.cut import cut_step
from orchestrator.data.order import Batches
from orchestrator.errors import ConfigError, Diverged, Interrupted, OutOfMemory
from orchestrator.observe.metrics import Throughput, flatten
from orchestrator.records import Cut, LearnReport, PackedBatch, Progress, StepApplied, StepReport
from orchestrator.roles import Checkpoints, Learner, Reporter

Attach = Callable[[PackedBatch], PackedBatch]
"""Adds the reference log-probs to a batch: from the cache, live, or (reference-free losses) not at all."""


@dataclass(frozen=True, slots=True)
class OfflinePlan:
    """What the loop has to know. anchor_tolerance: how far the first loss may be from
    the algorithm's anchor, relative to it where it is above 1. gradient_bytes: of one whole reduction, 0 with one worker."""

    algorithm: Algorithm
    total_steps: int
    evaluate_every: int | None
    evaluate_at_start: bool
    save_every: int | None
    reference_sync_every: int | None
    reference_sync_alpha: float
    anchor_tolerance: float | None
    gradient_bytes: int
    max_skipped_in_a_row: int = 5


@dataclass(slots=True)
class Clock:
    """Seconds per phase of the current step."""

    phases: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - started


class OfflineTrainer:
    """Runs the loop. `cut` only ever gets finer, after an out-of-memory error."""

    def __init__(
        self,
        plan: OfflinePlan,
        cut: Cut,
        policy: Learner,
        attach_reference: Attach,
        batches: Batches,
        evaluator: Evaluator,
        report: Reporter,
        checkpoints: Checkpoints,
        throughput: Throughput,
        should_stop: Callable[[], bool],
    ) -> None:
        self.plan, self.cut, self.policy = plan, cut, policy
        self.attach_reference, self.batches, self.evaluator = attach_reference, batches, evaluator
        self.report, self.checkpoints = report, checkpoints
        self.throughput, self.should_stop = throughput, should_stop
        self.traffic_checked = False

    def run(self) -> Progress:
        """Trains to the plan's last step and returns where it ended."""
        plan = self.plan
        progress = self.checkpoints.restore()
        if progress.step == 0 and progress.examples == 0 and plan.evaluate_at_start:
            self._evaluate(0)
        skipped_in_a_row = 0
        while progress.step < plan.total_steps:
            clock = Clock()
            with clock.phase("data"):
                groups = self.batches.at(progress.examples)
                batch = cut_step(groups, self.cut)
            batch, learned = self._learn(batch, progress, clock)
            self._check_anchor(progress, learned)
            if not math.isfinite(learned.loss):
                self.policy.discard()
                progress, skipped_in_a_row = self._skip(progress, batch, skipped_in_a_row, "loss")
                continue
            with clock.phase("optim"):
                applied = self.policy.optim_step(progress.step)
            if not applied.applied:
                progress, skipped_in_a_row = self._skip(progress, batch, skipped_in_a_row, "gradient")
                continue
            self._check_traffic(batch, applied)
            progress, skipped_in_a_row = progress.after(batch), 0
            self._after_step(progress, clock)
            self.report.step(StepReport(progress.step, flatten(progress, learned, applied, clock.phases, self.throughput)))
            self._evaluate_and_save(progress)
        return progress

    def _learn(self, batch: PackedBatch, progress: Progress, clock: Clock) -> tuple[PackedBatch, LearnReport]:
        """The gradient of one step; cut finer and replayed when a micro-batch does not fit."""
        while True:
            try:
                with clock.phase("reference"):
                    ready = self.attach_reference(batch)
                if not self.plan.algorithm.couples_batch:
                    with clock.phase("forward_backward"):
                        return ready, self.policy.forward_backward(ready, progress.step)
                with clock.phase("first_pass"):
                    ready, whole = with_coefficients(ready, self.policy, self.plan.algorithm)
                with clock.phase("forward_backward"):
                    return ready, whole.merged_into(self.policy.forward_backward(ready, progress.step))
            except OutOfMemory as error:
                finer = self.cut.halved()
                if not error.in_place or finer == self.cut:
                    raise
                self.report.note(f"{error.what}: cutting the step finer ({_budget(finer)}) and replaying it; same effective batch")
                self.policy.discard()
                self.cut = finer
                batch = cut_step(batch.groups, finer)

    def _after_step(self, progress: Progress, clock: Clock) -> None:
        every = self.plan.reference_sync_every
        if every is not None and progress.step % every == 0:
            with clock.phase("reference"):
                self.policy.sync_reference(self.plan.reference_sync_alpha)

    def _evaluate(self, step: int) -> None:
        report = self.evaluator.evaluate(self.cut, step)
        if report.metrics:  # none without data.eval
            self.report.evaluation(report)

    def _evaluate_and_save(self, progress: Progress) -> None:
        last, stopping = progress.step == self.plan.total_steps, self.should_stop()
        if _due(self.plan.evaluate_every, progress.step) or last:
            self._evaluate(progress.step)
        if _due(self.plan.save_every, progress.step) or last or stopping:
            self.checkpoints.save(progress)
        if stopping and not last:
            raise Interrupted(
                f"stopped by request after step {progress.step} of {self.plan.total_steps}; a checkpoint was written",
                fix="run the same command again to go on",
            )

    def _skip(self, progress: Progress, batch: PackedBatch, in_a_row: int, what: str) -> tuple[Progress, int]:
        """Nothing advances but the data cursor; the examples are named, and too many in a row end the run."""
        ids = sorted(g.id for g in batch.groups)
        self.report.note(f"step {progress.step + 1}: non-finite {what}, no step taken; examples {ids}")
        if in_a_row + 1 >= self.plan.max_skipped_in_a_row:
            raise Diverged(
                f"{in_a_row + 1} steps in a row had a non-finite {what}",
                why=f"the last at step {progress.step + 1}, examples {ids[:8]} …",
                fix="lower optimizer.learning_rate, or look at those examples with `orchestrator inspect`",
            )
        return progress.after_skip(batch), in_a_row + 1

    def _check_traffic(self, batch: PackedBatch, applied: StepApplied) -> None:
        """Compares the gradient bytes of the first step with the plan's: a reduction too many costs time, one too few
        would be a wrong result."""
        if self.traffic_checked:
            return
        self.traffic_checked = True
        reductions = len(batch.micro_batches[0]) if self.cut.sync == "per_micro_batch" else 1
        expected = self.plan.gradient_bytes * reductions
        if abs(applied.reduced_bytes - expected) > 0.02 * expected:
            self.report.note(
                f"warning: the first step reduced {applied.reduced_bytes:,} bytes per worker, the plan says {expected:,} ({self.cut.sync}); "
                "run `orchestrator verify` before trusting the result"
            )

    def _check_anchor(self, progress: Progress, learned: LearnReport) -> None:
        """At step 0 policy == reference, so the loss is known in closed form: ln 2 for DPO. Catches stale caches."""
        anchor, tolerance = self.plan.algorithm.anchor, self.plan.anchor_tolerance
        if anchor is None or tolerance is None or progress.step > 0 or not math.isfinite(learned.loss):
            return
        if abs(learned.loss - anchor) > tolerance * max(1.0, abs(anchor)):
            raise ConfigError(
                f"the first loss is {learned.loss:.7f}, but policy == reference must give {anchor:.7f}",
                why="the reference log-probs are not those of the start weights: a stale cache, or a model with random layers",
                fix="remove the reference cache (reference.cache_dir) and start again",
            )


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0


def _budget(cut: Cut) -> str:
    return f"{cut.examples} examples" if cut.examples is not None else f"{cut.positions} positions"
