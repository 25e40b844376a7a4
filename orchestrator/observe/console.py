"""The console: a live table of the newest steps on a terminal, else plain lines, few enough to read.

metrics.jsonl has every step. In a pipe the console prints the first FIRST_LINES steps, then one for every
hundredth of the run and one every LINE_S seconds, the last step, and each step before an evaluation.
"""

import math
import time
from collections import deque
from collections.abc import Callable

from rich.console import Console
from rich.text import Text

from orchestrator.core.format import duration, number, printable
from orchestrator.core.reports import EvaluationReport, StepReport
from orchestrator.observe.alerts import Alert
from orchestrator.observe.live_table import LiveTable, StepLine
from orchestrator.observe.metric_names import components, unknown
from orchestrator.observe.metrics import step_seconds
from orchestrator.observe.sink import Note

ETA_STEPS = 20
"""Newest steps whose mean duration gives the ETA."""
FIRST_LINES = 20
"""First steps of a start, which are all printed."""
LINE_S = 5.0
"""Seconds without a line after which the next step is printed."""
MAX_COMPONENTS = 4
"""Most reward components in a line; report.html has all."""
COLUMNS = {
    "loss": "loss",
    "reward": "reward/mean",
    "acc": "rewards/accuracies",
    "margin": "rewards/margins",
    "kl": "kl",
    "length": "completions/mean_length",
    "grad": "grad_norm",
    "lr": "learning_rate",
}
"""Short name -> metric, in the order of a line."""


class ConsoleSink:
    """Shows a running run. total_steps: steps of the whole run; clock: seconds, for the ETA."""

    def __init__(
        self, total_steps: int, console: Console, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total, self._console, self._clock = total_steps, console, clock
        self._times: deque[float] = deque(maxlen=ETA_STEPS + 1)
        self._live = LiveTable(console)
        self._steps, self._printed_at, self._held_back = 0, -math.inf, ""

    def open(self, note: Note) -> None:
        """Does nothing: the live table starts with the first step, below the notes that come before it."""

    def step(self, report: StepReport) -> None:
        self._times.append(self._clock())
        line = StepLine(report.step, self._total, self._columns(report))
        if self._console.is_interactive:
            self._live.add(line)
        else:
            self._print_if_due(line, self._times[-1])

    def _print_if_due(self, line: StepLine, now: float) -> None:
        """Prints a step's line, or keeps it until an evaluation or the end."""
        self._steps += 1
        due = self._steps <= FIRST_LINES or now - self._printed_at >= LINE_S
        due |= line.step % max(1, self._total // 100) == 0 or line.step == self._total
        self._held_back = str(line)
        if due:
            self._printed_at = now
            self._print_held_back()

    def _print_held_back(self) -> None:
        line, self._held_back = self._held_back, ""
        if line:
            self._print(line)

    def evaluation(self, report: EvaluationReport) -> None:
        self._print_held_back()
        values = "  ".join(
            f"{name.removeprefix('eval/')} {_value(name, value)}" for name, value in report.metrics.items()
        )
        self._print(f"evaluation at step {report.step}  {values}")

    def note(self, message: str) -> None:
        self._print(message)

    def alert(self, alert: Alert) -> None:
        """Does nothing: every alert is also printed as a note."""

    def close(self, *, failed: bool = False) -> None:
        self._print_held_back()
        self._live.stop()

    def _print(self, message: str) -> None:
        # Text: square brackets are not markup; soft_wrap: a log line is not cut at 80 columns
        self._console.print(Text(printable(message)), soft_wrap=True)

    def _columns(self, report: StepReport) -> dict[str, str]:
        columns = {}
        for short, name in COLUMNS.items():
            if name in report.metrics:
                columns[short] = _value(name, report.metrics[name])
            if name == "reward/mean":
                columns |= _components(report)
        if "perf/tokens_per_s" in report.metrics:
            columns["tok/s"] = f"{report.metrics['perf/tokens_per_s']:,.0f}"
        return columns | {"eta": self._eta(report)}

    def _eta(self, report: StepReport) -> str:
        """Time left at the mean pace of the last steps, with the evaluations and checkpoints between them."""
        pace = (
            (self._times[-1] - self._times[0]) / (len(self._times) - 1)
            if len(self._times) > 1
            else step_seconds(report.metrics)
        )
        return duration(pace * (self._total - report.step))


def _components(report: StepReport) -> dict[str, str]:
    """Columns of a reward with several components, by component, or `reward/NAME` if a column has that
    name."""
    names = components(report.metrics)
    if len(names) < 2:
        return {}
    short = {name: name.removeprefix("reward/") for name in names[:MAX_COMPONENTS]}
    other_columns = {*COLUMNS, "tok/s", "eta", "step"}
    return {
        (name if part in other_columns else part): _value(name, report.metrics[name])
        for name, part in short.items()
    }


def _value(name: str, value: float) -> str:
    return "–" if unknown(name.removeprefix("eval/"), value) else number(value)
