"""Rows that cannot be used: named as "file:line: reason", counted against data.max_bad_rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.errors import DataError

SHOWN = 10


class BadRecord(ValueError):
    """A record that cannot be used; the text is the reason shown to the user."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """where: "file:line"."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def check_bad(bad: Sequence[BadRow], allowed: int) -> None:
    """DataError that names the first ten of them, where there are more than `allowed`."""
    if len(bad) <= allowed:
        return
    shown = "\n".join(f"    {row}" for row in bad[:SHOWN])
    more = f"\n    … and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    raise DataError(
        f"{len(bad)} bad rows, data.max_bad_rows allows {allowed}",
        why=f"\n{shown}{more}",
        fix="mend the rows, map or leave out columns with data.columns, or raise data.max_bad_rows to leave the rows out",
    )
