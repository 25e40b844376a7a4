"""Injected faults, for tests and chaos runs: the only place where the code fails on purpose.

ORCHESTRATOR_FAULTS holds a JSON list of faults; without it nothing happens.

    [{"site": "optim_step", "action": "kill", "step": 3, "rank": 1, "once": "/tmp/marker"}]

    step, rank   optional: the fault happens at every step or rank if they are not set
    once         optional: a marker file. The fault creates it, and happens only if it does not exist.
    action       kill (SIGKILL to this process), stop (SIGSTOP), slow (sleeps a second), disk_full (OSError);
                 oom, nan and corrupt are returned to the caller, which acts on them
"""

import json
import os
import signal
import time
from pathlib import Path

VARIABLE = "ORCHESTRATOR_FAULTS"


def inject(site: str, *, step: int, rank: int = 0) -> str | None:
    """Carries out the first fault listed for this site, step and rank. Returns its action, None without
    one."""
    faults = os.environ.get(VARIABLE)
    if not faults:
        return None
    for fault in json.loads(faults):
        if (
            fault["site"] == site
            and fault.get("step", step) == step
            and fault.get("rank", rank) == rank
            and _first(fault)
        ):
            return _act(fault["action"])
    return None


def _first(fault: dict[str, str]) -> bool:
    """False if the marker file shows that the fault has happened."""
    marker = fault.get("once")
    if marker is None:
        return True
    try:
        Path(marker).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _act(action: str) -> str:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if action == "slow":
        time.sleep(1.0)
    if action == "disk_full":
        raise OSError(28, "No space left on device (injected)")
    return action
