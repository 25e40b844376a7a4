"""The folder of one run: its paths, its lock, and the check that it belongs to this recipe.

recipe.yaml  plan.json  run.json  metrics.jsonl  samples.jsonl  report.html
checkpoints/  export/  wandb/  logs/
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

from orchestrator.algorithms.schedule import learning_rate
from orchestrator.core.errors import OutputError
from orchestrator.core.files import read_lines, write_atomically
from orchestrator.recipe.fingerprint import MAY_CHANGE, TOKENS, Identity
from orchestrator.recipe.schema import Optimizer

DONE = "done_steps"
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL)
"""Errors of flock on a file system without locks."""


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Paths of a run, and what its files record."""

    root: Path
    fingerprint: str
    """SHA-256 of everything that decides the run's result. No other run can resume in this folder."""

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
        """Steps of the loop at the last export; 0 before the first."""
        return int((run_record(self.root) or {}).get(DONE, 0))

    def mark_done(self, steps: int) -> None:
        write_atomically(
            self.root / "run.json",
            json.dumps({**(run_record(self.root) or {}), DONE: steps}, indent=1) + "\n",
        )

    @property
    def saved_steps(self) -> int:
        """Step of the newest checkpoint, by its name; 0 without a checkpoint."""
        return max((int(d.name[5:13]) for d in self.checkpoints.glob("step_????????")), default=0)

    def evaluated(self, step: int) -> bool:
        """Whether metrics.jsonl holds the evaluation of a step."""
        lines = read_lines(self.metrics) if self.metrics.is_file() else []
        return any(
            line.get("step") == step and any(name.startswith("eval/") for name in line) for line in lines
        )


@dataclass(frozen=True, slots=True)
class End:
    """Where a run ends. run.max_steps or run.epochs may move it when the run is started again."""

    optimizer: Optimizer
    loop_steps: int
    """Steps of the loop, which run.max_steps counts."""
    each: int = 1
    """Optimizer steps per step of the loop."""
    allowed: bool = False
    """--extend: the end may move although the learning rate's schedule depends on it."""

    @property
    def steps(self) -> int:
        """Optimizer steps of the whole run, which the learning rate's schedule counts."""
        return self.loop_steps * self.each

    def other_rates(self, done: int, then: int) -> str | None:
        """Compares the learning rates of the `done` steps of the loop, taken in a run of `then` optimizer
        steps, with those of this end.

        None if all are equal: the longer run is then the same as one planned so from the start.
        """
        taken, total = done * self.each, self.steps
        differing = [
            s
            for s in range(taken)
            if learning_rate(self.optimizer, s, then) != learning_rate(self.optimizer, s, total)
        ]
        if not differing:
            return None
        last = taken - 1
        rates = (
            f"{learning_rate(self.optimizer, last, then):.3g}, in a run of {total} steps it has "
            f"{learning_rate(self.optimizer, last, total):.3g}"
        )
        return (
            f"{len(differing)} of the {taken} optimizer steps that are done had another learning rate: "
            f"the last one {rates}"
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
    """Locks the folder and writes run.json, recipe.yaml and plan.json.

    OutputError if the folder holds another run, or is in use by another process. note: prints which of the
    user's files have changed since the run began; end: where the run ends now.
    """
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
            note(_change_warning(name, then, now))
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
    """Content of run.json. changes: those found at this start; earlier ones are kept."""
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
    """(name, SHA-256 then, SHA-256 now) of each watched file or text that has changed."""
    then = before.get("watched", {})
    return [
        (name, then[name], now)
        for name, now in identity.watched.items()
        if name in then and then[name] != now
    ]


def _other_end(
    folder: RunFolder, before: Mapping[str, Any], end: End | None, note: Callable[[str], None]
) -> list[tuple[str, str, str]]:
    """The record of a moved end.

    OutputError if the steps that are done would have had other learning rates, unless --extend allows it.
    """
    then = before.get("schedule_steps")
    if end is None or then is None or then == end.steps:
        return []
    differing = end.other_rates(folder.saved_steps, then)
    if differing is not None and not end.allowed:
        raise OutputError(
            f"{folder.root} holds a run of {then} optimizer steps, this one has {end.steps}",
            why=f"optimizer.schedule={end.optimizer.schedule} depends on the end: {differing}",
            fix="add --extend to continue anyway, with the rates of the new end from the next step on; "
            "or choose another --output",
        )
    note(
        f"another end: {then} -> {end.steps} optimizer steps; "
        + (
            f"not what a run of {end.steps} steps from the start gives: {differing}"
            if differing
            else "the same as a run of that length from the start"
        )
    )
    return [("optimizer steps of the run", str(then), str(end.steps))]


def _change_warning(name: str, then: str, now: str) -> str:
    if name == TOKENS:
        why = (
            "rows, template and tokenizer are unchanged, so the template prints a date or the like, or "
            "this is another version of orchestrator"
        )
        return f"warning: the rows give other tokens than when the run began: {why}"
    return (
        f"warning: {name} has changed since the run began (SHA-256 {then[:12]} then, {now[:12]} now); "
        "the run continues with the present one"
    )


def _reject_ray_temp_folder(root: Path) -> None:
    """OutputError for a folder in a Ray job's copy of its working folder, which Ray removes.

    A relative --output leads there.
    """
    if any(part.startswith("_ray_pkg_") for part in root.resolve().parts):
        raise OutputError(
            f"{root} lies in the working folder of a Ray job",
            why="Ray removes that folder when the job ends, and no other node sees it",
            fix="give --output as an absolute path on storage that all nodes share",
        )


ROWS = "rows"
"""Folder inside a run folder of rows that were handed over in memory."""


def _reject_other_run(root: Path, identity: Identity) -> Mapping[str, Any]:
    """The content of run.json, empty for a new folder. OutputError if the folder holds another run, or files
    that are not a run's."""
    record = run_record(root)
    if record is None:
        if root.is_dir() and any(
            p.name not in ("run.lock", "run.owner", ROWS) and not p.name.startswith(".run.json.")
            for p in root.iterdir()
        ):
            raise OutputError(f"{root} is not empty and holds no run", fix="choose a new folder as --output")
        return {}
    if record["fingerprint"] == identity.fingerprint:
        return record
    fix = f"choose another --output, or set the keys back. These may change: {MAY_CHANGE}"
    if "deciding" not in record:
        why = (
            f"run {record['fingerprint'][:12]} was started there, this recipe and data are run "
            f"{identity.fingerprint[:12]}"
        )
        raise OutputError(f"{root} holds another run", why=why, fix=fix)
    differing = identity.differences(record["deciding"])
    why = "\n       ".join(
        differing[:10] + ([f"… and {len(differing) - 10} more"] if len(differing) > 10 else [])
    )
    many = "keys" if len(differing) > 1 else "key"
    raise OutputError(
        f"{root} holds another run, which differs in {len(differing)} {many} (there -> here)",
        why=why,
        fix=fix,
    )


def run_record(root: Path) -> dict[str, Any] | None:
    """The content of run.json; None if there is none."""
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
    """Lets one process use the folder. The kernel frees the lock when the process ends in whatever way."""
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
            owner = _claim(root)
        try:
            yield
        finally:
            if owner is not None:
                owner.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _claim(root: Path) -> Path:
    """Claims the folder with a file that names this host and process, for file systems without locks (Lustre
    without -o flock, some NFS and FUSE).

    The file of a process that has ended is replaced. OutputError if its process may still run.
    """
    path, me = root / "run.owner", {"host": socket.gethostname(), "pid": os.getpid()}
    while True:
        try:
            with path.open("x", encoding="utf-8") as file:
                json.dump(me, file)
            return path
        except FileExistsError:
            _reject_live_owner(root, path)
            path.unlink(missing_ok=True)
        except OSError as error:
            raise _unwritable(root, error) from error


def _reject_live_owner(root: Path, path: Path) -> None:
    """OutputError unless the owner's process has certainly ended."""
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
        why="its file system has no locks (flock), so this process cannot see whether that one still runs",
        fix=f"wait for it, or choose another --output; if it has ended, remove {path}",
    )
