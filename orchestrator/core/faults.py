"""The one seam for fault injection: tests and chaos runs name a site, a step and a rank; nothing happens
otherwise.

ORCHESTRATOR_FAULTS holds a JSON list of {"site", "action", "step"?, "rank"?, "once"?}: action is "kill"
(SIGKILL to this process), "oom" (an out-of-memory error), "nan" or "corrupt" (told to the caller), "stop"
(SIGSTOP), "slow" (a second of sleep) or "disk_full". `once` names a marker file: the fault happens only while
the file does not exist, and makes it.
"""

import json
import os
import signal
import time
from pathlib import Path

VARIABLE = "ORCHESTRATOR_FAULTS"


def inject(site: str, *, step: int, rank: int = 0) -> str | None:
    """Carries out the fault planned for this place, if any, and returns the action the caller has to act on."""
    planned = os.environ.get(VARIABLE)
    if not planned:
        return None
    for fault in json.loads(planned):
        if (
            fault["site"] == site
            and fault.get("step", step) == step
            and fault.get("rank", rank) == rank
            and _first(fault)
        ):
            return _act(fault["action"])
    return None


def _first(fault: dict[str, str]) -> bool:
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
