"""What was measured once and holds while what decides it is the same: on disk, by content.

kind, what decides --SHA-256 with the versions--> ~/.cache/orchestrator/KIND/KEY.json: what was found
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
"""Of this package, what computes: another version of it is another measurement."""


def cache_folder(kind: str) -> Path:
    """Where results of a kind lie: below XDG_CACHE_HOME, by default ~/.cache."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orchestrator" / kind


@dataclass(frozen=True, slots=True)
class Remembered:
    """One measurement. Example: Remembered("layout", {"model": fingerprint, "layout": "packed", …})."""

    kind: str
    deciding: Mapping[str, Any]

    def get(self) -> dict[str, Any] | None:
        """What was found before; None if nothing was, or if the file does not say."""
        try:
            found = json.loads(self._file().read_text())
        except (OSError, ValueError):  # gone, cut off: it is measured again
            return None
        return found if isinstance(found, dict) else None

    def put(self, found: Mapping[str, Any]) -> None:
        """Keeps it. A folder that cannot be written costs a measurement at the next start, and no more."""
        file = self._file()
        temporary = file.with_name(f".tmp-{file.name}-{os.getpid()}")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(dict(found)))
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
