"""How long anything on the cluster is waited for.

A verb of the workers has what the recipe allows, and beyond it the time that the verb's bytes take at a slow
rate. The doctor's deadlines are in doctor/deadlines.py, those of a dashboard in submit/ray_jobs.py.
"""

import time
from dataclasses import dataclass, field

SLOW_RATE = 100e6
"""Bytes per second that storage and network always have, all workers together: a shared disk behind one
gigabit link."""
COLLECTIVE_GRACE_S = 60.0
"""Time by which a collective outlives the driver's own deadline: the driver's message names the late worker,
NCCL's abort does not."""
ROOT_CAUSE_S = 2.0
"""Time in which another rank may report the failure that caused the first one."""
POLL_S = 5.0
"""Time between two checks of the actors' threads while rollouts are awaited."""
VLLM_START_S = 900.0
"""Start of vLLM on a GPU: it compiles the model and captures its graphs, minutes on a cold cache."""
REWARD_LOAD_S = 600.0
"""Placement of a reward model's actor and load of its weights."""
REWARD_GRACE_S = 5.0
"""Time on top of a deadline that a reward's actor keeps itself."""
NAME_FREE_S = 60.0
"""Time until the name of a killed actor is free again. If its node is lost, Ray has to notice that first."""
HEAD_ANSWER_S = 5.0
"""Answer of a cluster's head to a first packet. Ray itself would wait a quarter of an hour."""
RESTART_WINDOW_S = 3600.0
"""Restarts count for an hour, and for as long as the run has made no progress since."""
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
"""Bytes that a verb reads or writes per parameter, at most: 4 for a parameter in fp32, 12 for the master
weight with Adam's two moments. Other verbs move little, or nothing beyond the device."""


def transfer_seconds(size: int) -> float:
    """Seconds that `size` bytes take at SLOW_RATE."""
    return size / SLOW_RATE


@dataclass(frozen=True, slots=True)
class Deadlines:
    """Deadlines of a group of workers.

    Example: 8e9 parameters and 600 s give forward_backward 600 s, save_state 600 + 8e9 * 12 / 100e6 = 1560 s.
    """

    start_s: float
    """Seconds until a worker has started: the recipe's start_timeout_s."""
    verb_s: float
    """Seconds for a verb that moves no state: the recipe's timeout_s."""
    parameters: int = 0
    """Parameters of the model."""

    def of(self, verb: str) -> float:
        """Seconds within which every worker has to answer."""
        return self.verb_s + transfer_seconds(PER_PARAMETER.get(verb, 0) * self.parameters)

    @property
    def collective_s(self) -> float:
        """Timeout of NCCL and gloo: later than every deadline of the driver, so that the driver reports
        first."""
        return max(self.start_s, *(self.of(verb) for verb in PER_PARAMETER)) + COLLECTIVE_GRACE_S


@dataclass(slots=True)
class Restarts:
    """Counts restarts, so that a week may have any number of lost hosts, and a loop of failures ends.

    A restart counts for an hour, and for as long as the run has made no progress since, however slow a start
    is.
    """

    limit: int
    """Restarts that may count at the same time."""
    window_s: float = RESTART_WINDOW_S
    counted: list[tuple[float, int]] = field(default_factory=list)
    """(time of a restart, progress mark at that time)."""

    def add(self, reached: int) -> int:
        """Counts one more restart and returns how many count now; more than `limit` are too many.

        reached: a mark that only progress moves, such as the step of the last checkpoint.
        """
        now = time.monotonic()
        self.counted = [
            (when, mark) for when, mark in self.counted if now - when <= self.window_s or mark == reached
        ]
        self.counted.append((now, reached))
        return len(self.counted)
