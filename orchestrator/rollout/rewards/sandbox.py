"""A separate process for one reward function, which cannot harm the run.

    Sandbox (in an actor) --socket: length, JSON--> `python -m orchestrator.rollout.rewards.sandbox`
                                                        --> the user's function

The process starts with a clean environment (so its /proc/self/environ and its children are clean too), its
own session, an address space limited to that at its start plus `memory_bytes`, nothing on stdin, and a log
file for its output. Nothing is unpickled. If a call is late, the process group is killed and the next call
starts a new one. If the actor dies, the process sees its socket closed and ends its process group.

The sandbox protects a run from mistakes, not from hostile code, which runs as the same user and can read that
user's files and processes.
"""

import contextlib
import json
import math
import os
import resource
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orchestrator
from orchestrator.core.errors import ConfigError, OrchestratorError
from orchestrator.core.resources import NO_GPUS
from orchestrator.recipe.schema import RewardFunction, Rewards
from orchestrator.rollout.rewards.component import (
    Outcome,
    RewardCall,
    RewardFailure,
    invoke,
    validate_rewards,
)
from orchestrator.rollout.rewards.lookup import resolve

START_TIMEOUT_S = 120.0
"""Time for Python to start and import the user's module."""

MAX_ANSWER_BYTES = 256 * 1024 * 1024
KEPT = ("PATH", "HOME", "LANG", "TZ", "PYTHONPATH", "OMP_NUM_THREADS")
"""Variables that the process keeps."""
HEADER = struct.Struct(">Q")


@dataclass(frozen=True, slots=True)
class Confinement:
    """What the process may have."""

    environment: Mapping[str, str]
    """All of its variables."""
    memory_bytes: int
    """Limit above its address space at start."""
    folder: str
    """Working folder."""
    log: Path | None = None
    """File for its output; None drops it."""

    @classmethod
    def of(cls, rewards: Rewards, environment: Mapping[str, str], log: Path | None) -> "Confinement":
        """From the recipe and the driver's variables; it keeps KEPT, LC_* and rewards.environment."""
        kept = {k: v for k, v in environment.items() if k in KEPT or k.startswith("LC_")}
        named = {k: environment[k] for k in rewards.environment if k in environment}
        defaults = {"OMP_NUM_THREADS": "1", **NO_GPUS}  # it must not use the learners' devices
        return cls(defaults | kept | named, int(rewards.memory_limit_gb * 2**30), os.getcwd(), log)


class _Ended(Exception):
    """The other end of the socket is closed."""


class Sandbox:
    """Supervises the process of one function, for one thread at a time."""

    def __init__(self, function: RewardFunction, confinement: Confinement) -> None:
        self.function, self.confinement = function, confinement
        self.name = function.name
        self.process: subprocess.Popen[bytes] | None = None
        self.channel: socket.socket | None = None

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Starts the process, which imports the function; ConfigError if that fails."""
        self.close()
        ours, theirs = socket.socketpair()
        with theirs:
            self.channel, self.process = ours, self._launch(theirs)
        request = {
            "function": self.function.model_dump(mode="json"),
            "memory_bytes": self.confinement.memory_bytes,
        }
        try:
            answer = self._exchange(request, timeout_s)
            failure = answer.get("failure")
        except RewardFailure as error:
            failure = error.why
        if failure is not None:
            self.close()
            raise ConfigError(
                f"reward {self.name}: {self.function.function} cannot be loaded",
                why=str(failure),
                fix=self._see_log(),
            )

    def score(self, call: RewardCall, timeout_s: float) -> list[Outcome]:
        """One outcome per sample; RewardFailure if the function raised, was late, or ended its process."""
        if not len(call):
            return []
        if self.process is None:
            self._restart()
        answer = self._exchange(_request(self.name, call), timeout_s)
        if "failure" in answer:
            raise RewardFailure(f"reward {self.name} failed", why=str(answer["failure"]), fix=self._see_log())
        faults = answer.get("faults") or {}
        # Validated again here, since the process runs user code and may send anything.
        outcomes = validate_rewards(self.name, answer.get("rewards"), call.samples)
        return [
            RewardFailure(str(faults[str(i)])) if str(i) in faults else outcome
            for i, outcome in enumerate(outcomes)
        ]

    def close(self) -> None:
        """Kills the process group."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(timeout=30)
        if self.channel is not None:
            self.channel.close()
        self.process = self.channel = None

    def __enter__(self) -> "Sandbox":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _launch(self, theirs: socket.socket) -> "subprocess.Popen[bytes]":
        log = self.confinement.log
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
        command = ["orchestrator.rollout.rewards.sandbox", str(theirs.fileno())]
        with open(log or os.devnull, "ab") as output:
            return started_process(
                command,
                self.confinement.environment,
                self.confinement.folder,
                output,
                pass_fds=(theirs.fileno(),),
            )

    def _restart(self) -> None:
        try:
            self.start()
        except ConfigError as error:  # it has started before, so only this call fails
            raise RewardFailure(error.what, why=error.why, fix=error.fix) from error

    def _exchange(self, request: Any, timeout_s: float) -> dict[str, Any]:
        """Sends a request and waits for the answer. Without one in time the process is killed."""
        assert self.channel is not None and self.process is not None
        deadline = time.monotonic() + timeout_s
        try:
            self.channel.settimeout(timeout_s)
            _send(self.channel, request)
            answer = _receive(self.channel, lambda: self._seconds_left(deadline))
            if not isinstance(answer, dict):
                raise ValueError(f"a {type(answer).__name__}")
            return answer
        except TimeoutError:
            why = f"it did not answer within {timeout_s:.3g} s and was killed"
        except (_Ended, OSError):
            why = self._how_it_ended()
        except (ValueError, RecursionError) as error:
            why = f"its process sent an invalid answer: {str(error)[:80]}"
        self.close()
        raise RewardFailure(f"reward {self.name} failed", why=why, fix=self._see_log())

    def _seconds_left(self, deadline: float) -> float:
        """Seconds for the next wait; TimeoutError after the deadline, _Ended if the process has ended.

        Waits are short, since a process that ended may have left its end of the socket to a child.
        """
        assert self.process is not None
        seconds = deadline - time.monotonic()
        if seconds <= 0:
            raise TimeoutError
        if self.process.poll() is not None:
            assert self.channel is not None
            readable, _, _ = select.select([self.channel], [], [], 0)
            if not readable:
                raise _Ended
        return min(seconds, 0.2)

    def _how_it_ended(self) -> str:
        assert self.process is not None
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "its process closed its connection"
        return (
            f"its process was killed by signal {signal.Signals(-code).name}"
            if code < 0
            else f"its process ended itself with exit code {code}"
        )

    def _see_log(self) -> str:
        return (
            f"see {self.confinement.log}"
            if self.confinement.log is not None
            else "call the function alone to see why"
        )


def started_process(
    command: Sequence[str],
    environment: Mapping[str, str],
    folder: str,
    output: Any,
    *,
    stdin: int = subprocess.DEVNULL,
    pass_fds: Sequence[int] = (),
) -> "subprocess.Popen[bytes]":
    """Starts `python -m COMMAND` in its own session, with these variables alone.

    `output` is a file for stdout and stderr.
    """
    return subprocess.Popen(
        [sys.executable, "-u", "-m", *command],
        stdin=stdin,
        stdout=output,
        stderr=output,
        env=_with_package(environment),
        cwd=folder if os.path.isdir(folder) else None,
        pass_fds=tuple(pass_fds),
        start_new_session=True,
    )


def _with_package(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables, with a PYTHONPATH from which this package can be imported."""
    root = str(Path(orchestrator.__file__).resolve().parents[1])
    paths = [p for p in environment.get("PYTHONPATH", "").split(os.pathsep) if p]
    return {**environment, "PYTHONPATH": os.pathsep.join([*paths, root])}


def _request(name: str, call: RewardCall) -> dict[str, Any]:
    request = {
        "prompts": call.prompts,
        "completions": call.completions,
        "completion_ids": call.completion_ids,
        "samples": call.samples,
    }
    for column, values in call.columns.items():
        try:
            json.dumps(values, default=_plain)
        except (TypeError, ValueError) as error:
            what = f"reward {name}: the column {column} cannot be sent to its process"
            raise RewardFailure(
                what, why=str(error), fix="keep text, numbers and lists in the data"
            ) from error
    return {**request, "columns": call.columns}


def _plain(value: Any) -> Any:
    """numpy's values as JSON values; TypeError for other types."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is not a JSON value")


def _send(channel: socket.socket, message: Any) -> None:
    data = json.dumps(message, default=_plain).encode()
    channel.sendall(HEADER.pack(len(data)) + data)


def _receive(channel: socket.socket, seconds_left: Callable[[], float | None]) -> Any:
    """The next message.

    `seconds_left` gives the seconds of the next wait, or None to wait for ever, and raises at the deadline.
    """
    (size,) = HEADER.unpack(_exactly(channel, HEADER.size, seconds_left))
    if size > MAX_ANSWER_BYTES:
        raise ValueError(f"a message of {size} bytes")
    return json.loads(_exactly(channel, size, seconds_left))


def _exactly(channel: socket.socket, size: int, seconds_left: Callable[[], float | None]) -> bytes:
    data = bytearray()
    while len(data) < size:
        channel.settimeout(seconds_left())
        try:
            part = channel.recv(min(size - len(data), 1 << 20))
        except TimeoutError:
            continue
        if not part:
            raise _Ended
        data += part
    return bytes(data)


def main() -> None:
    """The process: imports the function, then answers calls until its socket is closed."""
    # SIGTERM is sent to all processes of a run that is stopped; the supervisor ends this one.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    channel = socket.socket(fileno=int(sys.argv[1]))
    channel.set_inheritable(False)
    threading.Thread(target=_end_with_supervisor, args=(channel,), daemon=True).start()
    setup = _receive(channel, lambda: None)
    _limit_memory(setup["memory_bytes"])
    function = RewardFunction.model_validate(setup["function"])
    try:
        callable_ = resolve(function)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        _send(channel, {"failure": describe_error(error, function)})
        return
    _send(channel, {"ready": True})
    while True:
        try:
            request = _receive(channel, lambda: None)
        except _Ended:
            return
        call = RewardCall(**request)
        _send(channel, _answer(function, callable_, call.given_to(function.function)))


def _answer(function: RewardFunction, callable_: Callable[..., Any], call: RewardCall) -> dict[str, Any]:
    try:
        outcomes = validate_rewards(function.name, invoke(function.name, callable_, call), call.samples)
    except RewardFailure as failure:
        return {"failure": failure.reason}
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        return {"failure": describe_error(error, function)}
    faults = {i: outcome.reason for i, outcome in enumerate(outcomes) if isinstance(outcome, RewardFailure)}
    return {"rewards": [0.0 if isinstance(o, RewardFailure) else o for o in outcomes], "faults": faults}


def describe_error(error: BaseException, function: RewardFunction) -> str:
    """An error of the user's function with its place, on one line."""
    if isinstance(error, SystemExit):
        return f"it called sys.exit({error.code!r})"
    if isinstance(error, OrchestratorError):
        return error.what
    frames: Sequence[traceback.FrameSummary] = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "orchestrator/rollout" not in f.filename and "importlib" not in f.filename]
    where = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    hint = ": the limit is rewards.memory_limit_gb" if isinstance(error, MemoryError) else ""
    message = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}{where}{': ' + message if message else ''}{hint}"


def _limit_memory(memory_bytes: int) -> None:
    """Limits the address space of this process and its children to `memory_bytes` more than now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = math.ceil(pages * resource.getpagesize() + memory_bytes)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _end_with_supervisor(channel: socket.socket) -> None:
    """Kills the process group once the supervisor is gone, whatever the function is doing."""
    poll = select.poll()
    poll.register(channel.fileno(), 0)  # only a hang-up wakes the poll
    poll.poll()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
