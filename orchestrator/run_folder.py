"""The folder of one run: what lies where, who may write to it, and whether it belongs to this recipe.

    recipe.yaml  plan.json  run.json  metrics.jsonl  samples.jsonl  checkpoints/  export/  report.html  wandb/  logs/
"""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from orchestrator.checkpoints import write_atomically
from orchestrator.errors import OutputError


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of a run. fingerprint: of everything that decides its result, so that no other run can go on in here."""

    root: Path
    fingerprint: str

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    @property
    def export(self) -> Path:
        return self.root / "export"

    @property
    def critic_export(self) -> Path:
        return self.root / "export-critic"

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    @property
    def metrics(self) -> Path:
        return self.root / "metrics.jsonl"


@contextmanager
def open_run(root: Path, fingerprint: str, recipe_yaml: str, plan_json: str) -> Iterator[RunFolder]:
    """Locks the folder and writes what the run is; OutputError where it holds another run or one that is running."""
    folder = RunFolder(root, fingerprint)
    _refuse_passing(root)
    try:
        _refuse_foreign(root, fingerprint)
        root.mkdir(parents=True, exist_ok=True)
        lock = os.open(root / "run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _unwritable(root, error) from error
    with _locked(lock, root):
        _refuse_foreign(root, fingerprint)  # another process may have come first
        try:
            write_atomically(root / "run.json", json.dumps({"fingerprint": fingerprint}) + "\n")
            write_atomically(root / "recipe.yaml", recipe_yaml)
            write_atomically(root / "plan.json", plan_json + "\n")
            folder.logs.mkdir(exist_ok=True)
        except OSError as error:
            raise _unwritable(root, error) from error
        yield folder


def _refuse_passing(root: Path) -> None:
    """OutputError for a folder that Ray removes: a job's own copy of its working folder, where a relative --output leads."""
    if any(part.startswith("_ray_pkg_") for part in root.resolve().parts):
        raise OutputError(
            f"{root} lies in the working folder of a Ray job",
            why="Ray removes it when the job is over, and no other node sees it",
            fix="give --output as an absolute path on storage that all nodes share",
        )


def _refuse_foreign(root: Path, fingerprint: str) -> None:
    """OutputError where the folder holds another run or things of somebody else's."""
    existed = _identity(root)
    if existed is None:
        if root.is_dir() and any(p.name != "run.lock" and not p.name.startswith(".run.json.") for p in root.iterdir()):
            raise OutputError(f"{root} is not empty and holds no run", fix="choose a new folder as --output")
    elif existed != fingerprint:
        raise OutputError(
            f"{root} holds another run",
            why=f"run {existed[:12]} was started there, this recipe and data are run {fingerprint[:12]}",
            fix="choose another --output, or use the recipe this folder was started with (its recipe.yaml)",
        )


def _identity(root: Path) -> str | None:
    path = root / "run.json"
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text())["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise OutputError(f"{path} cannot be read", why=str(error), fix="choose another --output") from error


def _unwritable(root: Path, error: OSError) -> OutputError:
    return OutputError(f"{root} cannot be written", why=str(error), fix="choose another --output")


@contextmanager
def _locked(descriptor: int, root: Path) -> Iterator[None]:
    """One process per folder; the kernel frees the lock when the process dies, however it dies."""
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{root} is in use by another process", fix="wait for it, or choose another --output") from None
        yield
    finally:
        os.close(descriptor)
