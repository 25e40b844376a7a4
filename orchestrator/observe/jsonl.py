"""Where reports go: what a sink is, and the JSONL files, which are always written.

`metrics.jsonl` and `samples.jsonl` are the run's ledger. All other views (report, card, wandb) can be lost and made
again from it, so it is ASCII, one flat object per line, and holds each step once however often the run was resumed.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TextIO

from orchestrator.core.batches import EvaluationReport, Sample, StepReport
from orchestrator.core.errors import DataError, OutputError
from orchestrator.core.files import write_atomically
from orchestrator.observe.alerts import Alert

Note = Callable[[str], None]


class Sink(Protocol):
    """Takes every report of one run. open() comes first and close() last; both may say something by `note`.

    alert(): is told as a note too; what a sink does beyond that. failed: an error ended the run, or this attempt at it."""

    def open(self, note: Note) -> None: ...
    def step(self, report: StepReport) -> None: ...
    def evaluation(self, report: EvaluationReport) -> None: ...
    def note(self, message: str) -> None: ...
    def alert(self, alert: Alert) -> None: ...
    def close(self, *, failed: bool = False) -> None: ...


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file. A torn last line is left out; DataError for a damaged line before it."""
    return [record for _, record in _parsed(path)]


def _parsed(path: Path) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    lines = path.read_bytes().decode("utf-8", "replace").rstrip("\n").split("\n")  # not splitlines: it cuts at U+2028
    for number, line in enumerate(lines, 1):
        record = _json_object(line)
        if record is not None:
            found.append((line, record))
        elif number < len(lines):
            raise DataError(f"{path}:{number}: not a JSON object", why="only the last line may be torn", fix="remove that line")
    return found


def _json_object(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def is_evaluation(line: Mapping[str, Any]) -> bool:
    """Whether a line of metrics.jsonl is one of an evaluation, not of a step."""
    return any(name.startswith("eval/") for name in line)


def json_line(record: Mapping[str, Any]) -> str:
    """One line of strict JSON in ASCII; numbers that JSON has no word for (nan, inf) become null."""
    return json.dumps({name: _finite(value) for name, value in record.items()}, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


class JsonlSink:
    """Appends to metrics.jsonl and samples.jsonl, flushed line by line; alerts.jsonl comes with the first alert.

    resume_step: optimizer steps of the checkpoint that the run goes on from. Lines after it are removed: those steps
    are played again. 0 starts anew: nothing is kept, the evaluation before training included.
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
                note(f"{path.name}: {removed} lines after step {self._resume_step} removed, the run goes on from there")
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
        """Notes are no metrics; they are in logs/driver.log."""

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
            fix = "free disk space or fix the permissions, then run the same command: it goes on from the last checkpoint"
            raise OutputError(f"{file.name} cannot be written", why=str(error), fix=fix) from error


def _sample_record(sample: Sample) -> dict[str, Any]:
    record = asdict(sample)
    record["scores"] = dict(sample.scores)
    return {name: value for name, value in record.items() if value is not None}


def _trim(path: Path, last: int) -> int:
    """Removes the lines of steps after `last` (all if `last` is 0) and a torn last line; says how many whole lines went."""
    if not path.is_file():
        return 0
    records = _parsed(path)
    kept = [line for line, record in records if last > 0 and record.get("step", 0) <= last]
    text = "".join(line + "\n" for line in kept)
    if text.encode() != path.read_bytes():
        write_atomically(path, text)
    return len(records) - len(kept)


def number(value: float) -> str:
    """Four significant digits. Example: 0.6931, 5e-06, 1234."""
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Example: 8s, 3m12s, 2h05m; "?" where it is not known."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    return f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"


def printable(text: str) -> str:
    """The text without control characters (a row of data could hold terminal commands); line ends and tabs stay."""
    return "".join(c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text)
