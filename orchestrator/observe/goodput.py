"""`attempts.jsonl`: when a run was started, each time. It says how often, and which share of the time went
into steps."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from orchestrator.core.files import read_lines, write_atomically
from orchestrator.observe.metrics import step_seconds


class StartLog:
    """The starts of one run, over all processes. clock: seconds since 1970, which outlives the process."""

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.time) -> None:
        self._dir, self._clock = run_dir, clock
        self._productive = 0.0
        self.starts: tuple[float, ...] = ()

    def begin(self, step: int) -> None:
        """Adds a start that goes on from `step`. metrics.jsonl must have been cut back to it."""
        path, metrics = self._dir / "attempts.jsonl", self._dir / "metrics.jsonl"
        known = read_lines(path) if path.is_file() else []
        known.append({"started": self._clock(), "step": step})
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in known))
        self.starts = tuple(line["started"] for line in known)
        self._productive = sum(map(step_seconds, read_lines(metrics))) if metrics.is_file() else 0.0

    def after(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """What a step's line has of this. Steps that were lost and played again count once, as all that is
        not in a step does."""
        self._productive += step_seconds(metrics)
        elapsed = max(self._clock() - self.starts[0], self._productive)
        return {
            "perf/goodput": self._productive / max(1e-9, elapsed),
            "perf/elapsed_s": elapsed,
            "faults/restarts": len(self.starts) - 1,
        }
