"""The newest steps on a terminal, of a run in this process or of a job whose log is followed."""

import math
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

ROWS = 8
"""Steps in the table."""
REDRAW_S = 0.1
"""Least seconds between two drawings: with steps of milliseconds drawing would cost more than learning."""
_LINE = re.compile(r"step (\d+)/(\d+)  (.+)")


@dataclass(frozen=True, slots=True)
class StepLine:
    """One step as the console shows it."""

    step: int
    total: int
    """Steps of the whole run."""
    columns: Mapping[str, str]
    """Short name -> formatted value, `eta` included."""

    def __str__(self) -> str:
        """The step's line in a log. Example: step 3/100  loss 0.6931  lr 5e-06  eta 3m12s"""
        return f"step {self.step}/{self.total}  " + "  ".join(
            f"{name} {value}" for name, value in self.columns.items()
        )

    @classmethod
    def parse(cls, line: str) -> "StepLine | None":
        """The step of a log line; None for any other line."""
        match = _LINE.fullmatch(line.rstrip())
        if match is None:
            return None
        pairs = [column.rsplit(" ", 1) for column in match[3].split("  ")]
        return (
            cls(int(match[1]), int(match[2]), dict(pairs)) if all(len(pair) == 2 for pair in pairs) else None
        )


class LiveTable:
    """The newest steps, drawn at most every REDRAW_S. For terminals only."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock = console, clock
        self._drawn_at = -math.inf
        self._rows: deque[StepLine] = deque(maxlen=ROWS)
        self._live: Live | None = None

    def add(self, row: StepLine) -> None:
        self._rows.append(row)
        if self._live is None:
            self._live = Live(console=self._console, auto_refresh=False)
            self._live.start()
        if (now := self._clock()) - self._drawn_at >= REDRAW_S:
            self._drawn_at = now
            self._live.update(self._table(), refresh=True)

    def stop(self) -> None:
        if self._live is not None:
            self._live.update(self._table(), refresh=True)
            self._live.stop()

    def _table(self) -> Group:
        last = self._rows[-1]
        names = [name for name in last.columns if name != "eta"]
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
        for name in ("step", *names):
            table.add_column(name, justify="right", no_wrap=True)
        for row in self._rows:
            table.add_row(str(row.step), *(Text(row.columns.get(name, "")) for name in names))
        filled = 30 * last.step // max(1, last.total)
        progress = f"  {last.step}/{last.total} steps, {last.columns.get('eta', '?')} left"
        return Group(
            table, "", Text.assemble(("━" * filled, "green"), ("━" * (30 - filled), "dim"), progress)
        )
