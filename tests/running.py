"""Runs of the program for tests, in separate processes or in this one on a shared local Ray. All processes
and files are removed."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file

from orchestrator.cluster.forkserver import VARIABLE as FORK_SERVER
from orchestrator.core.faults import VARIABLE
from orchestrator.recipe.loading import load
from orchestrator.run.supervise import Outcome, train

REPOSITORY = Path(__file__).resolve().parent.parent
TAG = "ORCHESTRATOR_TEST_RUN"
"""Environment variable of every process that a test starts, and of their children; each test has its own
value."""
FEW = "[{path: toy:%s, max_rows: 64}]"
"""Data for four steps of 16 rows. With few rows the reference pass is short."""

LINGERING = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
"""Ray's helper processes, which end up to a minute after their cluster."""

Fault = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Finished:
    """Exit code and output of a command."""

    code: int
    out: str
    err: str


class Sandbox:
    """Home, Ray folder and tag of a test's processes. address: address of a running Ray to join."""

    def __init__(self, root: Path, address: str | None = None) -> None:
        self.root, self.address = root, address
        self.tag = uuid.uuid4().hex
        # short: the path of a socket in it may have 107 characters
        self.ray_folder = Path(tempfile.mkdtemp(prefix="o"))
        (root / "home").mkdir(parents=True, exist_ok=True)
        self._started: list[subprocess.Popen[bytes]] = []

    def environment(self, faults: Sequence[Fault] = ()) -> dict[str, str]:
        """Environment of the processes."""
        # WANDB_SERVICE names a process of wandb that ends with this one
        removed = (VARIABLE, "WANDB_SERVICE", *(() if self.address else (FORK_SERVER,)))
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") and k not in removed}
        own = {
            "HOME": str(self.root / "home"),
            "XDG_CACHE_HOME": str(self.root / "home" / ".cache"),
            "RAY_TMPDIR": str(self.ray_folder),
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
            **(self._joining() if self.address else {}),
            **({VARIABLE: json.dumps(list(faults))} if faults else {}),
            TAG: self.tag,  # last: a process that changes its title overwrites the first ones
        }
        return inherited | own

    def _joining(self) -> dict[str, str]:
        """Variables for a running Ray, whose token lies in the home of the user who started it."""
        assert self.address is not None
        return {
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(Path.home() / ".ray" / "auth_token"),
        }

    def start(self, *arguments: str | Path, faults: Sequence[Fault] = ()) -> "Command":
        """Starts the program in its own process group."""
        number = len(self._started)
        out, err = self.root / f"out-{number}.txt", self.root / f"err-{number}.txt"
        # files, since a worker that outlives its driver would keep a pipe open
        with out.open("wb") as out_file, err.open("wb") as err_file:
            process = subprocess.Popen(
                [sys.executable, "-m", "orchestrator", *map(str, arguments)],
                cwd=REPOSITORY,
                env=self.environment(faults),
                stdin=subprocess.DEVNULL,
                stdout=out_file,
                stderr=err_file,
                start_new_session=True,
            )
        self._started.append(process)
        return Command(process, out, err)

    def run(self, *arguments: str | Path, faults: Sequence[Fault] = (), timeout: float = 240.0) -> Finished:
        """Runs the program to its end."""
        return self.start(*arguments, faults=faults).finish(timeout)

    def living(self) -> dict[int, str]:
        """Process id -> command line, of processes with the tag or in the session of a started command."""
        sessions = {process.pid for process in self._started}
        started = {*carriers(self.tag), *(pid for pid in _processes() if _session(pid) in sessions)}
        return {pid: _command_line(pid) for pid in started if pid != os.getpid()}

    def kill_all(self) -> None:
        """Sends SIGKILL to every process of the test: driver, Ray, workers."""
        for pid in self.living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def close(self, patience_s: float = 60.0) -> None:
        """Ends all processes and removes the Ray folder. Fails if a process outlived its driver."""
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        wait_until(lambda: not self._outliving(), patience_s)
        survivors = self._outliving()
        self.kill_all()
        shutil.rmtree(self.ray_folder, ignore_errors=True)
        assert not survivors, f"still running {patience_s:.0f} s after the driver: {survivors}"

    def _outliving(self) -> dict[int, str]:
        return {pid: name for pid, name in self.living().items() if not name.startswith(LINGERING)}


@dataclass(frozen=True, slots=True)
class Command:
    """A running command. out, err: files with its output so far."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def finish(self, timeout: float = 240.0) -> Finished:
        """Waits for the end. A command that takes longer is killed and fails the test."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            output = f"{self.out.read_text()[-3000:]}\n{self.err.read_text()[-3000:]}"
            pytest.fail(f"not ended after {timeout:.0f} s; its output:\n{output}")
        return Finished(code, self.out.read_text(), self.err.read_text())

    def wait_for(self, text: str, timeout: float = 240.0) -> None:
        """Waits until the command has printed `text`."""
        arrived = wait_until(
            lambda: text in self.out.read_text() or self.process.poll() is not None, timeout, pause_s=0.02
        )
        stdout = self.out.read_text()
        assert arrived and text in stdout, (
            f"never printed {text!r}:\n{stdout[-3000:]}\n{self.err.read_text()[-3000:]}"
        )


def wait_until(condition: Callable[[], bool], timeout: float, pause_s: float = 0.2) -> bool:
    """True as soon as the condition holds, False if it does not within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause_s)
    return True


def carriers(tag: str) -> list[int]:
    """Ids of the processes with a test's tag."""
    return [pid for pid in _processes() if _carries(pid, tag)]


def _processes() -> list[int]:
    return [int(folder.name) for folder in Path("/proc").glob("[0-9]*")]


def _carries(pid: int, tag: str) -> bool:
    try:
        return f"{TAG}={tag}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:  # it has ended, or belongs to another user
        return False


def _session(pid: int) -> int | None:
    """The session of a running process; None if it has ended, or is a zombie."""
    try:
        state, _, _, session = Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2].split()[:4]
    except OSError:
        return None
    return None if state == "Z" else int(session)


def _command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:120]
    except OSError:
        return "ended"


@dataclass(frozen=True, slots=True)
class Shared:
    """One local Ray for several runs, and a sandbox whose commands join it. root: parent of the run
    folders."""

    root: Path
    sandbox: Sandbox

    def train(self, recipe: str, folder: str, *overrides: str) -> tuple[Outcome, str]:
        """Trains in this process; (outcome, console output)."""
        loaded = load(recipe, [*self.overrides(), *overrides]).stages[0].recipe
        with (self.root / f"{folder}.txt").open("a+") as output:
            outcome = train(loaded, self.root / folder, Console(file=output, width=200))
            output.seek(0)
            return outcome, output.read()

    def train_last(self, recipe: str, model: Path, folder: str, *overrides: str) -> tuple[Outcome, str]:
        """Trains the last stage of a pipeline, from an existing model. overrides: of that stage."""
        stage = load(recipe).stages[-1].name
        changes = [f"{stage}:{change}" for change in (*self.overrides(), *overrides)]
        last = load(recipe, changes).stages[-1].recipe
        last = last.model_copy(update={"model": last.model.model_copy(update={"path": str(model)})})
        with (self.root / f"{folder}.txt").open("a+") as output:
            outcome = train(last, self.root / folder, Console(file=output, width=200))
            output.seek(0)
            return outcome, output.read()

    def overrides(self) -> list[str]:
        """Overrides that make a run small and keep it in the sandbox."""
        return [f"reference.cache_dir={self.root / 'reference'}", "learners.cpus_per_worker=0.5"]


@contextmanager
def shared_ray(root: Path) -> Iterator[Shared]:
    """Starts Ray once for all runs in this process; ends it with all its processes."""
    import ray
    import wandb

    from orchestrator.cluster.forkserver import forked_workers
    from orchestrator.cluster.joining import connect

    sandbox = Sandbox(root)
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        # HOME stays: Ray reads its token there once per process, for all clusters of the process
        for name, value in (sandbox.environment() | {"HOME": str(Path.home())}).items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        stack.enter_context(forked_workers())
        try:
            connect()
            sandbox.address = ray.get_runtime_context().gcs_address
            yield Shared(root, sandbox)
        finally:
            wandb.teardown()
            ray.shutdown()
            stack.close()
            sandbox.close()


@contextmanager
def planned_faults(*faults: Fault) -> Iterator[None]:
    """Injects faults into the runs of this process and their workers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(VARIABLE, json.dumps(list(faults)))
        yield


def metrics(folder: Path) -> list[dict[str, Any]]:
    """Lines of training steps in metrics.jsonl."""
    return [
        line
        for line in every_line(folder / "metrics.jsonl")
        if not any(name.startswith("eval/") for name in line)
    ]


def every_line(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def steps(folder: Path) -> list[int]:
    """Step numbers of the training steps in metrics.jsonl, in file order."""
    return [line["step"] for line in metrics(folder)]


def exported_hash(folder: Path) -> str:
    """SHA-256 of the exported weights."""
    digest = hashlib.sha256()
    for path in sorted((folder / "export").glob("*.safetensors")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def exported(folder: Path) -> dict[str, np.ndarray]:
    """The exported weights by name."""
    return {
        name: value
        for path in sorted((folder / "export").glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


def distance(weights: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """Norm of the difference over the norm of `weights`."""
    assert weights.keys() == other.keys()
    gap = sum(float(np.square(weights[n] - other[n], dtype=np.float64).sum()) for n in weights)
    return float(np.sqrt(gap / sum(float(np.square(v, dtype=np.float64).sum()) for v in weights.values())))
