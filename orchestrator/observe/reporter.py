"""The trainers' Reporter: hands each report to all sinks and writes a log of notes."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from orchestrator.core.reports import EvaluationReport, StepReport
from orchestrator.observe.alerts import Alert
from orchestrator.observe.sink import Sink
from orchestrator.observe.watch import Watch


class RunReporter:
    """Implements roles.Reporter. As a context it knows whether the run failed.

    log: file that gets each note with its time in UTC, besides the sinks; watch: adds goodput and restarts,
    and finds alerts.
    """

    def __init__(self, sinks: Sequence[Sink], log: Path, watch: Watch | None = None) -> None:
        self._sinks, self._watch = sinks, watch
        self._open: list[Sink] = []
        self._cleanup = ExitStack()
        self._failed = False
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = self._cleanup.enter_context(log.open("a", encoding="utf-8", errors="backslashreplace"))
        try:
            for sink in sinks:
                sink.open(self.note)
                # closed last to first, so that a late note of wandb reaches the console; each one is closed
                # even if another fails
                self._cleanup.callback(self._shut, sink)
                self._open.append(sink)
            if watch is not None:
                self._alert(watch.begin())
        except BaseException:
            self._cleanup.close()
            raise

    def step(self, report: StepReport) -> None:
        alerts: tuple[Alert, ...] = ()
        if self._watch is not None:
            report, alerts = self._watch.step(report)
        for sink in self._sinks:
            sink.step(report)
        self._alert(alerts)

    def evaluation(self, report: EvaluationReport) -> None:
        for sink in self._sinks:
            sink.evaluation(report)
        if self._watch is not None:
            self._alert(self._watch.evaluation(report))

    def note(self, message: str) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        self._log.write(f"{now} {message}".replace("\n", "\n    ") + "\n")
        self._log.flush()
        for sink in self._open:
            sink.note(message)

    def close(self) -> None:
        """Closes every sink; a second call does nothing."""
        self._cleanup.close()

    def __enter__(self) -> "RunReporter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._failed = error is not None
        try:
            with self._cleanup:
                if self._watch is not None:
                    self._alert(self._watch.ended(error))
        except OSError:
            if error is None:
                raise
            # a failed run reports its own error: a full disk, for example, makes closing fail as well

    def _alert(self, alerts: Iterable[Alert]) -> None:
        for alert in alerts:
            self.note(f"alert, {alert.level}: {alert.title}: {alert.text}")
            for sink in self._open:
                sink.alert(alert)

    def _shut(self, sink: Sink) -> None:
        try:
            sink.close(failed=self._failed)
        finally:
            self._open.remove(sink)
