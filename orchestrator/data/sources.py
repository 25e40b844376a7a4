"""Rows from files (local, or s3:// and what else fsspec opens), folders, the hub or the built-in toy task; bad rows named as
file:line: reason."""

import difflib
import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator import hub
from orchestrator.config import Columns, Data, Source
from orchestrator.data.rows import BadRecord, describe, to_rows
from orchestrator.data.toy import DEFAULT_ROWS, toy_rows
from orchestrator.errors import ConfigError, DataError, MissingInput
from orchestrator.records import DataKind, Row

REFETCH = "fetch or write the file again, and check that it may be read"
SUFFIXES = (".jsonl", ".jsonl.gz", ".json.gz", ".parquet")


@dataclass(frozen=True, slots=True)
class BadRow:
    """where: "file:line"."""

    where: str
    reason: str


@dataclass(frozen=True, slots=True)
class LoadedRows:
    """Validated rows of all sources in order. sizes, weights, names, formats: one per source."""

    rows: tuple[Row, ...]
    bad: tuple[BadRow, ...]
    sizes: tuple[int, ...]
    weights: tuple[float, ...]
    names: tuple[str, ...]
    formats: tuple[str, ...]
    fingerprint: str


def load_rows(spec: str | list[Source], data: Data, kind: DataKind) -> LoadedRows:
    """All rows of `spec`; DataError when more than data.max_bad_rows are bad, before anything expensive starts."""
    sources = [Source(path=spec)] if isinstance(spec, str) else spec  # pyright: ignore[reportCallIssue]
    rows: list[Row] = []
    bad: list[BadRow] = []
    sizes: list[int] = []
    formats: list[str] = []
    digest = hashlib.sha256()
    for index, source in enumerate(sources):
        start = len(rows)
        for fields, where in _read(source, source.columns or data.columns, kind, bad):
            digest.update(json.dumps(fields, sort_keys=True, default=str).encode())
            rows.append(Row(id=len(rows), where=where, source=index, **fields))
            if source.max_rows is not None and len(rows) - start >= source.max_rows:
                break
        sizes.append(len(rows) - start)
        formats.append(describe(rows[start]) if len(rows) > start else "empty")
    _check_bad(bad, data.max_bad_rows)
    if not rows:
        raise DataError("the data holds no usable row", why=", ".join(s.path for s in sources), fix="check data.train and data.columns")
    _check_margins(rows)
    return LoadedRows(
        tuple(rows),
        tuple(bad),
        tuple(sizes),
        tuple(s.weight for s in sources),
        tuple(Path(s.path).stem for s in sources),
        tuple(formats),
        digest.hexdigest(),
    )


def _check_bad(bad: list[BadRow], allowed: int) -> None:
    if len(bad) <= allowed:
        return
    shown = "\n".join(f"    {b.where}: {b.reason}" for b in bad[:10])
    more = f"\n    … and {len(bad) - 10} more" if len(bad) > 10 else ""
    raise DataError(
        f"{len(bad)} bad rows, data.max_bad_rows allows {allowed}",
        why=f"\n{shown}{more}",
        fix="mend the rows, map their names with data.columns, or raise data.max_bad_rows to leave them out",
    )


def _check_margins(rows: list[Row]) -> None:
    without = next((row.where for row in rows if row.margin is None), None)
    holder = next((row.where for row in rows if row.margin is not None), None)
    if without and holder:
        raise DataError(f"{without} has no margin, but {holder} has one", fix="give every row a margin, or rename the column to leave it out")


def _read(source: Source, columns: Columns, kind: DataKind, bad: list[BadRow]) -> Iterator[tuple[dict[str, Any], str]]:
    for record, where in _records(source, bad):
        try:
            for fields in to_rows(record, columns, kind):
                yield fields, where
        except BadRecord as error:
            bad.append(BadRow(where, str(error)))


def _records(source: Source, bad: list[BadRow]) -> Iterator[tuple[Any, str]]:
    if source.path.startswith("toy:"):
        name = source.path.removeprefix("toy:")
        for i, record in enumerate(toy_rows(name, source.split, source.max_rows or DEFAULT_ROWS.get(source.split, 0))):
            yield record, f"{source.path}:{i + 1}"
        return
    if "://" in source.path:
        yield from _file(source.path, bad)
        return
    path = Path(source.path)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.name.endswith(SUFFIXES))
        if not files:
            raise MissingInput(f"{path} holds no data file", fix=f"put {', '.join(SUFFIXES)} files there")
        for file in files:
            yield from _file(str(file), bad)
    elif path.is_file():
        yield from _file(str(path), bad)
    elif path.name.endswith(SUFFIXES) or path.is_absolute() or source.path.startswith(".") or source.path.count("/") > 1:
        near = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, near, n=3)
        raise MissingInput(f"no data file {path}", fix=f"did you mean {', '.join(close)}?" if close else "check data.train and data.eval")
    else:
        yield from _hub(source)


def _file(path: str, bad: list[BadRow]) -> Iterator[tuple[Any, str]]:
    """path: of a local file, or a URL."""
    if path.endswith(".parquet"):
        for number, record in enumerate(_parquet(path), start=1):
            yield record, f"{path}:{number}"
        return
    if not path.endswith(SUFFIXES):
        raise ConfigError(f"{path}: unknown kind of data file", fix=f"use one of {', '.join(SUFFIXES)}")
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield json.loads(line.rstrip().decode("utf-8")), where
        except UnicodeDecodeError as error:
            bad.append(BadRow(where, f"not UTF-8 at byte {error.start}"))
        except json.JSONDecodeError as error:
            bad.append(BadRow(where, f"broken JSON: {error.msg} at column {error.colno}"))


def _open(path: str) -> BinaryIO:
    """The file, for reading. ConfigError or MissingInput for a URL that cannot be opened; OSError for a local file."""
    if "://" not in path:
        return open(path, "rb")
    scheme, _, rest = path.partition("://")
    if "@" in rest.partition("/")[0]:
        why = "recipes are kept and logged"
        raise ConfigError(f"data: a {scheme}:// address with a user or a password in it", why=why, fix="put them into the environment")
    import fsspec

    try:
        opened: Any = fsspec.open(path, "rb")
        return opened.open()
    except (ImportError, ValueError) as error:
        fix = 'pip install "orchestrator[s3]"' if scheme in ("s3", "s3a") else "install the package of fsspec that reads it"
        raise ConfigError(f"data: {scheme}:// cannot be read here", why=str(error), fix=fix) from error
    except OSError as error:
        raise MissingInput(f"no data file {path}", why=str(error), fix="check the name, the permissions and the endpoint") from error


def _lines(path: str) -> Iterator[bytes]:
    number = 0
    try:
        with _open(path) as raw, gzip.open(raw, "rb") if path.endswith(".gz") else raw as file:
            for number, line in enumerate(file, start=1):  # noqa: B007 (the error names it)
                yield line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read after line {number}", why=str(error), fix=REFETCH) from error


def _parquet(path: str) -> Iterator[dict[str, Any]]:
    """Row by row; not through `datasets`, which would write a copy into its cache."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with _open(path) as raw, ParquetFile(raw) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except (OSError, ArrowException) as error:
        raise DataError(f"{path} cannot be read", why=str(error), fix=REFETCH) from error


def _hub(source: Source) -> Iterator[tuple[Any, str]]:
    if source.revision is None:
        raise ConfigError(
            f"data: {source.path} is no local file, and a hub data set needs a pinned revision",
            why="a branch may change under a run",
            fix="write it as {path: ORG/NAME, revision: COMMIT}, or check the file name",
        )
    from datasets import load_dataset

    try:
        with hub.cached_data_sets():
            dataset = load_dataset(source.path, source.subset, split=source.split, revision=source.revision)
    except (OSError, ValueError) as error:
        if not hub.reachable():
            raise hub.absent(source.path, "data set") from error
        raise MissingInput(f"data set {source.path} cannot be loaded", why=str(error).splitlines()[0]) from error
    for i, record in enumerate(dataset):
        yield record, f"{source.path}:{i + 1}"
