"""A Chrome trace of the first steps: chrome://tracing or ui.perfetto.dev shows in trace.json which part of a
run waits for which."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orchestrator.core.files import write_atomically
from orchestrator.core.rollouts import Span


class Timeline:
    """Collects the spans of the first `steps` steps, and writes them to `path` after each step."""

    def __init__(self, path: Path, steps: int = 5) -> None:
        self.path, self.remaining = path, steps
        self._events: list[dict[str, Any]] = []
        self._origin: float | None = None

    def step(self, step: int, phases: Sequence[tuple[str, float, float]], actors: Sequence[Span]) -> None:
        """Adds a step. phases: (name, start, end) of the controller; actors: spans of the rollout actors.
        Times are seconds of time.perf_counter."""
        if self.remaining <= 0:
            return
        self.remaining -= 1
        if self._origin is None:
            self._origin = min(start for _, start, _ in phases)
        for name, start, end in phases:
            self._add(name, "controller and learners", start, end, {"step": step})
        for span in (s for s in actors if s.end > s.start):
            self._add("rollouts", f"rollout-{span.actor}", span.start, span.end, {"version": span.version})
        write_atomically(self.path, json.dumps({"traceEvents": self._events, "displayTimeUnit": "ms"}))

    def _add(self, name: str, row: str, start: float, end: float, arguments: dict[str, int]) -> None:
        assert self._origin is not None
        place = {"pid": "run", "tid": row, "ts": (start - self._origin) * 1e6, "dur": (end - start) * 1e6}
        self._events.append({"name": name, "ph": "X", "args": arguments, **place})
