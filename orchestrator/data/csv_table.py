"""Rows of a CSV or TSV file, with the values that `datasets`, and so TRL, would give them.

    true, True, false, FALSE    in a column of nothing else     true and false
    3, -4                       in a column of nothing else     whole numbers
    3, 0.5, 1e-3                in a column of nothing else     numbers
    empty, NA, null, nan …      in such a column                null
    empty                       in any other column             null
    anything else                                               text

Columns that a run reads as text stay text, whatever they look like. Unlike with `datasets`, words such as NA
and None stay words in a column of text, 007 keeps its zeros, and a column of whole numbers with gaps keeps
whole numbers. Messages as JSON text are read as messages.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, BinaryIO

from orchestrator.core.errors import DataError
from orchestrator.data.bad_rows import BadRow

TRUTH = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
WHOLE = re.compile(r" *[+-]?(0|[1-9]\d{0,17}) *")
NUMBER = re.compile(r" *[+-]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][+-]?\d+)? *")
NOTHING = frozenset(
    {
        "",
        "#N/A",
        "#N/A N/A",
        "#NA",
        "-1.#IND",
        "-1.#QNAN",
        "-NaN",
        "-nan",
        "1.#IND",
        "1.#QNAN",
        "<NA>",
        "N/A",
        "NA",
        "NULL",
        "NaN",
        "None",
        "n/a",
    }
    | {"nan", "null"}
)
"""Cells that pandas reads as a missing value."""
SEPARATORS = ";\t|"
"""Other separators of files called .csv: they are reported, not guessed."""
PYTHONS = re.compile(r"\s*\[\s*\{\s*'(role|from|content|value)'")
"""A list of messages as Python's `str()` writes it, which is not JSON."""


@dataclass(frozen=True, slots=True)
class Line:
    """A record of the file."""

    number: int
    """Line of the file at which the record begins."""
    cells: tuple[str, ...]


def rows(
    raw: BinaryIO,
    path: str,
    separator: str,
    texts: Collection[str],
    bad: list[BadRow],
    note: Callable[[str], None],
) -> Iterator[tuple[dict[str, Any], int]]:
    """(values by column, line) of each record.

    DataError for a file that is not a table. texts: columns that stay text. bad: gets records that are not a
    row of the table.
    """
    header, lines = _read(raw, path, separator)
    kept = []
    for line in lines:
        if len(line.cells) == len(header):
            kept.append(line)
        else:
            bad.append(
                BadRow(f"{path}:{line.number}", f"{len(line.cells)} fields, and the header has {len(header)}")
            )
    readers = [
        _text if name in texts else _reader([line.cells[i] for line in kept]) for i, name in enumerate(header)
    ]
    decoded: set[str] = set()
    for line in kept:
        values = {name: read(cell) for name, read, cell in zip(header, readers, line.cells, strict=True)}
        cells = {name: cell for name in texts if isinstance(cell := values.get(name), str)}
        pythons = next((name for name, cell in cells.items() if PYTHONS.match(cell)), None)
        if pythons is not None:
            bad.append(
                BadRow(
                    f"{path}:{line.number}",
                    f"{pythons} holds a list in Python's notation; write it with json.dumps, or use JSONL",
                )
            )
            continue
        lists = {name: messages for name, cell in cells.items() if (messages := _messages(cell)) is not None}
        decoded |= lists.keys()
        yield values | lists, line.number
    for name in sorted(decoded):
        note(f"{path}: {name} holds lists of messages as JSON text, which are read as messages")


def _read(raw: BinaryIO, path: str, separator: str) -> tuple[list[str], list[Line]]:
    """(names of the header, the records below it). A byte order mark, which Excel writes, is skipped."""
    text = io.TextIOWrapper(raw, encoding="utf-8-sig", newline="")
    lines: list[Line] = []
    before = 0
    with _long_cells():
        reader = csv.reader(text, delimiter=separator, strict=True)
        try:
            for cells in reader:
                if cells:  # no blank line
                    lines.append(Line(before + 1, tuple(cells)))
                before = reader.line_num
        except csv.Error as error:
            fix = (
                'a cell with quotes in it is written "with ""doubled"" quotes"; csv.writer and pandas do that'
            )
            raise DataError(f"{path}:{before + 1}: not CSV", why=str(error), fix=fix) from error
        except UnicodeDecodeError as error:
            fix = "save it as UTF-8 (Excel: CSV UTF-8)"
            raise DataError(
                f"{path}: not UTF-8 after line {before}", why=str(error.reason), fix=fix
            ) from error
    if not lines:
        return [], []
    return _names(lines[0], path, separator), lines[1:]


def _names(header: Line, path: str, separator: str) -> list[str]:
    """Names of the columns. One without a name, such as pandas' index, gets the name that pandas reads."""
    names = [name or f"Unnamed: {i}" for i, name in enumerate(header.cells)]
    other = next((mark for mark in SEPARATORS if mark != separator and mark in names[0]), None)
    if len(names) == 1 and other is not None:
        fix = "save it with commas between the columns" + (", or call it .tsv" if other == "\t" else "")
        raise DataError(
            f"{path}: the header has one column, {names[0]!r}",
            why=f"its columns are separated by {other!r}",
            fix=fix,
        )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DataError(
            f"{path}: several columns are named {', '.join(twice)}", fix="give each column its own name"
        )
    return names


def _reader(cells: Sequence[str]) -> Callable[[str], Any]:
    """Reads a cell of the column as the kind of value that all its cells are."""
    present = {cell for cell in cells if cell not in NOTHING}
    if not present:
        return _text
    if all(cell in TRUTH for cell in present):
        return TRUTH.get
    if all(WHOLE.fullmatch(cell) for cell in present):
        return lambda cell: None if cell in NOTHING else int(cell)
    if all(NUMBER.fullmatch(cell) for cell in present):
        return lambda cell: None if cell in NOTHING else float(cell)
    return _text


def _text(cell: str) -> str | None:
    return cell or None


def _messages(cell: str) -> list[Any] | None:
    """The list of messages that a cell holds as JSON; None for any other text."""
    if not cell.lstrip().startswith("["):
        return None
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return None
    are_messages = (
        isinstance(value, list)
        and value
        and all(isinstance(entry, dict) and (entry.keys() & {"role", "from"}) for entry in value)
    )
    return value if are_messages else None


@contextmanager
def _long_cells() -> Iterator[None]:
    """Lifts csv's limit of 131,072 characters a cell, which an answer may exceed; the limit is global."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)
