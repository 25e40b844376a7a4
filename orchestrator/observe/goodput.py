"""`attempts.jsonl`: the time of each start of a run. It gives restarts and goodput, the share of time in
steps."""

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from orchestrator.core.files import read_lines, write_atomically
from orchestrator.observe.metrics import step_seconds


class StartLog:
    """The starts of one run, over all processes. clock: seconds since 1970, comparable between processes."""

    def __init__(self, run_dir: Path, clock: Callable[[], float] = time.time) -> None:
        self._dir, self._clock = run_dir, clock
        self._productive = 0.0
        self.starts: tuple[float, ...] = ()

    def begin(self, step: int) -> None:
        """Adds a start that resumes from `step`. metrics.jsonl must have been cut back to that step."""
        path, metrics = self._dir / "attempts.jsonl", self._dir / "metrics.jsonl"
        lines = read_lines(path) if path.is_file() else []
        lines.append({"started": self._clock(), "step": step})
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in lines))
        self.starts = tuple(line["started"] for line in lines)
        self._productive = sum(map(step_seconds, read_lines(metrics))) if metrics.is_file() else 0.0

    def after(self, metrics: Mapping[str, float]) -> dict[str, float]:
        """Metrics that are added to a step's line. Steps that were lost and computed again are productive
        once."""
        self._productive += step_seconds(metrics)
        elapsed = max(self._clock() - self.starts[0], self._productive)
        return {
            "perf/goodput": self._productive / max(1e-9, elapsed),
            "perf/elapsed_s": elapsed,
            "faults/restarts": len(self.starts) - 1,
        }
