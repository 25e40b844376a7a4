"""What a run is doing while nothing else can be seen of it.

on a terminal: a spinner, then the seconds it took        elsewhere: a line when it begins
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console


@contextmanager
def phase(console: Console, doing: str) -> Iterator[None]:
    """Names what is done inside. Example: phase(console, "starting Ray")"""
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
