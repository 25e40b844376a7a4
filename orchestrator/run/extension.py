"""A run that is to end elsewhere than it began to: longer, by run.max_steps or run.epochs.

steps done, rates under the end then and the end now --other_rates--> None: the same run, only longer      text: what would differ
"""

from dataclasses import dataclass

from orchestrator.algorithms.schedule import learning_rate
from orchestrator.recipe.schema import Optimizer


@dataclass(frozen=True, slots=True)
class End:
    """Where a run ends. loop_steps: what run.max_steps counts; each: optimizer steps of one; allowed: the
    user asked for another end although it changes the learning rate's schedule."""

    optimizer: Optimizer
    loop_steps: int
    each: int = 1
    allowed: bool = False

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, which the schedule counts."""
        return self.loop_steps * self.each

    def other_rates(self, done: int, then: int) -> str | None:
        """What differs where `done` steps of the loop were taken in a run of `then` optimizer steps; None
        where each had the same learning rate as in this one, so that the longer run is the same as one that
        began like that."""
        taken, total = done * self.each, self.steps
        differing = [
            s
            for s in range(taken)
            if learning_rate(self.optimizer, s, then) != learning_rate(self.optimizer, s, total)
        ]
        if not differing:
            return None
        last = taken - 1
        rates = (
            f"{learning_rate(self.optimizer, last, then):.3g}, in a run of {total} steps it has "
            f"{learning_rate(self.optimizer, last, total):.3g}"
        )
        return (
            f"{len(differing)} of the {taken} optimizer steps that are done had another learning rate: "
            f"the last one {rates}"
        )
