"""Which Ray a run is on: the cluster that RAY_ADDRESS names, or one that it starts for itself and that ends
with it.

    RAY_ADDRESS --knock, seconds--> ray.init(address)          none --short folder, token, signals held back--> ray.init("local")

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
"""For batches, log-probs and rollouts; published weights come on top (`store_for`)."""
SHM_SHARE, RAM_SHARE = 0.9, 0.3
"""Of what is free of /dev/shm, beyond which Ray would put its store on disk, and of the RAM, of which it is a
part."""
KNOCK_S = 5.0
"""For a cluster's head to answer a knock. Ray itself would wait a quarter of an hour."""
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00"
"""How a gRPC client begins; a gRPC server answers with settings, everything else with something else."""
SETTINGS = 4
"""The kind of frame, at the fourth byte."""
SOCKET_AT_MOST = 107
"""Bytes in the path of a Unix socket."""
SOCKET = "/session_2026-11-27_00-00-00_000000_4194304/sockets/plasma_store"
"""The longest path that Ray puts below its folder."""
SETTINGS_OF_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 starves workers on a machine that others use as well
    "RAY_prestart_worker_first_driver": "0",  # idle processes, of which none has what an actor asks for
    "RAY_enable_worker_prestart": "0",
}
"""Of a Ray that is started here, where the user has not set them."""
UV_HOOK = "RAY_ENABLE_UV_RUN_RUNTIME_ENV"
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


def connect(store: int = OBJECT_STORE_BYTES) -> None:
    """Joins the cluster of RAY_ADDRESS (set inside `ray job submit`), or starts a local Ray without a
    dashboard. store: bytes of its object store. Raises Unreachable (nothing answers there), ConfigError (that
    is no address of a cluster), OutputError (no folder for it) or NotEnoughResources (it does not start)."""
    if ray.is_initialized():
        return
    address = named_cluster()
    with held_back() if address is None else nullcontext(), _own_signals():
        _without_uv_hook()
        without_small_talk()
        _join(address) if address is not None else _start(store)


def named_cluster() -> str | None:
    """What RAY_ADDRESS says, None where the run has a Ray of its own."""
    address = os.environ.get("RAY_ADDRESS", "").strip()
    return address if address not in ("", "local") else None


@contextmanager
def own_ray() -> Iterator[None]:
    """A local Ray that is started inside ends with it: the next one may need a larger object store."""
    ours = not ray.is_initialized() and named_cluster() is None
    try:
        yield
    finally:
        if ours:
            ray.shutdown()


def store_for(weights: int) -> int:
    """Bytes of a local Ray's object store that holds so many bytes of published weights without spilling them
    to disk, as far as the machine has the memory."""
    shm = shutil.disk_usage(SHM).free * SHM_SHARE if SHM.is_dir() else float("inf")
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * RAM_SHARE
    return max(OBJECT_STORE_BYTES, int(min(OBJECT_STORE_BYTES + weights, shm, ram)))


_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}


def _join(named: str) -> None:
    """The cluster of RAY_ADDRESS."""
    address = _resolved(named)
    _knock(named, address)
    try:
        ray.init(address=address, **_QUIET)
    except (RuntimeError, ValueError, OSError, RayError) as error:
        why = " ".join(str(error).split())[:500]
        if "token" in why.lower() or "auth" in why.lower():
            raise Forbidden(
                f"the Ray at RAY_ADDRESS={named} refuses us",
                why=why,
                fix="set RAY_AUTH_TOKEN, or RAY_AUTH_TOKEN_PATH to a copy of the head's ~/.ray/auth_token",
            ) from error
        fix = "look there with `ray status`; unset RAY_ADDRESS to run on a Ray of this machine alone"
        raise DashboardUnreachable(
            f"the Ray at RAY_ADDRESS={named} cannot be joined", why=why, fix=fix
        ) from error


def _resolved(named: str) -> str:
    """host:port of what RAY_ADDRESS says."""
    if "://" in named:
        client = named.startswith("ray://")
        raise ConfigError(
            f"RAY_ADDRESS={named} is "
            f"{'the address of a Ray Client server' if client else 'no address of a Ray cluster'}",
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
            f"RAY_ADDRESS={named} is no HOST:PORT",
            fix="set it to the head's address, e.g. 10.0.0.1:6379, or unset it",
        )
    return named


def _knock(named: str, address: str) -> None:
    """Unreachable where no gRPC server answers at the address in time."""
    host, _, port = address.rpartition(":")
    fix = (
        "start the cluster, or unset RAY_ADDRESS (it may be left over from another one): then the run "
        "starts a Ray of its own"
    )
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=KNOCK_S) as door:
            door.settimeout(KNOCK_S)
            door.sendall(PREFACE)
            answer = door.recv(9)
    except OSError as error:
        raise DashboardUnreachable(
            f"no Ray answers at RAY_ADDRESS={named}",
            why=error.strerror or str(error) or type(error).__name__,
            fix=fix,
        ) from error
    if len(answer) < 4 or answer[3] != SETTINGS:
        raise DashboardUnreachable(
            f"what answers at RAY_ADDRESS={named} is no head of a Ray cluster",
            why="it does not speak gRPC",
            fix=fix,
        )


def _start(store: int) -> None:
    """A Ray of this machine alone, whatever else runs or ran on it."""
    for name, value in SETTINGS_OF_RAY.items():
        os.environ.setdefault(name, value)
    _have_token()
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
    _end_helpers_at_once()


class _LeanParams(parameter.RayParams):
    """A Ray without the processes that serve a cluster: the autoscaler, and the reader of logs, which nobody
    asks for here."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**{**given, "no_monitor": True, "include_log_monitor": False})


@contextmanager
def _lean() -> Iterator[None]:
    """ray.init makes its parameters by this name, and offers none of these two."""
    whole = parameter.RayParams
    parameter.RayParams = _LeanParams
    try:
        yield
    finally:
        parameter.RayParams = whole


def _short_folder() -> str:
    """Where Ray puts its session: RAY_TMPDIR, else the temporary folder, else one of our own where that path
    is too long for sockets."""
    room = SOCKET_AT_MOST - len(SOCKET)
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
            f"the temporary folder {tempfile.gettempdir()} has too long a path for Ray's sockets, and "
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
            f"{own} is somebody else's",
            why=f"{tempfile.gettempdir()} has too long a path for Ray's sockets",
            fix=fix,
        )
    return str(own)


def _have_token() -> None:
    """Ray keeps the token of its own cluster in the home folder. Where that cannot be written it gets one
    that lives as long as this process."""
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
    """Ray writes its token with the umask's mode; only the owner may read it."""
    token = Path.home() / ".ray" / "auth_token"
    if token.is_file() and token.stat().st_uid == os.getuid() and stat.S_IMODE(token.stat().st_mode) & 0o077:
        token.chmod(0o600)


def _without_uv_hook() -> None:
    """Under `uv run` Ray would upload the project, secrets and all, and run the workers in that copy. They
    use this interpreter already."""
    if UV_HOOK not in os.environ:
        os.environ[UV_HOOK] = "0"  # for the processes that are started
        ray_constants.RAY_ENABLE_UV_RUN_RUNTIME_ENV = False  # read when ray was imported


@contextmanager
def _own_signals() -> Iterator[None]:
    """Keeps this process's handlers: Ray puts its crash handler in the place of SIGTERM's, which would abort
    the run."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # None: not set from Python
                    signal.signal(number, handler)


def _end_helpers_at_once() -> None:
    """Ray ends its processes with SIGTERM, which they do not get, and waits a second for each before it kills
    it. Those that hold nothing are killed at once."""
    for kind, processes in getattr(worker._global_node, "all_processes", {}).items():
        if kind not in (
            "raylet",
            "gcs_server",
        ):  # the raylet's own helpers end in peace only while these answer
            for info in processes:
                info.process.terminate = info.process.kill
