"""What follows each step of a loop: checkpoints, evaluations, and the end after a signal.

    step --due, last, signal--> checkpoint --due, last--> evaluation --signal--> Interrupted
                                                              ^
    resumed ---- its step is due and was not evaluated -------+

The checkpoint comes first, so that an interrupted evaluation loses nothing: the run that resumes from the
checkpoint evaluates it then.
"""

import time
from collections.abc import Callable
from typing import Protocol

from orchestrator.core.errors import Interrupted
from orchestrator.core.reports import Progress
from orchestrator.core.roles import Checkpoints
from orchestrator.core.stopping import Stop


class Cadence(Protocol):
    """The schedule in a loop's plan, in the loop's own steps."""

    @property
    def total_steps(self) -> int: ...
    @property
    def evaluate_every(self) -> int | None: ...
    @property
    def evaluate_at_start(self) -> bool: ...
    @property
    def save_every(self) -> int | None: ...
    @property
    def save_after_s(self) -> float | None:
        """Seconds since the last checkpoint after which the next one is due."""
        ...

    @property
    def evaluated(self) -> bool:
        """The step that the run resumes from was evaluated."""
        ...


class AfterSteps:
    """Evaluates, saves and stops for one loop. clock: returns seconds."""

    def __init__(
        self,
        plan: Cadence,
        evaluate: Callable[[int], None],
        checkpoints: Checkpoints,
        stop: Stop,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.plan, self.evaluate, self.checkpoints = plan, evaluate, checkpoints
        self.stop, self.clock = stop, clock
        self.saved_at, self.saved_step = clock(), -1

    def begin(self, progress: Progress) -> None:
        """Before the first step: evaluates the start weights, or a step whose evaluation was interrupted."""
        self.saved_at, self.saved_step = self.clock(), progress.step
        fresh = progress.step == 0 and progress.examples == 0
        if (fresh and self.plan.evaluate_at_start) or (
            progress.step > 0 and not self.plan.evaluated and self._evaluation_due(progress.step)
        ):
            self._evaluate(progress)
        if self.stop() and progress.step < self.plan.total_steps:
            self._end(progress)

    def step(self, progress: Progress) -> None:
        """After a step: saves and evaluates if due.

        Interrupted, with a checkpoint of this step, if a signal came and steps remain.
        """
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
        saved = "a checkpoint was written" if progress.step > 0 else "there is nothing to save yet"
        raise Interrupted(
            f"stopped by request after step {progress.step} of {self.plan.total_steps}; {saved}",
            fix="run the same command again to resume",
        )


def _due(every: int | None, step: int) -> bool:
    return every is not None and step % every == 0
