"""What follows the steps of a loop: checkpoints and evaluations where they are due, and the end that a signal
asks for.

    step --due, last, asked--> checkpoint --due, last--> evaluation --asked--> Interrupted
                                                             ^
    resumed ---- its step is due and has none on record -----+

The checkpoint comes first, so that nothing is lost where an evaluation is interrupted; the run that goes on
from it makes up for it.
"""

import time
from collections.abc import Callable
from typing import Protocol

from orchestrator.core.errors import Interrupted
from orchestrator.core.reports import Progress
from orchestrator.core.roles import Checkpoints
from orchestrator.core.stopping import Stop


class Cadence(Protocol):
    """The part of a loop's plan that says when, in its own steps. save_after_s: seconds since the last
    checkpoint; evaluated: the step that the run goes on from has its evaluation on record."""

    @property
    def total_steps(self) -> int: ...
    @property
    def evaluate_every(self) -> int | None: ...
    @property
    def evaluate_at_start(self) -> bool: ...
    @property
    def save_every(self) -> int | None: ...
    @property
    def save_after_s(self) -> float | None: ...
    @property
    def evaluated(self) -> bool: ...


class AfterSteps:
    """Evaluates, saves and stops for one loop. clock: seconds."""

    def __init__(
        self,
        plan: Cadence,
        evaluate: Callable[[int], None],
        checkpoints: Checkpoints,
        stop: Stop,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan, self.evaluate, self.checkpoints, self.stop, self.clock = (
            plan,
            evaluate,
            checkpoints,
            stop,
            clock,
        )
        self.saved_at, self.saved_step = clock(), -1

    def begin(self, progress: Progress) -> None:
        """Before the first step of an attempt: the evaluation of the start weights, or the one that an
        interrupted run owes."""
        self.saved_at, self.saved_step = self.clock(), progress.step
        fresh = progress.step == 0 and progress.examples == 0
        if (fresh and self.plan.evaluate_at_start) or (
            progress.step > 0 and not self.plan.evaluated and self._evaluation_due(progress.step)
        ):
            self._evaluate(progress)
        if self.stop() and progress.step < self.plan.total_steps:
            self._end(progress)

    def step(self, progress: Progress) -> None:
        """After a step; Interrupted where a signal asked for it and there are steps to go, with a checkpoint
        of this one."""
        if self._save_due(progress.step) or self.stop():
            self._save(progress)
        if self._evaluation_due(progress.step):
            self._evaluate(progress)
        if self.stop() and progress.step < self.plan.total_steps:
            self._end(progress)

    def _save_due(self, step: int) -> bool:
        after = self.plan.save_after_s
        return (
            _due(self.plan.save_every, step)
            or step == self.plan.total_steps
            or (after is not None and self.clock() - self.saved_at >= after)
        )

    def _evaluation_due(self, step: int) -> bool:
        return _due(self.plan.evaluate_every, step) or step == self.plan.total_steps

    def _save(self, progress: Progress) -> None:
        if self.saved_step != progress.step:
            self.checkpoints.save(progress)
            self.saved_at, self.saved_step = self.clock(), progress.step

    def _evaluate(self, progress: Progress) -> None:
        try:
            with self.stop.immediate(f"evaluating step {progress.step}"):
                self.evaluate(progress.step)
        except KeyboardInterrupt:
            if not self.stop.asked_once:
                raise
            self._end(progress)

    def _end(self, progress: Progress) -> None:
        if progress.step > 0:
            self._save(progress)
        said = (
            "; a checkpoint was written"
            if progress.step > 0
            else ", before the first one: there is nothing to save yet"
        )
        what = f"stopped by request after step {progress.step} of {self.plan.total_steps}{said}"
        raise Interrupted(what, fix="run the same command again to go on")


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
