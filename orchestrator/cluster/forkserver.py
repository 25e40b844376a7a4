"""Ray's workers on this machine, forked from one process that has imported what they need.

    driver --fork--> fork server (torch, transformers, deepspeed imported) --fork--> worker, worker, …
                          ^ unix socket
    raylet --starts--> fork_client.py: "be this worker", with its arguments, variables and files

Importing all libraries costs each process six seconds of a processor. A fork costs a few hundredths, and
shares the memory. Only a run's own Ray uses it, on Linux, on a machine without a GPU: CUDA does not survive a
fork.
"""

import atexit
import ctypes
import gc
import json
import os
import runpy
import selectors
import shlex
import signal
import socket
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from orchestrator.core.stopping import STOPPING
from orchestrator.plan.hardware import visible_gpus

CLIENT = Path(__file__).with_name("fork_client.py")
VARIABLE = "ORCHESTRATOR_FORK_SERVER"
"""Variable that holds the address on which the server of this run listens."""
BACKLOG = 64
"""Workers that may wait to be accepted."""
LENGTH_BYTES = 8
PR_SET_PDEATHSIG = 1


@contextmanager
def forked_workers(progress: Callable[[], AbstractContextManager[None]] = nullcontext) -> Iterator[None]:
    """Context in which the workers of a Ray that is started here are forked.

    progress: a context entered around the imports, which take seconds.

    If ray is not imported yet, the server is a fork of this process with all that workers need. Else it is a
    new process, since Ray's library reads what a worker is when it is loaded. Nothing changes where workers
    may not be forked (see above), or if the run joins another Ray.
    """
    own = os.environ.get("RAY_ADDRESS", "") in ("", "local")
    if sys.platform != "linux" or not own or VARIABLE in os.environ or _has_gpus(progress):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="fork-") as folder:
        address = str(Path(folder) / "socket")
        # open in this process only until the server has it
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
            listener.bind(address)
            listener.listen(BACKLOG)
            server = _spawned(listener) if "ray" in sys.modules else _forked(listener)
        os.environ[VARIABLE] = address
        try:
            yield
        finally:
            del os.environ[VARIABLE]
            os.kill(server, signal.SIGKILL)  # the workers that it forked belong to Ray and stay
            os.waitpid(server, 0)


def _has_gpus(progress: Callable[[], AbstractContextManager[None]]) -> bool:
    """Whether torch sees a GPU. torch is imported for it; all other libraries too if this process will become
    the server."""
    with progress():
        if "ray" not in sys.modules:
            _import()
        return bool(visible_gpus())


def py_executable(environment: Mapping[str, str]) -> str | None:
    """What replaces the interpreter in Ray's command line of a worker without a GPU; None keeps the
    interpreter."""
    address = environment.get(VARIABLE)
    return shlex.join([sys.executable, "-S", "-E", str(CLIENT), address]) if address else None


def _import() -> None:
    """Imports what takes a worker its time; none of it imports ray."""
    import orchestrator.learner.rank_learner
    import orchestrator.rollout.engines.transformers_engine  # noqa: F401
    from orchestrator.learner.engine import load_deepspeed

    load_deepspeed("cpu")


def _forked(listener: socket.socket) -> int:
    """Forks this process into the server; its process id."""
    driver = os.getpid()
    if server := os.fork():
        return server
    try:
        _end_with(driver)
        _serve(listener)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _spawned(listener: socket.socket) -> int:
    """Starts the server as a new process (see the end of this file); its process id."""
    listener.set_inheritable(True)
    command = [sys.executable, "-m", __name__, str(listener.fileno()), str(os.getpid())]
    return os.posix_spawn(command[0], command, os.environ)


def _end_with(parent: int) -> None:
    """Makes the kernel end this process when its parent is gone."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(0)


def _serve(listener: socket.socket) -> NoReturn:
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
    gc.collect()
    # else a collection in a worker would write to the pages that it shares with the others, and so copy them
    gc.freeze()
    children: dict[int, socket.socket] = {}
    reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(writer)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    with selectors.DefaultSelector() as waiting:
        waiting.register(listener, selectors.EVENT_READ)
        waiting.register(reader, selectors.EVENT_READ)
        while True:
            for key, _ in waiting.select():
                if key.fileobj is listener:
                    client, _ = listener.accept()
                    _fork(client, listener, children)
                else:
                    os.read(reader, 4096)
            _reap(children)


def _fork(client: socket.socket, listener: socket.socket, children: dict[int, socket.socket]) -> None:
    """Forks a worker for this client."""
    length, files, _, _ = socket.recv_fds(client, LENGTH_BYTES, 3)
    with client.makefile("rb") as stream:
        message = stream.read(int.from_bytes(length))
    pid = os.fork()
    if pid:
        children[pid] = client
        for file in files:
            os.close(file)
        return
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        listener.close()
        client.close()
        for other in children.values():
            other.close()
        _become(json.loads(message), files)
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # as an interpreter does at its end, which is not reached here
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _become(request: dict[str, Any], files: Sequence[int]) -> None:
    """Turns this process into the worker that the client was started to be."""
    for number, file in enumerate(files):
        os.dup2(file, number)
        os.close(file)
    for number in (*STOPPING, signal.SIGCHLD):
        signal.signal(number, signal.SIG_IGN if number in request["ignored"] else signal.SIG_DFL)
    if signal.SIGINT not in request["ignored"]:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, request["blocked"])
    os.setpgid(0, 0)  # Ray kills a worker with its process group; the server's group is the driver's
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["directory"])
    sys.argv = request["command"]
    runpy.run_path(sys.argv[0], run_name="__main__")


def _reap(children: dict[int, socket.socket]) -> None:
    """Sends exit codes to the clients of workers that have ended."""
    while children:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        client = children.pop(pid)
        with client:
            client.send(str(os.waitstatus_to_exitcode(status)).encode())


if __name__ == "__main__":
    _end_with(int(sys.argv[2]))
    _import()
    _serve(socket.socket(fileno=int(sys.argv[1])))
