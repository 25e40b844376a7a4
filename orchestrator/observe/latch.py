"""Parts of alert rules: a latch that fires once per cause, and running means."""

from collections import deque
from collections.abc import Sequence


class Latch:
    """True once, when a condition has held for `holds` checks in a row.

    It can fire again only after the condition was false for `rests` checks in a row.
    """

    def __init__(self, holds: int, rests: int) -> None:
        self._holds, self._rests = holds, rests
        self._fired, self._run = False, 0

    def __call__(self, condition: bool) -> bool:
        self._run = self._run + 1 if condition != self._fired else 0
        if self._run < (self._rests if self._fired else self._holds):
            return False
        self._fired, self._run = not self._fired, 0
        return self._fired


class RunningMean:
    """Mean of all values so far."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def after(self, value: float) -> float:
        self._sum, self._count = self._sum + value, self._count + 1
        return self._sum / self._count


def mean(values: Sequence[float] | deque[float]) -> float:
    return sum(values) / len(values)
