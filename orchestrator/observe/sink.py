"""What a sink is: the console, metrics.jsonl, wandb and Ray's gauges take the same reports."""

from collections.abc import Callable
from typing import Protocol

from orchestrator.core.reports import EvaluationReport, StepReport
from orchestrator.observe.alerts import Alert

Note = Callable[[str], None]


class Sink(Protocol):
    """Takes every report of one run. open() comes first and close() last; both may say something by `note`.

    alert(): is told as a note too; what a sink does beyond that. failed: an error ended the run, or this
    attempt at it.
    """

    def open(self, note: Note) -> None: ...
    def step(self, report: StepReport) -> None: ...
    def evaluation(self, report: EvaluationReport) -> None: ...
    def note(self, message: str) -> None: ...
    def alert(self, alert: Alert) -> None: ...
    def close(self, *, failed: bool = False) -> None: ...
