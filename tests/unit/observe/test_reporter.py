"""The reporter passes all reports to all sinks, in order, and always closes the sinks it opened."""

import re
from pathlib import Path

import pytest

from orchestrator.core.errors import OutputError
from orchestrator.core.files import read_lines
from orchestrator.core.reports import EvaluationReport, StepReport
from orchestrator.observe.alerts import Alert
from orchestrator.observe.jsonl import JsonlSink
from orchestrator.observe.reporter import RunReporter
from orchestrator.observe.sink import Note
from orchestrator.observe.watch import Watch
from orchestrator.recipe.schema import Alerts


class Recorder:
    """A sink that records its calls. late: a note that it sends while it closes."""

    def __init__(self, log: list[str], name: str, late: str = "", failure: Exception | None = None) -> None:
        self.log, self.name, self.late, self.failure = log, name, late, failure
        self.say: Note = log.append

    def open(self, note: Note) -> None:
        self.say = note
        self.log.append(f"{self.name} open")

    def step(self, report: StepReport) -> None:
        self.log.append(f"{self.name} step {report.step}")

    def evaluation(self, report: EvaluationReport) -> None:
        self.log.append(f"{self.name} evaluation {report.step}")

    def note(self, message: str) -> None:
        self.log.append(f"{self.name} note {message}")

    def alert(self, alert: Alert) -> None:
        self.log.append(f"{self.name} alert {alert.title}")

    def close(self, *, failed: bool = False) -> None:
        if self.late:
            self.say(self.late)
        self.log.append(f"{self.name} close" + " failed" * failed)
        if self.failure is not None:
            raise self.failure


def test_every_sink_gets_everything_and_a_late_note_still_arrives(tmp_path: Path) -> None:
    log: list[str] = []
    reporter = RunReporter(
        [Recorder(log, "a"), Recorder(log, "b", late="bye")], tmp_path / "logs" / "driver.log"
    )
    reporter.step(StepReport(1, {}))
    reporter.evaluation(EvaluationReport(1, {}))
    reporter.close()
    reporter.close()
    assert log == [
        "a open", "b open", "a step 1", "b step 1", "a evaluation 1", "b evaluation 1",
        "a note bye", "b note bye", "b close", "a close",
    ]  # fmt: skip


def test_notes_are_logged_with_their_time_in_utc(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "driver.log"
    for message in ("first", "second\nline \ud800"):
        reporter = RunReporter([], path)
        reporter.note(message)
        reporter.close()
    stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ"
    assert re.fullmatch(rf"{stamp} first\n{stamp} second\n    line \\ud800\n", path.read_text())


def test_a_sink_that_cannot_close_does_not_keep_the_others_open(tmp_path: Path) -> None:
    log: list[str] = []
    reporter = RunReporter(
        [Recorder(log, "a"), Recorder(log, "b", failure=OSError("disk"))], tmp_path / "driver.log"
    )
    with pytest.raises(OSError, match="disk"):
        reporter.close()
    assert log[-2:] == ["b close", "a close"]


def test_a_run_that_fails_for_a_full_disk_reports_that_error(tmp_path: Path) -> None:
    """Its last notes cannot be written either; they must not replace the error and its exit code."""
    with (
        pytest.raises(OutputError, match="cannot be written"),
        RunReporter([], Path("/dev/full"), Watch(tmp_path, Alerts(), 0)),
    ):
        raise OutputError("metrics.jsonl cannot be written", fix="free disk space")
    with pytest.raises(OSError, match="No space left"), RunReporter([], Path("/dev/full")) as reporter:
        reporter.note("of a run that goes well")


def test_a_sink_that_cannot_open_closes_the_others(tmp_path: Path) -> None:
    log: list[str] = []
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OSError, match="metrics"):
        RunReporter([Recorder(log, "a"), JsonlSink(tmp_path, 0)], tmp_path / "driver.log")
    assert log == ["a open", "a close"]


def test_with_the_real_ledger(tmp_path: Path) -> None:
    reporter = RunReporter([JsonlSink(tmp_path, 0)], tmp_path / "logs" / "driver.log")
    reporter.step(StepReport(1, {"loss": 1.0}))
    reporter.close()
    assert read_lines(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": 1.0}]
