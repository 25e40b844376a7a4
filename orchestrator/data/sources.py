"""Rows from files (local, or s3:// and what else fsspec opens), folders, the hub or a built-in toy task.

Bad rows are reported as file:line: reason.
"""

import difflib
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.core import hub
from orchestrator.core.batches import DataKind, Row
from orchestrator.core.errors import ConfigError, DataError, MissingInput
from orchestrator.data.bad_rows import BadRecord, BadRow, check_bad, grouped
from orchestrator.data.files import SUFFIXES, Record, choose, records
from orchestrator.data.formats import EVERYTHING, SHAREGPT_COLUMN, Reads, describe, to_rows, used_columns
from orchestrator.data.toy import DEFAULT_ROWS, toy_rows
from orchestrator.recipe.schema import Columns, Data, Source

EMPTY: tuple[Any, ...] = (None, "", [], {})
"""Values without content: a column of these alone is not reported as unused."""
MEASURED = ("label", "margin", "answer")
"""Columns that need not be text: in a CSV their values decide the type."""


@dataclass(frozen=True, slots=True)
class LoadedRows:
    """Validated rows of all sources in order."""

    rows: tuple[Row, ...]
    bad: tuple[BadRow, ...]
    sizes: tuple[int, ...]
    """Rows of each source."""
    weights: tuple[float, ...]
    """Weight of each source in the mixture."""
    names: tuple[str, ...]
    """Name of each source in metrics. Example: ("train", "train-2")"""
    formats: tuple[str, ...]
    """Format of each source. Example: ("preference, text", "empty")"""
    fingerprint: str
    """SHA-256 of the content of all rows."""
    used: frozenset[str] = frozenset()
    """Columns that the run reads, of all sources."""
    unused: tuple[str, ...] = ()
    """Columns that it does not read."""
    digests: tuple[bytes, ...] = ()
    """Hash of the content of each row."""
    origins: frozenset[str] = frozenset()
    """Files and splits that rows came from."""
    notes: tuple[str, ...] = ()
    """What else the user should know."""


def load_rows(spec: str | list[Source], data: Data, kind: DataKind, reads: Reads = EVERYTHING) -> LoadedRows:
    """All rows of `spec`; DataError if more than data.max_bad_rows are bad, or if no row is usable."""
    sources = [Source(path=spec)] if isinstance(spec, str) else spec  # pyright: ignore[reportCallIssue]
    reader = _Reader(kind, reads)
    rows: list[Row] = []
    sizes: list[int] = []
    formats: list[str] = []
    digests: list[bytes] = []
    digest = hashlib.sha256()
    for index, source in enumerate(sources):
        start = len(rows)
        for fields, where in reader.read(source, source.columns or data.columns):
            text = json.dumps(fields, sort_keys=True, default=str).encode()
            digest.update(text)
            digests.append(hashlib.blake2b(text, digest_size=16).digest())
            rows.append(Row(id=len(rows), where=where, source=index, **fields))
        sizes.append(len(rows) - start)
        formats.append(describe(rows[start]) if len(rows) > start else "empty")
    check_bad(reader.bad, data.max_bad_rows)
    if not rows:
        reasons = "".join(f"\n    {line}" for line in grouped(reader.bad, 3))
        raise DataError(
            "the data holds no usable row",
            why=", ".join(s.path for s in sources) + reasons,
            fix="check data.train and data.columns",
        )
    if reads.margin:
        _check_margins(rows)
    return LoadedRows(
        rows=tuple(rows),
        bad=tuple(reader.bad),
        sizes=tuple(sizes),
        weights=tuple(s.weight for s in sources),
        names=_distinct([Path(s.path).stem for s in sources]),
        formats=tuple(formats),
        fingerprint=digest.hexdigest(),
        used=frozenset(reader.used),
        unused=tuple(reader.unused),
        digests=tuple(digests),
        origins=frozenset(reader.origins),
        notes=tuple(reader.notes),
    )


def raw_records(path: str) -> Iterator[Record]:
    """Records of a file, a folder or a toy task as they are, before any column is read."""
    source = Source(path=path)  # pyright: ignore[reportCallIssue]
    columns = Columns()  # pyright: ignore[reportCallIssue]
    return _Reader("prompt", EVERYTHING)._records(source, columns)


def _distinct(names: Sequence[str]) -> tuple[str, ...]:
    """The names with a number after each repeated one: metrics carry them.

    Example: train, train -> train, train-2
    """
    distinct: list[str] = []
    for name in names:
        count = 1
        while (numbered := name if count == 1 else f"{name}-{count}") in distinct:
            count += 1
        distinct.append(numbered)
    return tuple(distinct)


def check_apart(train: LoadedRows, held_out: LoadedRows) -> str | None:
    """A note if some held-out rows are trained on; None if none is.

    ConfigError if both are read from the same place, or if all held-out rows are trained on.
    """
    why = "metrics of learned rows do not show how the model does on others"
    fix = "name other rows: another file, or another split ({path: …, split: test}); or set data.eval=null"
    if both := sorted(train.origins & held_out.origins):
        raise ConfigError(
            f"data.eval and data.train both read {both[0]} from its first row", why=why, fix=fix
        )
    trained = set(train.digests)
    shared = [row for row, digest in zip(held_out.rows, held_out.digests, strict=True) if digest in trained]
    if held_out.rows and len(shared) == len(held_out.rows):
        raise ConfigError(
            f"data.eval holds the rows of data.train: all {len(shared)} of them are trained on",
            why=why,
            fix=fix,
        )
    return (
        f"{len(shared)} of {len(held_out.rows)} held-out rows are trained on too, the first at "
        f"{shared[0].where}"
        if shared
        else None
    )


def _check_margins(rows: list[Row]) -> None:
    without = next((row.where for row in rows if row.margin is None), None)
    holder = next((row.where for row in rows if row.margin is not None), None)
    if without and holder:
        fix = "give every row a margin, or leave the column out with data.columns.margin=null"
        raise DataError(f"{without} has no margin, but {holder} has one", fix=fix)


class _Reader:
    """Reads sources one after the other; collects bad rows, used and unused columns, origins and notes."""

    def __init__(self, kind: DataKind, reads: Reads) -> None:
        self.kind: DataKind = kind
        self.reads = reads
        self.bad: list[BadRow] = []
        self.used: set[str] = set()
        self.unused: dict[str, None] = {}
        self.notes: list[str] = []
        self.origins: set[str] = set()

    def read(self, source: Source, columns: Columns) -> Iterator[tuple[dict[str, Any], str]]:
        """(fields of a Row, its place) of each row of a source, at most max_rows."""
        remaining = source.max_rows if source.max_rows is not None else sys.maxsize
        seen: dict[str, None] = {}
        used: set[str] = set()
        for record in self._records(source, columns):
            try:
                rows = to_rows(record.value, columns, self.kind, self.reads, filled=record.filled)
            except BadRecord as error:
                self.bad.append(BadRow(record.where, str(error)))
                continue
            seen |= dict.fromkeys(name for name, value in record.value.items() if value not in EMPTY)
            used |= used_columns(rows[0], record.value, columns, self.reads)
            for fields in rows[:remaining]:
                yield fields, record.where
            remaining -= min(remaining, len(rows))
            if not remaining:
                break
        self.used |= used
        self.unused |= dict.fromkeys(str(name) for name in seen if name not in used)

    def _records(self, source: Source, columns: Columns) -> Iterator[Record]:
        path = Path(source.path)
        if source.path.startswith("toy:"):
            _refuse(source, "toy data", "subset", "revision")
            self.origins.add(f"{source.path}, split {source.split or 'train'}")
            yield from _toy(source)
        elif "://" in source.path or path.is_file():
            _refuse(source, "a file", "split", "subset", "revision")
            yield from self._file(source.path, columns)
        elif path.is_dir():
            _refuse(source, "a folder", "revision")
            chosen = choose(path, source.subset, source.split)
            if chosen.passed_over:
                self.notes.append(f"{path}: these are not read: {', '.join(chosen.passed_over)}")
            for file in chosen.files:
                yield from self._file(str(file), columns)
        elif path.name.endswith(SUFFIXES) or not hub.is_data_set_name(source.path):
            near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
            close = difflib.get_close_matches(path.name, near, n=3)
            raise MissingInput(
                f"no data file {path}",
                fix=f"did you mean {', '.join(close)}?" if close else "check data.train and data.eval",
            )
        else:
            self.origins.add(
                f"{source.path}, subset {source.subset}, split {source.split or 'train'}, revision "
                f"{source.revision}"
            )
            yield from _hub(source)

    def _file(self, path: str, columns: Columns) -> Iterator[Record]:
        self.origins.add(path if "://" in path else str(Path(path).resolve()))
        texts = {
            SHAREGPT_COLUMN,
            *(
                theirs
                for name, theirs in columns.model_dump().items()
                if theirs is not None and name not in MEASURED
            ),
        }
        return records(path, self.bad, texts, self.notes.append)


def _refuse(source: Source, what: str, *keys: str) -> None:
    """ConfigError for a key that this kind of source does not read. what: the kind of source."""
    for key in keys:
        value = getattr(source, key)
        if value is not None:
            why = "all its rows are read" if key != "revision" else "a revision is a commit of the hub"
            raise ConfigError(
                f"data: `{key}: {value}` has no meaning for {source.path}, which is {what}",
                why=why,
                fix=f"remove `{key}`",
            )


def _toy(source: Source) -> Iterator[Record]:
    split = source.split or "train"
    name = source.path.removeprefix("toy:")
    for i, record in enumerate(toy_rows(name, split, source.max_rows or DEFAULT_ROWS.get(split, 0))):
        yield Record(record, f"{source.path}:{i + 1}")


def _hub(source: Source) -> Iterator[Record]:
    if source.revision is None:
        raise ConfigError(
            f"data: {source.path} is not a local file, and a hub data set needs a pinned revision",
            why="a branch may change during a run",
            fix="write it as {path: ORG/NAME, revision: COMMIT}, or check the file name",
        )
    from datasets import load_dataset

    try:
        with cached_data_sets():
            dataset = load_dataset(
                source.path, source.subset, split=source.split or "train", revision=source.revision
            )
    except (OSError, ValueError) as error:
        if not hub.reachable():
            raise hub.absent(source.path, "data set") from error
        raise MissingInput(
            f"data set {source.path} cannot be loaded", why=str(error).splitlines()[0]
        ) from error
    for i, record in enumerate(dataset):
        yield Record(record, f"{source.path}:{i + 1}", filled=True)


@contextmanager
def cached_data_sets() -> Iterator[None]:
    """Lets `datasets` read its cache only if the hub cannot be reached."""
    import datasets.config
    from huggingface_hub import constants

    before = datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE
    if not hub.reachable():
        datasets.config.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        datasets.config.HF_HUB_OFFLINE, constants.HF_HUB_OFFLINE = before
