"""Data files on a disk or behind a URL: their records, and the files of a folder that belong to a split.

A folder is read as its README.md declares (data/card.py), or else as the hub lays data sets out:

    DIR/train.jsonl
    DIR/data/train-00000-of-00002.parquet
    DIR/train/a.jsonl
    DIR/SUBSET/ with one of these

If no file name contains a split, all files are `train`.
"""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.core.errors import ConfigError, DataError, MissingInput
from orchestrator.data import card, csv_table
from orchestrator.data.bad_rows import BadRow

REFETCH = "fetch or write the file again, and check that it may be read"
USUAL = (".jsonl", ".jsonl.gz", ".json.gz", ".parquet")
"""Kinds that are read first: beside such files a .json or .csv mostly describes them."""
TABLES = {".csv": ",", ".csv.gz": ",", ".tsv": "\t", ".tsv.gz": "\t"}
"""Suffix -> separator of the columns."""
SUFFIXES = (*USUAL, ".json", *TABLES)
ABOUT = ("config.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json")
"""Files that describe the data of a folder and hold none, by the hub's names."""
SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
"""Words for splits in names of files and folders, as the hub reads them."""
OTHERS = (".arrow", ".jsonl.zst", ".jsonl.bz2")
"""Data that is not read here; it is reported if it lies beside data that is read."""
SHARD = re.compile(r"(?P<split>\w+(?:\.\w+)*)-\d{5}-of-\d{5,}")


@dataclass(frozen=True, slots=True)
class Record:
    """A record of a file."""

    value: Any
    where: str
    """Place of the record. Example: rows.jsonl:7"""
    filled: bool = False
    """The record comes from a table: see `to_rows` in data/formats.py."""


@dataclass(frozen=True, slots=True)
class Chosen:
    """The choice among the files of a folder."""

    files: tuple[Path, ...]
    """Files to read, in order."""
    passed_over: tuple[str, ...] = ()
    """Subfolders with data, and files of other kinds, that are not read."""


def choose(folder: Path, subset: str | None, split: str | None) -> Chosen:
    """The files of one split (default: the only one).

    ConfigError if the folder has several splits and none is named, or files of no split beside others;
    MissingInput if there are no files.
    """
    configs = card.declared(folder)
    if not configs:
        return _laid_out(folder, subset, split)
    config = card.subset_of(folder, configs, subset)
    by_split = card.files_of(folder, config, SUFFIXES)
    if by_split is None:
        below = config.get("data_dir")
        return _laid_out(folder / str(below), None, split) if below else _laid_out(folder, subset, split)
    return Chosen(tuple(by_split[split] if split in by_split else _of_split(folder, by_split, split)))


def _laid_out(folder: Path, subset: str | None, split: str | None) -> Chosen:
    """`choose` by the names of folders and files."""
    base = folder / subset if subset else folder
    if not base.is_dir():
        raise MissingInput(
            f"{folder} holds no subset {subset}",
            fix=f"it holds the folders {', '.join(_folders(folder)) or 'none'}",
        )
    own, others = _own_and_others(base)
    if not own and len(others) == 1:  # its only subset
        return _laid_out(base, others[0], split)
    if not own:
        if others:
            named = ", ".join(others)
            raise ConfigError(
                f"{base} holds data in the folders {named} only",
                fix=f"set `subset` to one of {named}: {{path: {folder}, subset: …}}",
            )
        raise MissingInput(f"{base} holds no data file", fix=f"put {', '.join(SUFFIXES)} files there")
    by_split: dict[str | None, list[Path]] = {}
    for file in own:
        by_split.setdefault(_split_of(file.relative_to(base)), []).append(file)
    unread = [
        p.name
        for p in sorted(base.iterdir())
        if p not in own and (_is_data(p) or p.name.endswith(OTHERS)) and not p.name.startswith(".")
    ]
    return Chosen(tuple(_of_split(folder, by_split, split)), tuple(others + unread))


def _of_split(folder: Path, by_split: Mapping[str | None, list[Path]], split: str | None) -> list[Path]:
    named = sorted((name for name in by_split if name is not None), key=lambda name: (name != "train", name))
    example = f"write {{path: {folder}, split: {named[0] if named else 'train'}}}"
    if split is not None:
        if exact := [file for files in by_split.values() for file in files if _stem(file) == split]:
            return exact
        wanted = split if split in by_split else SPLITS.get(split, split)
        if not named and wanted == "train":
            return by_split[None]
        if wanted not in by_split:
            why = f"its splits are {', '.join(named)}" if named else "no file name in it contains a split"
            raise MissingInput(f"{folder} holds no split {split}", why=why, fix=example)
        return by_split[wanted]
    if len(named) > 1:
        why = "held-out rows must not be trained on"
        raise ConfigError(
            f"{folder} holds the splits {', '.join(named)}, and none is named", why=why, fix=example
        )
    if named and None in by_split:
        loose = ", ".join(file.name for file in by_split[None][:3])
        raise ConfigError(
            f"{folder} holds the split {named[0]} and files of no split ({loose})",
            fix=f"{example}, or move the others away",
        )
    (files,) = by_split.values()
    return files


def _own_and_others(base: Path) -> tuple[list[Path], list[str]]:
    """(data files of a folder, its other folders that hold data files).

    Files of the folder itself, of `data` and of folders named after splits belong to it. If there are files
    of the usual kinds, only they count.
    """
    own = _files(base)
    others = []
    for name in _folders(base):
        inside = sorted(file for file in (base / name).rglob("*") if _is_data(file))
        if name == "data" or _word(name) is not None:
            own += inside
        elif inside:
            others.append(name)
    return [file for file in own if file.name.endswith(USUAL)] or own, others


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if _is_data(file))


def _folders(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _is_data(file: Path) -> bool:
    return (
        file.name.endswith(SUFFIXES)
        and not file.name.startswith(".")
        and file.name not in ABOUT
        and file.is_file()
    )


def _split_of(file: Path) -> str | None:
    """The split that the name of a file contains. file: relative to the data folder.

    A shard begins with its split (`train_prefs-00000-of-00001`). Else it is a word in the name of the file or
    of the nearest folder.
    """
    shard = SHARD.match(file.name)
    if shard is not None:
        return SPLITS.get(shard["split"], shard["split"])
    return next(
        (word for part in (_stem(file), *reversed(file.parts[:-1])) if (word := _word(part)) is not None),
        None,
    )


def _stem(file: Path) -> str:
    return next(file.name.removesuffix(suffix) for suffix in SUFFIXES if file.name.endswith(suffix))


def _word(name: str) -> str | None:
    words = [SPLITS[word] for word in re.split(r"[-._ ]|(?<=\D)(?=\d)", name.lower()) if word in SPLITS]
    return words[0] if words else None


def records(
    path: str, bad: list[BadRow], texts: Collection[str] = (), note: Callable[[str], None] = print
) -> Iterator[Record]:
    """Records of one file. path: local, or a URL.

    bad: gets lines that are not a record. texts: columns that stay text in a file without types. note: gets
    notes for the user.
    """
    if path.endswith(".parquet"):
        yield from _parquet(path, bad)
        return
    if not path.endswith(SUFFIXES):
        raise ConfigError(f"{path}: unknown kind of data file", fix=f"use one of {', '.join(SUFFIXES)}")
    separator = next((mark for suffix, mark in TABLES.items() if path.endswith(suffix)), None)
    if separator is not None:
        yield from _table(path, separator, bad, texts, note)
    elif path.endswith((".json", ".json.gz")) and (entries := _json_array(path)) is not None:
        yield from entries
    else:
        yield from _json_lines(path, bad)


def _json_lines(path: str, bad: list[BadRow]) -> Iterator[Record]:
    """Records of a file with an object in each line."""
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield Record(json.loads(line.rstrip().decode("utf-8")), where)
        except UnicodeDecodeError as error:
            bad.append(BadRow(where, f"not UTF-8 at byte {error.start}"))
        except json.JSONDecodeError as error:
            bad.append(BadRow(where, f"broken JSON: {error.msg} at column {error.colno}"))
        except RecursionError:
            bad.append(BadRow(where, "broken JSON: lists or objects are nested too deeply"))
        except ValueError as error:  # a number of thousands of digits
            bad.append(BadRow(where, f"broken JSON: {' '.join(str(error).split())[:120]}"))


def _json_array(path: str) -> list[Record] | None:
    """Records of a file that is one JSON array, by their number; None for a file of lines.

    DataError for a file that is neither.
    """
    content = b"".join(_lines(path))
    start = content[:4096].lstrip(b"\xef\xbb\xbf \t\r\n")
    first, _, rest = content.strip().partition(b"\n")
    if not start.startswith(b"[") and not (rest and first.strip() == b"{"):
        return None
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        fix = "fix the JSON, or write one object per line as .jsonl"
        raise DataError(f"{path}: broken JSON", why=" ".join(str(error).split())[:200], fix=fix) from error
    if isinstance(value, list):
        return [Record(entry, f"{path}:{number}") for number, entry in enumerate(value, start=1)]
    lists = [name for name, entry in value.items() if isinstance(entry, list)]
    why = f"it is one object, with {'the list ' + lists[0] if lists else 'no list'} in it"
    raise DataError(
        f"{path} does not hold an array of rows",
        why=why,
        fix="write the rows as one array, or one object per line as .jsonl",
    )


def _table(
    path: str, separator: str, bad: list[BadRow], texts: Collection[str], note: Callable[[str], None]
) -> Iterator[Record]:
    try:
        with _open(path) as raw, _unpacked(raw, path) as file:
            for value, line in csv_table.rows(file, path, separator, texts, bad, note):
                yield Record(value, f"{path}:{line}", filled=True)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read", why=str(error), fix=REFETCH) from error


def _unpacked(raw: BinaryIO, path: str) -> Any:
    return gzip.open(raw, "rb") if path.endswith(".gz") else raw


def _open(path: str) -> BinaryIO:
    """The file, opened for reading.

    ConfigError or MissingInput for a URL that cannot be opened, OSError for a local file.
    """
    if "://" not in path:
        return open(path, "rb")
    scheme, _, rest = path.partition("://")
    if "@" in rest.partition("/")[0]:
        why = "recipes are stored and logged"
        raise ConfigError(
            f"data: a {scheme}:// address with a user or a password in it",
            why=why,
            fix="set them as environment variables",
        )
    import fsspec

    try:
        opened: Any = fsspec.open(path, "rb")
        return opened.open()
    except (ImportError, ValueError) as error:
        fix = (
            'pip install "orchestrator[s3]"'
            if scheme in ("s3", "s3a")
            else f"install the fsspec package that reads {scheme}://"
        )
        raise ConfigError(f"data: {scheme}:// cannot be read", why=str(error), fix=fix) from error
    except OSError as error:
        raise MissingInput(
            f"no data file {path}", why=str(error), fix="check the name, the permissions and the endpoint"
        ) from error


def _lines(path: str) -> Iterator[bytes]:
    number = 0
    try:
        with _open(path) as raw, _unpacked(raw, path) as file:
            for number, line in enumerate(file, start=1):  # noqa: B007 (the error names it)
                yield line
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read after line {number}", why=str(error), fix=REFETCH) from error


def _parquet(path: str, bad: list[BadRow]) -> Iterator[Record]:
    """Records of a Parquet file. `datasets` would write a copy into its cache."""
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with _open(path) as raw, ParquetFile(raw) as file:
            for batch in file.iter_batches():
                for value in _values(batch):
                    number += 1
                    where = f"{path}:{number}"
                    if isinstance(value, Exception):
                        bad.append(
                            BadRow(
                                where,
                                f"a value that Python cannot hold: {' '.join(str(value).split())[:120]}",
                            )
                        )
                    else:
                        yield Record(value, where, filled=True)
    except (OSError, ArrowException) as error:
        raise DataError(f"{path} cannot be read", why=str(error), fix=REFETCH) from error


def _values(batch: Any) -> Iterator[dict[str, Any] | Exception]:
    """The rows of a batch, with an error in place of a row that cannot be converted.

    Such a row, as with a date beyond the year 9999, makes the conversion of the whole batch fail.
    """
    try:
        yield from batch.to_pylist(maps_as_pydicts="strict")
        return
    except (ValueError, OverflowError, KeyError) as error:  # ArrowInvalid is a ValueError
        if batch.num_rows == 1:
            yield error
            return
    for at in range(batch.num_rows):
        yield from _values(batch.slice(at, 1))
