"""The JSONL files of a run, which are always written.

`metrics.jsonl` and `samples.jsonl` are the run's ledger: report, model card and wandb can be made again from
it. It is ASCII, one flat object per line, and holds each step once however often the run was resumed.
"""

from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from orchestrator.core.errors import OutputError
from orchestrator.core.files import _parsed, json_line, write_atomically
from orchestrator.core.reports import EvaluationReport, Sample, StepReport
from orchestrator.observe.alerts import Alert
from orchestrator.observe.sink import Note


class JsonlSink:
    """Appends to metrics.jsonl and samples.jsonl, flushed line by line; the first alert makes alerts.jsonl.

    resume_step: step of the checkpoint that the run resumes from. Later lines are removed, since those steps
    are computed again. 0 starts from the beginning: no line is kept, not even the evaluation before training.
    """

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        self._paths = (run_dir / "metrics.jsonl", run_dir / "samples.jsonl")
        self._alerts = run_dir / "alerts.jsonl"
        self._resume_step = resume_step
        self._metrics: TextIO | None = None
        self._samples: TextIO | None = None

    def open(self, note: Note) -> None:
        for path in (*self._paths, self._alerts):
            path.parent.mkdir(parents=True, exist_ok=True)
            removed = _trim(path, self._resume_step)
            if removed:
                note(
                    f"{path.name}: removed {removed} lines after step {self._resume_step}, from which the "
                    "run resumes"
                )
        self._metrics, self._samples = (path.open("a", encoding="ascii") for path in self._paths)

    def step(self, report: StepReport) -> None:
        for sample in report.samples:
            self._append(self._samples, _sample_record(sample))
        self._append(self._metrics, {"step": report.step, **report.metrics})

    def evaluation(self, report: EvaluationReport) -> None:
        for sample in report.samples:
            self._append(self._samples, _sample_record(sample))
        self._append(self._metrics, {"step": report.step, **report.metrics})

    def note(self, message: str) -> None:
        """Does nothing: logs/driver.log holds the notes."""

    def alert(self, alert: Alert) -> None:
        with self._alerts.open("a", encoding="ascii") as file:
            self._append(file, {**asdict(alert), "time": datetime.now(UTC).isoformat(timespec="seconds")})

    def close(self, *, failed: bool = False) -> None:
        for file in (self._metrics, self._samples):
            if file is not None:
                file.close()

    def _append(self, file: TextIO | None, record: Mapping[str, Any]) -> None:
        assert file is not None, "open() comes first"
        try:
            file.write(json_line(record))
            file.flush()
        except OSError as error:
            fix = (
                "free disk space or fix the permissions, then run the same command: it resumes from the "
                "last checkpoint"
            )
            raise OutputError(f"{file.name} cannot be written", why=str(error), fix=fix) from error


def _sample_record(sample: Sample) -> dict[str, Any]:
    record = asdict(sample)
    record["scores"] = dict(sample.scores)
    return {name: value for name, value in record.items() if value is not None}


def _trim(path: Path, last: int) -> int:
    """Removes the lines of steps after `last` (all lines if it is 0) and an incomplete last line.

    Returns how many complete lines were removed.
    """
    if not path.is_file():
        return 0
    records = _parsed(path)
    kept = [line for line, record in records if last > 0 and record.get("step", 0) <= last]
    text = "".join(line + "\n" for line in kept)
    if text.encode() != path.read_bytes():
        write_atomically(path, text)
    return len(records) - len(kept)
