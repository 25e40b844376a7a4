"""Functions of the caller that see every report of a run."""

from collections.abc import Callable, Sequence

from orchestrator.core.reports import EvaluationReport, StepReport
from orchestrator.observe.alerts import Alert
from orchestrator.observe.sink import Note

Callback = Callable[[StepReport | EvaluationReport], None]
"""Called in the driver with each step's report and each evaluation's, in their order. What it raises ends the
run."""


class CallbackSink:
    """A sink (observe/sink.py) that hands reports to functions."""

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self._callbacks = callbacks

    def open(self, note: Note) -> None: ...

    def step(self, report: StepReport) -> None:
        for callback in self._callbacks:
            callback(report)

    def evaluation(self, report: EvaluationReport) -> None:
        for callback in self._callbacks:
            callback(report)

    def note(self, message: str) -> None: ...

    def alert(self, alert: Alert) -> None: ...

    def close(self, *, failed: bool = False) -> None: ...
