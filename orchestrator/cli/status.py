"""What `status` says of the attempts of submitted runs: for people, for a pipe, for programs.

Attempt, its log --StatusRow.of--> StatusRow --> a table of 80 columns | lines with tabs | JSON
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
"""What a driver says last that was stopped and has saved; Ray keeps no exit code of a job that it stopped."""
LOG_AGAIN = ", last available logs (truncated"
SPEAK_FOR_THEMSELVES = ("RUNNING", "SUCCEEDED")
"""Words of Ray to which its message adds nothing."""


@dataclass(frozen=True, slots=True)
class StatusRow:
    """An attempt of a run. exit_code: of the driver, None while it runs and where nobody knows; age_s: since
    it started; took_s: from start to end; step, total, loss: of the last step that its log tells; message:
    why it ended as it did, on one line."""

    run: str
    job: str
    status: str
    exit_code: int | None
    age_s: float | None
    took_s: float | None
    step: int | None
    total: int | None
    loss: str | None
    message: str

    @classmethod
    def of(cls, attempt: JobAttempt, log: str, now: float) -> "StatusRow":
        """log: what the attempt has said, or nothing where it was not asked; now: Unix seconds."""
        steps = [step for line in reversed(log.splitlines()) if (step := StepLine.parse(line)) is not None][
            :1
        ]
        saved = STOPPED_BY_REQUEST.search(log) if attempt.status == "STOPPED" else None
        code = Exit.RESUMABLE.value if attempt.exit_code is None and saved else attempt.exit_code
        step, total = (
            (steps[0].step, steps[0].total)
            if steps
            else (int(saved[1]), int(saved[2]))
            if saved
            else (None, None)
        )
        return cls(
            run=attempt.run,
            job=attempt.id,
            status=attempt.status,
            exit_code=0 if code is None and attempt.status == "SUCCEEDED" else code,
            age_s=None if attempt.started is None else now - attempt.started,
            took_s=None if attempt.started is None else (attempt.ended or now) - attempt.started,
            step=step,
            total=total,
            loss=steps[0].columns.get("loss") if steps else None,
            message="" if attempt.status in SPEAK_FOR_THEMSELVES else reason(attempt.message),
        )

    def words(self) -> tuple[str, str, str, str, str, str]:
        """Status, exit code, age, time taken, step, loss, as they are shown."""
        code = "" if self.exit_code is None else str(self.exit_code)
        step = "" if self.step is None else f"{self.step}/{self.total}"
        return self.status, code, _time(self.age_s), _time(self.took_s), step, self.loss or ""


def reason(message: str) -> str:
    """What Ray says of the end of a job, on one line: it repeats the log, of which the driver's own error is
    enough."""
    what, _, log = message.partition(LOG_AGAIN)
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    return " ".join(
        f"{what}{': ' if errors else ''}{errors[-1].removeprefix('error: ') if errors else ''}".split()
    )


def status_lines(rows: Sequence[StatusRow]) -> str:
    """For a pipe: a line for each attempt, columns by tabs, cut nowhere."""
    return "\n".join("\t".join((row.run, row.job, *row.words(), row.message)) for row in rows)


def status_table(rows: Sequence[StatusRow]) -> RenderableType:
    """A table no wider than the terminal, with what ended a job below it."""
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in (
        "job",
        "status",
        "exit",
        "age",
        "took",
        "step",
        "loss",
    ):  # a job's name begins with its run's
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(row.job, *row.words())
    said = [
        Text(f"{row.job}: {row.message}", overflow="ellipsis", no_wrap=True) for row in rows if row.message
    ]
    return Group(table, *said)


def _time(seconds: float | None) -> str:
    """Example: 12s, 3m05s, 2h10m, 4d."""
    return "" if seconds is None else f"{seconds / 86400:.0f}d" if seconds > 2 * 86400 else duration(seconds)
