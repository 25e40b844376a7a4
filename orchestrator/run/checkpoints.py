"""Checkpoint folders on disk: committed atomically, verified by SHA-256 before use, the newest good one wins.

    .tmp-step_000120-<run>/  --write shards, fsync-->  MANIFEST.json last  --rename-->  step_000120/  -->  LATEST

A crash at any point leaves the checkpoints before it untouched. Files hold tensors (safetensors) and JSON, no
pickle.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from orchestrator.core import faults
from orchestrator.core.errors import CheckpointError, OutputError
from orchestrator.core.files import FileEntry, fsync_directory, sha256, write_atomically
from orchestrator.core.reports import Progress

FORMAT = 1
REPLACED = ".replaced"
GONE = ".gone-"
"""Begins the name of a checkpoint that is being removed."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A verified checkpoint: where it is and what the controller needs to go on."""

    directory: Path
    progress: Progress
    run: str
    extra_state: Mapping[str, Any]


class CheckpointStore:
    """The `checkpoints/` folder of one run. run: fingerprint of what decides the result; other runs' are
    refused."""

    def __init__(self, root: Path, *, run: str, keep: int, note: Callable[[str], None]) -> None:
        self.root, self.run, self.keep, self.note = root, run, keep, note

    def save(
        self, progress: Progress, facts: Mapping[str, Any], write: Callable[[Path], Sequence[FileEntry]]
    ) -> Path:
        """Commits a checkpoint; `write` puts the tensor files into the folder it is given. Older ones go
        after."""
        name = f"step_{progress.step:08d}"
        temporary = self.root / f".tmp-{name}-{uuid.uuid4().hex[:8]}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            entries = list(write(temporary))
            faults.inject("checkpoint.written", step=progress.step)
            self._write_manifest(temporary, progress, facts, entries)
            faults.inject("checkpoint.manifest", step=progress.step)
            self._publish(temporary, self.root / name, progress.step)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise OutputError(
                f"checkpoint of step {progress.step} could not be written to {self.root}",
                why=str(error),
                fix="free disk space or fix the permissions, then run the same command: it goes on from the "
                "last checkpoint",
            ) from error
        self._purge(name)
        return self.root / name

    def newest(self) -> Saved | None:
        """The newest checkpoint that verifies; each one passed over is named with its reason."""
        for directory in sorted(self.root.glob("step_*"), key=_age, reverse=True):
            try:
                saved = verify(directory)
            except CheckpointError as error:
                self.note(f"checkpoint {directory.name} is not used: {error.what} ({error.why})")
                continue
            if saved.run != self.run:
                raise OutputError(
                    f"{self.root.parent} holds another run's checkpoints",
                    why=f"{directory.name} was written by run {saved.run[:12]}, this recipe is run "
                    f"{self.run[:12]}",
                    fix="choose another --output, or use the recipe this folder was started with (its "
                    "recipe.yaml)",
                )
            return saved
        return None

    def _write_manifest(
        self, folder: Path, progress: Progress, facts: Mapping[str, Any], entries: Sequence[FileEntry]
    ) -> None:
        manifest = {
            "format": FORMAT,
            "run": self.run,
            "progress": asdict(progress),
            "facts": dict(facts),
            "files": [asdict(entry) for entry in sorted(entries, key=lambda e: e.path)],
        }
        manifest = json.loads(json.dumps(manifest))  # tuples and integer keys as a reader will see them
        body = json.dumps(manifest, indent=1, sort_keys=True)
        write_atomically(
            folder / "MANIFEST.json",
            json.dumps({"sha256": _digest(body), "manifest": manifest}, indent=1, sort_keys=True),
        )

    def _publish(self, temporary: Path, final: Path, step: int) -> None:
        replaced = final.with_name(final.name + REPLACED)
        if (
            final.exists()
        ):  # the same step written again: kept under another name until the new one is in place
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(final, replaced)
            faults.inject("checkpoint.replaced", step=step)
        os.rename(temporary, final)
        fsync_directory(self.root)
        faults.inject("checkpoint.renamed", step=step)
        write_atomically(self.root / "LATEST", final.name + "\n")

    def at(self, step: int | None) -> Saved:
        """The verified checkpoint of a step, None: the newest; CheckpointError where there is none."""
        there = sorted(int(d.name[5:]) for d in self.root.glob("step_????????"))
        if step is None and (saved := self.newest()) is not None:
            return saved
        if step not in there:
            fix = (
                f"there are steps {', '.join(map(str, there))}"
                if there
                else "checkpoint.every and checkpoint.final decide what stays"
            )
            raise CheckpointError(
                f"{self.root} holds no {'' if step is None else f'verified checkpoint of step {step}'}",
                fix=fix,
            )
        return verify(self.root / f"step_{step:08d}")

    def keep_only(self, count: int) -> None:
        """Removes all but the newest `count` checkpoints."""
        folders = sorted(d for d in self.root.glob("step_*") if d.suffix != REPLACED)
        for folder in folders[: len(folders) - count]:
            self._remove(folder)
        if count == 0:
            shutil.rmtree(self.root, ignore_errors=True)

    def _purge(self, newest: str) -> None:
        """Removes what is older, once the new one is whole on disk: each file is there with the size whose
        SHA-256 its writer read back."""
        verify(self.root / newest, content=False)
        folders = sorted(d for d in self.root.glob("step_*") if d.name <= newest and d.suffix != REPLACED)
        for folder in folders[: -self.keep]:
            self._remove(folder)
        for folder in [
            *self.root.glob(".tmp-*"),
            *self.root.glob(f"{GONE}*"),
            *self.root.glob(f"step_*{REPLACED}"),
        ]:
            shutil.rmtree(folder, ignore_errors=True)
        for file in self.root.glob(".LATEST.*"):
            file.unlink(missing_ok=True)

    def _remove(self, folder: Path) -> None:
        """Whole or not at all, as far as a reader sees."""
        gone = folder.with_name(f"{GONE}{folder.name}")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _age(directory: Path) -> tuple[str, bool]:
    """Sorts by step; of one step, the folder that was replaced is the older one."""
    return directory.name.removesuffix(REPLACED), directory.suffix != REPLACED


def verify(directory: Path, *, content: bool = True) -> Saved:
    """Checks every file of a checkpoint against its manifest; CheckpointError names the first that differs.
    content: False reads no file."""
    manifest = _read_manifest(directory)
    for entry in (FileEntry(**e) for e in manifest["files"]):
        path = directory / entry.path
        if not path.resolve().is_relative_to(directory.resolve()):
            raise CheckpointError(
                f"{entry.path} leaves the checkpoint folder", why="the manifest was tampered with"
            )
        if not path.is_file():
            raise CheckpointError(f"{entry.path} is missing", why=f"{directory} is incomplete")
        if path.stat().st_size != entry.size:
            raise CheckpointError(
                f"{entry.path} is truncated", why=f"{path.stat().st_size} bytes instead of {entry.size}"
            )
        if content and sha256(path) != entry.sha256:
            raise CheckpointError(
                f"{entry.path} is damaged", why="its SHA-256 is not the one in the manifest"
            )
    return Saved(directory, Progress(**manifest["progress"]), manifest["run"], manifest["facts"])


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / "MANIFEST.json"
    try:
        outer = json.loads(path.read_text())
        manifest = outer["manifest"]
        intact = outer["sha256"] == _digest(json.dumps(manifest, indent=1, sort_keys=True))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError("MANIFEST.json cannot be read", why=str(error)) from error
    if not intact or manifest.get("format") != FORMAT:
        raise CheckpointError("MANIFEST.json is damaged", why="its own SHA-256 or format does not match")
    return manifest


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
