"""Progress of a run's phases before its first step: a spinner and then the seconds on a terminal, else a line
when a phase begins."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def phase(console: Console, doing: str) -> Iterator[None]:
    """Shows what the code inside does. Example: phase(console, "starting Ray")"""
    if console.quiet:
        yield
        return
    started = time.monotonic()
    if not console.is_terminal:
        console.print(f"{doing} …", markup=False, highlight=False)
        yield
        return
    with console.status(f"{doing} …"):
        yield
    console.print(f"{doing}: {time.monotonic() - started:.1f} s", style="dim", markup=False, highlight=False)
