"""The console: a live table of the newest steps on a terminal, else plain lines, few enough to read.

metrics.jsonl has every step. In a pipe the first FIRST_LINES steps are told, then one of every hundredth of
the run and one every LINE_S seconds, the last step, and every step that an evaluation follows.
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
"""Steps whose mean duration the ETA is made of."""
FIRST_LINES = 20
"""Steps of a start whose lines are all told."""
LINE_S = 5.0
"""Seconds after which a step is told in any case."""
MOST_COMPONENTS = 4
"""Reward components in a line; report.html has all."""
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
    """What the user sees while a run goes on.

    total_steps: of the run; clock: seconds, for the ETA.
    """

    def __init__(
        self, total_steps: int, console: Console, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._total, self._console, self._clock = total_steps, console, clock
        self._times: deque[float] = deque(maxlen=ETA_STEPS + 1)
        self._live = LiveTable(console)
        self._steps, self._told_at, self._held_back = 0, -math.inf, ""

    def open(self, note: Note) -> None:
        """The live table comes up with the first step: notes before it need no table below them."""

    def step(self, report: StepReport) -> None:
        self._times.append(self._clock())
        line = StepLine(report.step, self._total, self._columns(report))
        if self._console.is_interactive:
            self._live.add(line)
        else:
            self._tell(line, self._times[-1])

    def _tell(self, line: StepLine, now: float) -> None:
        """Prints a step's line, or keeps it for an evaluation or the end to ask for."""
        self._steps += 1
        due = self._steps <= FIRST_LINES or now - self._told_at >= LINE_S
        due |= line.step % max(1, self._total // 100) == 0 or line.step == self._total
        self._held_back = str(line)
        if due:
            self._told_at = now
            self._tell_held_back()

    def _tell_held_back(self) -> None:
        line, self._held_back = self._held_back, ""
        if line:
            self._print(line)

    def evaluation(self, report: EvaluationReport) -> None:
        self._tell_held_back()
        values = "  ".join(
            f"{name.removeprefix('eval/')} {_value(name, value)}" for name, value in report.metrics.items()
        )
        self._print(f"evaluation at step {report.step}  {values}")

    def note(self, message: str) -> None:
        self._print(message)

    def alert(self, alert: Alert) -> None:
        """The note says it."""

    def close(self, *, failed: bool = False) -> None:
        self._tell_held_back()
        self._live.stop()

    def _print(self, message: str) -> None:
        # Text and soft_wrap: square brackets are no markup, and a log line is not cut at 80 columns
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
        """Time left at the mean pace of the last steps, evaluations and checkpoints between them included."""
        several = len(self._times) > 1
        pace = (
            (self._times[-1] - self._times[0]) / (len(self._times) - 1)
            if several
            else step_seconds(report.metrics)
        )
        return duration(pace * (self._total - report.step))


def _components(report: StepReport) -> dict[str, str]:
    """The parts of a reward that has several, by their names; `reward/NAME` where a column has that name."""
    names = components(report.metrics)
    if len(names) < 2:
        return {}
    short = {name: name.removeprefix("reward/") for name in names[:MOST_COMPONENTS]}
    taken = {*COLUMNS, "tok/s", "eta", "step"}
    return {
        (name if part in taken else part): _value(name, report.metrics[name]) for name, part in short.items()
    }


def _value(name: str, value: float) -> str:
    return "–" if unknown(name.removeprefix("eval/"), value) else number(value)
