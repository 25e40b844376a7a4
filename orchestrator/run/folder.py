"""The folder of one run: what lies where, who may write to it, and whether it belongs to this recipe.

recipe.yaml  plan.json  run.json  metrics.jsonl  samples.jsonl  checkpoints/  export/  report.html  wandb/  logs/
"""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.core.errors import OutputError
from orchestrator.core.files import read_lines, write_atomically
from orchestrator.recipe.fingerprint import MAY_CHANGE, TOKENS, Identity
from orchestrator.run.extension import End

DONE = "done_steps"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
"""What flock says on a file system that has none."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of a run. fingerprint: of everything that decides its result, so that no other run can go on in
    here."""

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

    @property
    def done_steps(self) -> int:
        """Steps of the loop after which the run was exported last; 0 before."""
        return int((run_record(self.root) or {}).get(DONE, 0))

    def mark_done(self, steps: int) -> None:
        write_atomically(
            self.root / "run.json",
            json.dumps({**(run_record(self.root) or {}), DONE: steps}, indent=1) + "\n",
        )

    @property
    def saved_steps(self) -> int:
        """Of the newest checkpoint by its name; 0 without any."""
        return max((int(d.name[5:13]) for d in self.checkpoints.glob("step_????????")), default=0)

    def evaluated(self, step: int) -> bool:
        """Is the evaluation of a step on record?"""
        lines = read_lines(self.metrics) if self.metrics.is_file() else []
        return any(
            line.get("step") == step and any(name.startswith("eval/") for name in line) for line in lines
        )


@contextmanager
def open_run(
    root: Path,
    identity: Identity,
    recipe_yaml: str,
    plan_json: str,
    note: Callable[[str], None] = print,
    *,
    end: End | None = None,
) -> Iterator[RunFolder]:
    """Locks the folder and writes what the run is; OutputError where it holds another run or one that is
    running. note: is told what of the user's files has changed since the run began; end: where the run ends
    now."""
    folder = RunFolder(root, identity.fingerprint)
    _reject_ray_temp_folder(root)
    try:
        _reject_other_run(root, identity)
        root.mkdir(parents=True, exist_ok=True)
        lock = os.open(root / "run.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise _unwritable(root, error) from error
    with _locked(lock, root):
        before = _reject_other_run(root, identity)  # another process may have come first
        changes = _changes(before, identity)
        for name, then, now in changes:
            note(_told(name, then, now))
        changes += _other_end(folder, before, end, note)
        try:
            write_atomically(
                root / "run.json", json.dumps(_record(before, identity, changes, end), indent=1) + "\n"
            )
            write_atomically(root / "recipe.yaml", recipe_yaml)
            write_atomically(root / "plan.json", plan_json + "\n")
            folder.logs.mkdir(exist_ok=True)
        except OSError as error:
            raise _unwritable(root, error) from error
        yield folder


def _record(
    before: Mapping[str, Any], identity: Identity, changes: Sequence[tuple[str, str, str]], end: End | None
) -> dict[str, Any]:
    """Content of run.json. changes: of this start, added to those of the starts before."""
    added = [{"at": time.time(), "what": name, "from": then, "to": now} for name, then, now in changes]
    return {
        "fingerprint": identity.fingerprint,
        "deciding": dict(identity.deciding),
        "watched": dict(identity.watched),
        "changes": [*before.get("changes", []), *added],
        **{key: before[key] for key in (DONE,) if key in before},
        **({"schedule_steps": end.steps} if end is not None else {}),
    }


def _changes(before: Mapping[str, Any], identity: Identity) -> list[tuple[str, str, str]]:
    """(name, SHA-256 then, now) of what is watched and is another now."""
    then = before.get("watched", {})
    return [
        (name, then[name], now)
        for name, now in identity.watched.items()
        if name in then and then[name] != now
    ]


def _other_end(
    folder: RunFolder, before: Mapping[str, Any], end: End | None, note: Callable[[str], None]
) -> list[tuple[str, str, str]]:
    """What is recorded of another end; OutputError where the steps that are done would have been others,
    unless the user wants it so."""
    then = before.get("schedule_steps")
    if end is None or then is None or then == end.steps:
        return []
    differing = end.other_rates(folder.saved_steps, then)
    if differing is not None and not end.allowed:
        raise OutputError(
            f"{folder.root} holds a run of {then} optimizer steps, this one has {end.steps}",
            why=f"optimizer.schedule={end.optimizer.schedule} looks at the end: {differing}",
            fix="add --extend to go on all the same, with the rates of the new end from the next step on; "
            "or choose another --output",
        )
    note(
        f"another end: {then} -> {end.steps} optimizer steps; "
        + (
            f"not what a run of {end.steps} steps from the start gives: {differing}"
            if differing
            else "as if it had been so from the start"
        )
    )
    return [("optimizer steps of the run", str(then), str(end.steps))]


def _told(name: str, then: str, now: str) -> str:
    if name == TOKENS:
        why = (
            "neither the rows nor the template nor the tokenizer are others, so the template prints a "
            "date or the like, or this is another version"
        )
        return f"warning: the rows become other tokens than when the run began: {why}"
    return (
        f"warning: {name} has changed since the run began (SHA-256 {then[:12]} then, {now[:12]} now); "
        "the run goes on with it as it is now"
    )


def _reject_ray_temp_folder(root: Path) -> None:
    """OutputError for a folder that Ray removes: a job's own copy of its working folder, where a relative
    --output leads."""
    if any(part.startswith("_ray_pkg_") for part in root.resolve().parts):
        raise OutputError(
            f"{root} lies in the working folder of a Ray job",
            why="Ray removes it when the job is over, and no other node sees it",
            fix="give --output as an absolute path on storage that all nodes share",
        )


def _reject_other_run(root: Path, identity: Identity) -> Mapping[str, Any]:
    """What run.json says, nothing in a new folder. OutputError where the folder holds another run or things
    of somebody else's."""
    there = run_record(root)
    if there is None:
        if root.is_dir() and any(
            p.name not in ("run.lock", "run.owner") and not p.name.startswith(".run.json.")
            for p in root.iterdir()
        ):
            raise OutputError(f"{root} is not empty and holds no run", fix="choose a new folder as --output")
        return {}
    if there["fingerprint"] == identity.fingerprint:
        return there
    other = f"choose another --output, or set them back. Free to change are {MAY_CHANGE}"
    if "deciding" not in there:
        why = (
            f"run {there['fingerprint'][:12]} was started there, this recipe and data are run "
            f"{identity.fingerprint[:12]}"
        )
        raise OutputError(f"{root} holds another run", why=why, fix=other)
    differing = identity.differences(there["deciding"])
    why = "\n       ".join(
        differing[:10] + ([f"… and {len(differing) - 10} more"] if len(differing) > 10 else [])
    )
    many = "keys" if len(differing) > 1 else "key"
    raise OutputError(
        f"{root} holds another run, which differs in {len(differing)} {many} (there -> here)",
        why=why,
        fix=other,
    )


def run_record(root: Path) -> dict[str, Any] | None:
    """What run.json says; None where there is none."""
    path = root / "run.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
        return {**content, "fingerprint": str(content["fingerprint"])}
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
            owner = None
        except BlockingIOError:
            raise OutputError(
                f"{root} is in use by another process", fix="wait for it, or choose another --output"
            ) from None
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise _unwritable(root, error) from error
            owner = _owned(root)
        try:
            yield
        finally:
            if owner is not None:
                owner.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _owned(root: Path) -> Path:
    """Where the file system knows no locks (Lustre without -o flock, some NFS and FUSE): a file that names
    this host and process, in the place of one whose process has ended. OutputError where another may be
    running."""
    path, me = root / "run.owner", {"host": socket.gethostname(), "pid": os.getpid()}
    while True:
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(me, file)
            return path
        except FileExistsError:
            _refuse_living(root, path)
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(root, error) from error


def _refuse_living(root: Path, path: Path) -> None:
    """OutputError unless the owner's process has ended for certain."""
    try:
        owner = json.loads(path.read_text())
        host, pid = str(owner["host"]), int(owner["pid"])
    except FileNotFoundError:
        return
    except (OSError, ValueError, KeyError, TypeError):
        host, pid = "an unknown host", 0
    if host == socket.gethostname() and not Path(f"/proc/{pid}").exists():
        return
    raise OutputError(
        f"{root} is in use by process {pid} on {host}",
        why="its file system has no locks (flock), so nobody can see from here whether that process still "
        "runs",
        fix=f"wait for it, or choose another --output; if it has ended, remove {path}",
    )
