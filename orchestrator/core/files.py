"""Files on disk: atomic writes, checksums, and JSON lines that survive a torn last line."""

import hashlib
import json
import math
import os
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.core.errors import DataError


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file of a checkpoint, as its manifest lists it."""

    path: str
    """Path relative to the checkpoint's folder. Example: "optimizer/exp_avg.safetensors"."""
    size: int
    """Size in bytes."""
    sha256: str
    """SHA-256 in hex."""

    @classmethod
    def of(cls, path: Path, root: Path) -> "FileEntry":
        """Entry of the file `path` below the folder `root`."""
        return cls(str(path.relative_to(root)), path.stat().st_size, sha256(path))


def sha256(path: Path) -> str:
    """SHA-256 of a file in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_file(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def fsync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Writes a text file. A reader sees the old content or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with temporary.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_directory(path.parent)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSONL file, without a torn last line. Raises DataError for a damaged line before the
    last."""
    return [record for _, record in _parsed(path)]


def _parsed(path: Path) -> list[tuple[str, dict[str, Any]]]:
    records: list[tuple[str, dict[str, Any]]] = []
    text = path.read_bytes().decode("utf-8", "replace")
    lines = text.rstrip("\n").split("\n")  # not splitlines, which also splits at U+2028
    for number, line in enumerate(lines, 1):
        record = _json_object(line)
        if record is not None:
            records.append((line, record))
        elif number < len(lines):
            raise DataError(
                f"{path}:{number}: not a JSON object",
                why="only the last line may be torn",
                fix="remove that line",
            )
    return records


def _json_object(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


def is_evaluation(line: Mapping[str, Any]) -> bool:
    """True for a line of metrics.jsonl that holds an evaluation and not a step."""
    return any(name.startswith("eval/") for name in line)


def json_line(record: Mapping[str, Any]) -> str:
    """One line of strict JSON in ASCII. nan and inf, which JSON does not have, become null."""
    return json.dumps({name: _finite(value) for name, value in record.items()}, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value
