"""Which Ray a run uses: the cluster that RAY_ADDRESS names, or one that the run starts and that ends with it.

    RAY_ADDRESS set:  does a head answer within seconds? --> ray.init(address)
    not set:          short folder, token, signals held back --> ray.init("local")

A Ray that runs on the machine, or once ran there, is not joined unless RAY_ADDRESS names it.
"""

import errno
import os
import secrets
import shutil
import signal
import socket
import stat
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import ray
from ray._private import parameter, ray_constants, services, worker
from ray.exceptions import RayError

from orchestrator.cluster.deadlines import HEAD_ANSWER_S
from orchestrator.cluster.doctor.node import SHM
from orchestrator.cluster.quiet import without_small_talk
from orchestrator.core.errors import (
    ConfigError,
    DashboardUnreachable,
    Forbidden,
    NotEnoughResources,
    OutputError,
)
from orchestrator.core.stopping import STOPPING, held_back

OBJECT_STORE_BYTES = 256 * 1024 * 1024
"""Object store of a local Ray: batches, log-probs and rollouts. Published weights come on top
(`store_for`)."""
SHM_SHARE, RAM_SHARE = 0.9, 0.3
"""Limits of the object store: a part of the free /dev/shm, beyond which Ray would put the store on disk, and
a part of the RAM, to which /dev/shm belongs."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""First bytes of a gRPC client. A gRPC server answers with a SETTINGS frame, any other server does not."""
SETTINGS = 4
"""Type of that frame, its fourth byte."""
MAX_SOCKET_PATH = 107
"""Bytes that the path of a Unix socket may have."""
SOCKET = "/session_2026-11-27_00-00-00_000000_4194304/sockets/plasma_store"
"""The longest path that Ray makes below its folder."""
SETTINGS_OF_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 starves workers on a shared machine
    "RAY_prestart_worker_first_driver": "0",  # idle processes that no actor could use
    "RAY_enable_worker_prestart": "0",
}
"""Settings of a Ray that is started here, unless the user has set them."""
UV_HOOK = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
"""Variable that turns Ray's hook for `uv run` on or off."""
UNWRITABLE = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOTDIR,
    errno.ENOENT,
    errno.ENAMETOOLONG,
)
"""Error numbers of a folder that cannot be written."""


def connect(store: int = OBJECT_STORE_BYTES) -> None:
    """Joins the cluster of RAY_ADDRESS (set inside `ray job submit`), or starts a local Ray without a
    dashboard.

    store: bytes of the local Ray's object store.

    DashboardUnreachable if nothing answers there, Forbidden without the token, ConfigError if it is not the
    address of a cluster, OutputError without a folder for Ray, NotEnoughResources if Ray does not start.
    """
    if ray.is_initialized():
        return
    address = named_cluster()
    with held_back() if address is None else nullcontext(), _own_signals():
        _without_uv_hook()
        without_small_talk()
        _join(address) if address is not None else _start(store)


def named_cluster() -> str | None:
    """The value of RAY_ADDRESS; None if the run starts its own Ray."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return address if address not in ("", "local") else None


@contextmanager
def own_ray() -> Iterator[None]:
    """Ends a local Ray that is started inside: the next one may need a larger object store."""
    ours = not ray.is_initialized() and named_cluster() is None
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def store_for(weights: int) -> int:
    """Bytes of a local Ray's object store that holds `weights` bytes of published weights without spilling
    them to disk, as far as the machine has the memory."""
    shm = shutil.disk_usage(SHM).free * SHM_SHARE if SHM.is_dir() else float("inf")
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * RAM_SHARE
    return max(OBJECT_STORE_BYTES, int(min(OBJECT_STORE_BYTES + weights, shm, ram)))


_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}


def _join(named: str) -> None:
    """Joins the cluster of RAY_ADDRESS."""
    address = _resolved(named)
    _check_head(named, address)
    try:
        ray.init(address=address, **_QUIET)
    except (RuntimeError, ValueError, OSError, RayError) as error:
        why = " ".join(str(error).split())[:500]
        if "token" in why.lower() or "auth" in why.lower():
            raise Forbidden(
                f"the Ray at RAY_ADDRESS={named} refuses this process",
                why=why,
                fix="set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a copy of the head's ~/.ray/auth_token",
            ) from error
        fix = "run `ray status` there; unset RAY_ADDRESS to run on a Ray of this machine alone"
        raise DashboardUnreachable(
            f"the Ray at RAY_ADDRESS={named} cannot be joined", why=why, fix=fix
        ) from error


def _resolved(named: str) -> str:
    """host:port of the value of RAY_ADDRESS."""
    if "://" in named:
        client = named.startswith("ray://")
        raise ConfigError(
            f"RAY_ADDRESS={named} is "
            f"{'the address of a Ray Client server' if client else 'not the address of a Ray cluster'}",
            why="a run needs the head's own address"
            + ("" if client else "; http:// is the dashboard's, for `orchestrator submit --address`"),
            fix="set RAY_ADDRESS=HOST:6379 on a machine of the cluster, or unset it and use `orchestrator "
            "submit --address http://HOST:8265`",
        )
    if named == "auto":
        try:
            return services.canonicalize_bootstrap_address_or_die("auto")
        except ConnectionError as error:
            fix = "start one (`ray start --head`), or unset RAY_ADDRESS: then the run starts its own"
            raise DashboardUnreachable(
                "RAY_ADDRESS=auto, and no Ray runs on this machine", why=str(error), fix=fix
            ) from error
    host, colon, port = named.rpartition(":")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"RAY_ADDRESS={named} is not HOST:PORT",
            fix="set it to the head's address, e.g. 10.0.0.1:6379, or unset it",
        )
    return named


def _check_head(named: str, address: str) -> None:
    """DashboardUnreachable if no gRPC server answers at the address in time."""
    host, _, port = address.rpartition(":")
    fix = (
        "start the cluster, or unset RAY_ADDRESS (it may be left over from another one): then the run "
        "starts its own Ray"
    )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=HEAD_ANSWER_S) as connection:
            connection.settimeout(HEAD_ANSWER_S)
            connection.sendall(PREFACE)
            answer = connection.recv(9)
    except OSError as error:
        raise DashboardUnreachable(
            f"no Ray answers at RAY_ADDRESS={named}",
            why=error.strerror or str(error) or type(error).__name__,
            fix=fix,
        ) from error
    if len(answer) < 4 or answer[3] != SETTINGS:
        raise DashboardUnreachable(
            f"the server at RAY_ADDRESS={named} is not the head of a Ray cluster",
            why="it does not answer in gRPC",
            fix=fix,
        )


def _start(store: int) -> None:
    """Starts a Ray of this machine alone, whatever else runs or ran on it."""
    for name, value in SETTINGS_OF_RAY.items():
        os.environ.setdefault(name, value)
    _ensure_token()
    folder = _short_folder()
    try:
        with _lean():
            ray.init(
                address="local",
                include_dashboard=False,
                object_store_memory=store,
                _temp_dir=folder,
                **_QUIET,
            )
    except Exception as error:  # Ray raises plain Exceptions too
        why = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        if isinstance(error, OSError) and error.errno in UNWRITABLE:
            fix = "set RAY_TMPDIR to a folder that can be written"
            raise OutputError(f"Ray cannot write to {error.filename or folder}", why=why, fix=fix) from error
        fix = (
            f"see {folder}/session_latest/logs; free memory and processes (ulimit -u, -n), then run the "
            "same command again"
        )
        raise NotEnoughResources("Ray did not start on this machine", why=why, fix=fix) from error
    _protect_token()
    _kill_helpers_on_exit()


class _LeanParams(parameter.RayParams):
    """Parameters of a Ray without the processes that serve a cluster: the autoscaler, and the reader of logs,
    which is not used here."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**{**given, "no_monitor": True, "include_log_monitor": False})


@contextmanager
def _lean() -> Iterator[None]:
    """Makes ray.init use _LeanParams: it creates its parameters by this name, and has no option for these
    two."""
    usual = parameter.RayParams
    parameter.RayParams = _LeanParams
    try:
        yield
    finally:
        parameter.RayParams = usual


def _short_folder() -> str:
    """Folder of Ray's session: RAY_TMPDIR, else the temporary folder, else /tmp/ray-UID if that path is too
    long for sockets."""
    room = MAX_SOCKET_PATH - len(SOCKET)
    asked = os.environ.get("RAY_TMPDIR")
    folder = asked or os.path.join(tempfile.gettempdir(), "ray")
    if len(os.fsencode(folder)) <= room:
        return folder
    if asked:
        what = f"RAY_TMPDIR={asked} is too long: {len(os.fsencode(asked))} bytes"
        raise OutputError(
            what,
            why=f"Ray's Unix sockets lie below it, which leaves {room}",
            fix="name a shorter folder, e.g. RAY_TMPDIR=/tmp/ray",
        )
    own = Path(f"/tmp/ray-{os.getuid()}")
    try:
        own.mkdir(mode=0o700, exist_ok=True)
        info = own.lstat()
    except OSError as error:
        what = (
            f"the path of the temporary folder {tempfile.gettempdir()} is too long for Ray's sockets, and "
            f"{own} cannot be made"
        )
        raise OutputError(
            what,
            why=str(error),
            fix=f"set RAY_TMPDIR to a folder of at most {room} bytes that can be written",
        ) from error
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid():
        fix = f"set RAY_TMPDIR to a folder of at most {room} bytes"
        raise OutputError(
            f"{own} belongs to another user",
            why=f"the path {tempfile.gettempdir()} is too long for Ray's sockets",
            fix=fix,
        )
    return str(own)


def _ensure_token() -> None:
    """Gives Ray a token that lives as long as this process, if the home folder cannot be written: Ray keeps
    the token of its own cluster there."""
    if (
        os.environ.get("RAY_AUTH_MODE", "token") != "token"
        or os.environ.get("RAY_AUTH_TOKEN")
        or os.environ.get("RAY_AUTH_TOKEN_PATH")
    ):
        return
    folder = Path.home() / ".ray"
    if (folder / "auth_token").is_file():
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError:
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)


def _protect_token() -> None:
    """Makes Ray's token readable by its owner only: Ray writes it with the umask's mode."""
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file() and token.stat().st_uid == os.getuid() and stat.S_IMODE(token.stat().st_mode) & 0o077:
        token.chmod(0o600)


def _without_uv_hook() -> None:
    """Turns Ray's hook for `uv run` off, which would upload the project with its secrets, and run the workers
    in that copy. They use this interpreter already."""
    if UV_HOOK not in os.environ:
        os.environ[UV_HOOK] = "0"  # for the processes that are started
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False  # read when ray was imported


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keeps this process's signal handlers: Ray replaces that of SIGTERM by its crash handler, which would
    abort the run."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # None: not set from Python
                    signal.signal(number, handler)


def _kill_helpers_on_exit() -> None:
    """Makes Ray's end kill those of its processes that hold nothing. Ray sends SIGTERM, which they do not get
    as it is blocked, and waits a second for each before it kills it."""
    for kind, processes in getattr(worker._global_node, "all_processes", {}).items():
        if kind not in ("raylet", "gcs_server"):  # the raylet's own helpers need these to end properly
            for info in processes:
                info.process.terminate = info.process.kill
