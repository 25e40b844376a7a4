"""Checkpoint folders on disk: committed atomically, verified by SHA-256 before use, the newest good one wins.

    .tmp-step_00000120-1f3a09bc/ --shards, fsync--> MANIFEST.json last --rename--> step_00000120/ --> LATEST

A crash at any point leaves the earlier checkpoints untouched. Files hold tensors (safetensors) and JSON, no
pickle. `CheckpointStore` knows the folders; `RunCheckpoints` moves the learners' state in and out of them.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError

from orchestrator.cluster.ranks import Ranks
from orchestrator.core import faults
from orchestrator.core.errors import CheckpointError, OutputError
from orchestrator.core.files import FileEntry, fsync_directory, sha256, write_atomically
from orchestrator.core.reports import Progress
from orchestrator.learner.probes import adam_steps

FORMAT = 1
REPLACED = ".replaced"
GONE = ".gone-"
"""Prefix of a checkpoint that is being removed."""
Final = Literal["full", "weights", "none"]
WEIGHTS_ONLY = "weights_only"
"""Key in `extra_state` of a checkpoint without Adam's moments."""


@dataclass(frozen=True, slots=True)
class Saved:
    """A verified checkpoint."""

    directory: Path
    progress: Progress
    run: str
    """Fingerprint of the run that wrote it."""
    extra_state: Mapping[str, Any]
    """Keys: `base_model`, the fingerprint of the start weights; `adam_steps`, one per learner group; and
    `weights_only` (see WEIGHTS_ONLY)."""


class CheckpointStore:
    """The `checkpoints/` folder of one run.

    run: fingerprint of what decides the result; checkpoints of another run are refused. keep: newest
    checkpoints that stay; note: prints a line.
    """

    def __init__(self, root: Path, *, run: str, keep: int, note: Callable[[str], None]) -> None:
        self.root, self.run, self.keep, self.note = root, run, keep, note

    def save(
        self, progress: Progress, extra_state: Mapping[str, Any], write: Callable[[Path], Sequence[FileEntry]]
    ) -> Path:
        """Commits a checkpoint, then removes those beyond `keep`.

        write: puts the tensor files into the folder it is given, and returns their entries.
        """
        name = f"step_{progress.step:08d}"
        temporary = self.root / f".tmp-{name}-{uuid.uuid4().hex[:8]}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            temporary.mkdir()
            entries = list(write(temporary))
            faults.inject("checkpoint.written", step=progress.step)
            self._write_manifest(temporary, progress, extra_state, entries)
            faults.inject("checkpoint.manifest", step=progress.step)
            self._publish(temporary, self.root / name, progress.step)
        except (OSError, RuntimeError, SafetensorError) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise OutputError(
                f"checkpoint of step {progress.step} could not be written to {self.root}",
                why=str(error),
                fix="free disk space or fix the permissions, then run the same command: it resumes from the "
                "last checkpoint",
            ) from error
        self._purge(name)
        return self.root / name

    def newest(self) -> Saved | None:
        """The newest checkpoint that verifies. A damaged one is skipped with a note."""
        for directory in sorted(self.root.glob("step_*"), key=_age, reverse=True):
            try:
                saved = verify(directory)
            except CheckpointError as error:
                self.note(f"checkpoint {directory.name} is not used: {error.what} ({error.why})")
                continue
            if saved.run != self.run:
                raise OutputError(
                    f"{self.root.parent} holds another run's checkpoints",
                    why=f"run {saved.run[:12]} wrote {directory.name}, this recipe is run {self.run[:12]}",
                    fix="choose another --output, or use the recipe of that run (recipe.yaml in the folder)",
                )
            return saved
        return None

    def _write_manifest(
        self, folder: Path, progress: Progress, extra_state: Mapping[str, Any], entries: Sequence[FileEntry]
    ) -> None:
        manifest = {
            "format": FORMAT,
            "run": self.run,
            "progress": asdict(progress),
            "facts": dict(extra_state),
            "files": [asdict(entry) for entry in sorted(entries, key=lambda e: e.path)],
        }
        manifest = json.loads(json.dumps(manifest))  # tuples and integer keys become what a reader gets
        body = json.dumps(manifest, indent=1, sort_keys=True)
        write_atomically(
            folder / "MANIFEST.json",
            json.dumps({"sha256": _digest(body), "manifest": manifest}, indent=1, sort_keys=True),
        )

    def _publish(self, temporary: Path, final: Path, step: int) -> None:
        replaced = final.with_name(final.name + REPLACED)
        if final.exists():  # the same step again: the old one stays until the new one is in place
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(final, replaced)
            faults.inject("checkpoint.replaced", step=step)
        os.rename(temporary, final)
        fsync_directory(self.root)
        faults.inject("checkpoint.renamed", step=step)
        write_atomically(self.root / "LATEST", final.name + "\n")

    def at(self, step: int | None) -> Saved:
        """The verified checkpoint of a step (None: the newest); CheckpointError if there is none."""
        steps = sorted(int(d.name[5:]) for d in self.root.glob("step_????????"))
        if step is None and (saved := self.newest()) is not None:
            return saved
        if step not in steps:
            fix = (
                f"there are steps {', '.join(map(str, steps))}"
                if steps
                else "checkpoint.every and checkpoint.final decide what stays"
            )
            wanted = "verified checkpoint" if step is None else f"verified checkpoint of step {step}"
            raise CheckpointError(f"{self.root} holds no {wanted}", fix=fix)
        return verify(self.root / f"step_{step:08d}")

    def keep_only(self, count: int) -> None:
        """Removes all but the newest `count` checkpoints."""
        folders = sorted(d for d in self.root.glob("step_*") if d.suffix != REPLACED)
        for folder in folders[: len(folders) - count]:
            self._remove(folder)
        if count == 0:
            shutil.rmtree(self.root, ignore_errors=True)

    def _purge(self, newest: str) -> None:
        """Removes older checkpoints once the new one is complete: every file has the size of its manifest
        entry, whose SHA-256 the writer read back."""
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
        """Removes a checkpoint; a reader sees all of it or nothing."""
        gone = folder.with_name(f"{GONE}{folder.name}")
        shutil.rmtree(gone, ignore_errors=True)
        os.rename(folder, gone)
        shutil.rmtree(gone, ignore_errors=True)


def _age(directory: Path) -> tuple[str, bool]:
    """Sort key: the step, then the replaced folder of a step before its successor."""
    return directory.name.removesuffix(REPLACED), directory.suffix != REPLACED


def verify(directory: Path, *, content: bool = True) -> Saved:
    """Checks every file of a checkpoint against its manifest; CheckpointError names the first that differs.

    content: False compares sizes only and reads no file.
    """
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


class RunCheckpoints:
    """Implements roles.Checkpoints: saves and restores the learners of one run.

    learners: the policy's, then PPO's critic; saved: the newest verified checkpoint, if any; base:
    fingerprint of the start weights; final: recipe key checkpoint.final; last: last step of the run.
    """

    def __init__(
        self,
        store: CheckpointStore,
        learners: Sequence[Ranks],
        saved: Saved | None,
        base: str,
        *,
        final: Final = "full",
        last: int = 0,
    ) -> None:
        self.store, self.learners, self.saved, self.base = store, learners, saved, base
        self.final, self.last = final, last

    def restore(self) -> Progress:
        saved = self.saved
        if saved is None:
            return Progress()
        if saved.extra_state["base_model"] != self.base:
            raise OutputError(
                f"{saved.directory} was trained from other start weights than model.path holds now",
                why=f"fingerprint {saved.extra_state['base_model'][:12]} then, {self.base[:12]} now",
                fix="put the model back, or choose another --output",
            )
        refuse_without_optimizer(saved, self.last)
        for learners, steps in zip(self.learners, saved.extra_state["adam_steps"], strict=True):
            learners.load_state(saved.directory, 0 if saved.extra_state.get(WEIGHTS_ONLY) else steps)
        return saved.progress

    def save(self, progress: Progress) -> Path:
        def write(directory: Path) -> list[FileEntry]:
            return [
                entry
                for learners in self.learners
                for entry in learners.save_state(directory, moments=moments)
            ]

        moments = self.final == "full" or progress.step < self.last
        extra_state = {
            "base_model": self.base,
            "adam_steps": [learners.call(adam_steps)[0] for learners in self.learners],
        }
        extra_state |= {} if moments else {WEIGHTS_ONLY: True}
        return self.store.save(progress, extra_state, write)

    def finish(self) -> None:
        """After the export: removes the checkpoints that checkpoint.final does not keep."""
        if self.final != "full":
            self.store.keep_only(1 if self.final == "weights" else 0)


def refuse_without_optimizer(saved: Saved, last: int) -> None:
    """OutputError if a run of `last` steps would resume from a checkpoint without optimizer state."""
    if saved.extra_state.get(WEIGHTS_ONLY) and saved.progress.step < last:
        raise _not_extended(
            f"{saved.directory} holds weights only",
            "checkpoint.final was not `full` when the run ended, so Adam's moments were not kept",
        )


def refuse_without_checkpoint(folder: Path, done: int, last: int) -> None:
    """OutputError if a run of `last` steps would resume after `done` steps without any checkpoint."""
    if done < last:
        raise _not_extended(
            f"{folder} holds a run of {done} steps and no checkpoint",
            "checkpoint.final was `none` when the run ended",
        )


def _not_extended(what: str, why: str) -> OutputError:
    fix = (
        "start from its export with a fresh optimizer: model.path=RUN/export and another --output; "
        "with checkpoint.final=full a run can be extended"
    )
    return OutputError(f"{what}, and cannot be extended", why=why, fix=fix)
