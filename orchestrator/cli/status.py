"""What `status` prints of the attempts of submitted runs.

JobAttempt, its log --StatusRow.of--> StatusRow --> a table of 80 columns | lines with tabs | JSON
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from orchestrator.cluster.submit.ray_jobs import JobAttempt
from orchestrator.core.errors import Exit
from orchestrator.core.format import duration
from orchestrator.observe.live_table import StepLine

STOPPED_BY_REQUEST = re.compile(r"^error: stopped by request after step (\d+) of (\d+)", re.MULTILINE)
"""Last line of a driver that was stopped and has saved. Ray keeps no exit code of a job that it stopped."""
REPEATED_LOG = ", last available logs (truncated"
"""Text after which Ray's message repeats the log."""
PLAIN_STATUSES = ("RUNNING", "SUCCEEDED")
"""Ray's statuses whose message adds nothing."""


@dataclass(frozen=True, slots=True)
class StatusRow:
    """One attempt of a submitted run, as all three forms show it."""

    run: str
    job: str
    """Id of the attempt. Example: "llama-dpo.2"."""
    status: str
    """Ray's word. Example: "FAILED"."""
    exit_code: int | None
    """Exit code of the driver; None while it runs, or if Ray kept none."""
    age_s: float | None
    """Seconds since the attempt started."""
    took_s: float | None
    """Seconds from start to end, or until now."""
    step: int | None
    """Last step in the log."""
    total: int | None
    """Steps of the whole run."""
    loss: str | None
    """Loss of the last step, as the log prints it."""
    message: str
    """Why the attempt ended as it did, on one line."""

    @classmethod
    def of(cls, attempt: JobAttempt, log: str, now: float) -> "StatusRow":
        """`log` is what the attempt printed, or "" if it was not fetched; `now` is in Unix seconds."""
        lines = reversed(log.splitlines())
        last = next((step for line in lines if (step := StepLine.parse(line)) is not None), None)
        saved = STOPPED_BY_REQUEST.search(log) if attempt.status == "STOPPED" else None
        code = Exit.RESUMABLE.value if attempt.exit_code is None and saved else attempt.exit_code
        step = total = None
        if last is not None:
            step, total = last.step, last.total
        elif saved:
            step, total = int(saved[1]), int(saved[2])
        return cls(
            run=attempt.run,
            job=attempt.id,
            status=attempt.status,
            exit_code=0 if code is None and attempt.status == "SUCCEEDED" else code,
            age_s=None if attempt.started is None else now - attempt.started,
            took_s=None if attempt.started is None else (attempt.ended or now) - attempt.started,
            step=step,
            total=total,
            loss=None if last is None else last.columns.get("loss"),
            message="" if attempt.status in PLAIN_STATUSES else reason(attempt.message),
        )

    def cells(self) -> tuple[str, str, str, str, str, str]:
        """Status, exit code, age, time taken, step and loss, as they are shown."""
        code = "" if self.exit_code is None else str(self.exit_code)
        step = "" if self.step is None else f"{self.step}/{self.total}"
        return self.status, code, _time(self.age_s), _time(self.took_s), step, self.loss or ""


def reason(message: str) -> str:
    """Ray's message about the end of a job on one line; the driver's error replaces the repeated log."""
    what, _, log = message.partition(REPEATED_LOG)
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    return " ".join(
        f"{what}{': ' if errors else ''}{errors[-1].removeprefix('error: ') if errors else ''}".split()
    )


def status_lines(rows: Sequence[StatusRow]) -> str:
    """A line for each attempt, with tabs between the columns and nothing cut off."""
    return "\n".join("\t".join((row.run, row.job, *row.cells(), row.message)) for row in rows)


def status_table(rows: Sequence[StatusRow]) -> RenderableType:
    """A table no wider than the terminal; below it why jobs ended."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("job", "status", "exit", "age", "took", "step", "loss"):  # a job's id begins with its run
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(row.job, *row.cells())
    messages = [
        Text(f"{row.job}: {row.message}", overflow="ellipsis", no_wrap=True) for row in rows if row.message
    ]
    return Group(table, *messages)


def _time(seconds: float | None) -> str:
    """Example: 12s, 3m05s, 2h10m, 4d."""
    return "" if seconds is None else f"{seconds / 86400:.0f}d" if seconds > 2 * 86400 else duration(seconds)
