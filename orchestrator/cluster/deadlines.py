"""How long the workers may take for a verb: what the recipe allows, and the time that the verb's bytes take
at a slow rate."""

import time
from dataclasses import dataclass, field

SLOW = 100e6
"""Bytes per second that storage and network always have, all workers together: a shared disk behind one
gigabit link."""
GRACE_S = 60.0
"""That a collective may take longer than the driver waits: the driver's message names who is late, NCCL's
abort does not."""
WINDOW_S = 3600.0
"""Restarts are counted over the last hour, and for as long as nothing has been reached since."""
PER_PARAMETER = {
    "build": 4,
    "build_reference": 4,
    "save_state": 12,
    "load_state": 12,
    "export": 4,
    "put_buckets": 4,
    "broadcast_buckets": 4,
    "load": 4,
    "dump": 4,
}
"""Bytes that a verb reads or writes, at most: a parameter in fp32, or the master weight with Adam's two
moments. Other verbs move little, or nothing beyond the device."""


def seconds(size: int) -> float:
    """That so many bytes take at a slow rate."""
    return size / SLOW


@dataclass(frozen=True, slots=True)
class Deadlines:
    """start_s, verb_s: the recipe's start_timeout_s and timeout_s of a worker; parameters: of the model.

    Example: 8e9 parameters and 600 s give forward_backward 600 s, save_state 600 + 8e9 * 12 / 100e6 = 1560 s.
    """

    start_s: float
    verb_s: float
    parameters: int = 0

    def of(self, verb: str) -> float:
        """Seconds within which every worker has to answer."""
        return self.verb_s + seconds(PER_PARAMETER.get(verb, 0) * self.parameters)

    @property
    def collective_s(self) -> float:
        """Of NCCL and gloo themselves: after every deadline of the driver, so that the driver speaks first."""
        return max(self.start_s, *(self.of(verb) for verb in PER_PARAMETER)) + GRACE_S


@dataclass(slots=True)
class Restarts:
    """How often something was started again. limit: of those that count: the ones of the last hour, and the
    ones since which nothing was reached, however slow a start is. So a week may have any number of lost
    hosts, and a loop ends."""

    limit: int
    window_s: float = WINDOW_S
    counted: list[tuple[float, int]] = field(default_factory=list)

    def add(self, reached: int) -> int:
        """Counts one more, at a mark that only progress moves; how many count now. Beyond `limit` there
        should be no other."""
        now = time.monotonic()
        self.counted = [
            (when, mark) for when, mark in self.counted if now - when <= self.window_s or mark == reached
        ]
        self.counted.append((now, reached))
        return len(self.counted)
