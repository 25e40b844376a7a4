"""Measurements on disk, by content: a measurement holds as long as everything that decides it is the same.

kind, deciding --SHA-256 with the versions--> ~/.cache/orchestrator/KIND/KEY.json: result
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from orchestrator.core.files import fsync_directory, fsync_file

LIBRARIES = ("torch", "transformers", "deepspeed")
CODE = ("models", "learner", "algorithms/losses", "data/packing.py")
"""Parts of this package that compute: a change in them makes all measurements void."""


def cache_folder(kind: str) -> Path:
    """Folder of the results of a kind, below XDG_CACHE_HOME (by default ~/.cache)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orchestrator" / kind


@dataclass(frozen=True, slots=True)
class Remembered:
    """One measurement. Example: Remembered("layout", {"model": fingerprint, "layout": "packed", …})."""

    kind: str
    """Folder in the cache. Example: layouts."""
    deciding: Mapping[str, Any]
    """Everything that decides the result, apart from the versions of code and libraries."""

    def get(self) -> dict[str, Any] | None:
        """The result; None if there is none or its file is not readable."""
        try:
            result = json.loads(self._file().read_text())
        except (OSError, ValueError):  # missing or cut off: it is measured again
            return None
        return result if isinstance(result, dict) else None

    def put(self, result: Mapping[str, Any]) -> None:
        """Writes the result. If the folder cannot be written, the next start measures again."""
        file = self._file()
        temporary = file.with_name(f".tmp-{file.name}-{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(dict(result)))
            fsync_file(temporary)
            os.replace(temporary, file)
            fsync_directory(file.parent)
        except OSError:
            return

    def _file(self) -> Path:
        versions = {name: version(name) for name in LIBRARIES} | {"code": _code()}
        text = json.dumps({"versions": versions, **self.deciding}, sort_keys=True)
        return cache_folder(self.kind) / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"


def _code() -> str:
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    for place in (root / part for part in CODE):
        for file in sorted(place.rglob("*.py")) if place.is_dir() else [place]:
            digest.update(file.read_bytes())
    return digest.hexdigest()
