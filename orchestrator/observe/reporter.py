"""The controllers' Reporter: hands every report to all sinks and keeps a log of notes."""

from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

from orchestrator.observe.sinks import Sink
from orchestrator.records import EvaluationReport, StepReport


class RunReporter:
    """Implements roles.Reporter. log: file that gets each note with its time in UTC; the sinks get it too."""

    def __init__(self, sinks: Sequence[Sink], log: Path) -> None:
        self._sinks = sinks
        self._open: list[Sink] = []
        self._cleanup = ExitStack()
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = self._cleanup.enter_context(log.open("a", encoding="utf-8", errors="backslashreplace"))
        try:
            for sink in sinks:
                sink.open(self.note)
                # closed last to first and each one even if another fails: a late note of wandb still finds the console
                self._cleanup.callback(self._shut, sink)
                self._open.append(sink)
        except BaseException:
            self._cleanup.close()
            raise

    def step(self, report: StepReport) -> None:
        for sink in self._sinks:
            sink.step(report)

    def evaluation(self, report: EvaluationReport) -> None:
        for sink in self._sinks:
            sink.evaluation(report)

    def note(self, message: str) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._log.write(f"{now} {message}".replace("\n", "\n    ") + "\n")
        self._log.flush()
        for sink in self._open:
            sink.note(message)

    def close(self) -> None:
        """Closes every sink; a second call does nothing."""
        self._cleanup.close()

    def _shut(self, sink: Sink) -> None:
        try:
            sink.close()
        finally:
            self._open.remove(sink)
