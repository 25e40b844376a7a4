"""The Sink protocol: the console, metrics.jsonl, wandb and Ray's gauges get the same reports."""

from collections.abc import Callable
from typing import Protocol

from orchestrator.core.reports import EvaluationReport, StepReport
from orchestrator.observe.alerts import Alert

Note = Callable[[str], None]


class Sink(Protocol):
    """Gets every report of one run, between one open() and one close()."""

    def open(self, note: Note) -> None:
        """note: prints a line, now or later."""
        ...

    def step(self, report: StepReport) -> None: ...
    def evaluation(self, report: EvaluationReport) -> None: ...
    def note(self, message: str) -> None: ...

    def alert(self, alert: Alert) -> None:
        """Every alert is also sent as a note."""
        ...

    def close(self, *, failed: bool = False) -> None:
        """failed: an error ended the run, or this start of it."""
        ...
