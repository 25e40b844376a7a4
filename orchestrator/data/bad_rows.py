"""Rows that cannot be used: reported as "file:line: reason", counted against data.max_bad_rows."""

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.core.errors import DataError

SHOWN = 10


class BadRecord(ValueError):
    """A record that cannot be used; the text is the reason shown to the user."""


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that cannot be used."""

    where: str
    """Place of the row. Example: rows.jsonl:7"""
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


def grouped(bad: Sequence[BadRow], shown: int) -> list[str]:
    """A line for each reason, the most frequent first, with its number of rows and the first of them.

    At most `shown` reasons, then a line with the number of other rows.
    """
    reasons: dict[str, list[BadRow]] = {}
    for row in bad:
        reasons.setdefault(row.reason, []).append(row)
    ordered = sorted(reasons.values(), key=len, reverse=True)
    lines = [
        str(rows[0])
        if len(rows) == 1
        else f"{len(rows)} rows: {rows[0].reason} (the first is {rows[0].where})"
        for rows in ordered[:shown]
    ]
    others = sum(map(len, ordered[shown:]))
    return [*lines, *([f"… and {others} more"] if others else [])]


def check_bad(bad: Sequence[BadRow], allowed: int) -> None:
    """DataError with the first ten reasons if there are more bad rows than `allowed`."""
    if len(bad) <= allowed:
        return
    raise DataError(
        f"{len(bad)} bad rows, data.max_bad_rows allows {allowed}",
        why="".join(f"\n    {line}" for line in grouped(bad, SHOWN)),
        fix="fix the rows, map or leave out columns with data.columns, or raise data.max_bad_rows to leave "
        "the rows out",
    )
