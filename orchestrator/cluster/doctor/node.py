"""What this process sees of the machine it runs on: versions, devices, limits, storage, the way to the hub
and to wandb."""

import fcntl
import netrc
import os
import platform
import resource
import shutil
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from contextlib import suppress
from http.client import HTTPException
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from urllib.parse import urlparse

from packaging.requirements import Requirement

from orchestrator import __version__
from orchestrator.cluster.doctor.facts import (
    Gpu,
    Limits,
    MissingModel,
    ModelSource,
    NodeFacts,
    Storage,
    UnmetRequirement,
)

LIBRARIES = ("torch", "deepspeed", "ray", "transformers", "trl", "peft", "numpy", "safetensors")
"""What runs on every node; of two versions of one, results or messages may differ."""
MISSING = "missing"
ANSWER_S = 5.0
"""Deadline of one question to a server."""
SMI_S = 20.0
"""Deadline of nvidia-smi: without the persistence daemon it wakes the driver first."""
MARKER = ".preflight-"
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
WANDB_SERVER = "https://api.wandb.ai"
SIOCGIFADDR = 0x8915

SHM = Path("/dev/shm")
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""Linux has them; a Mac, on which one tries things out, does not."""


def node_facts(name: str, address: str, models: Sequence[ModelSource], libraries: Sequence[str]) -> NodeFacts:
    """Everything that a process can tell without speaking to other nodes. libraries: to report beside
    LIBRARIES."""
    shm = shutil.disk_usage(SHM) if SHM.is_dir() else None
    return NodeFacts(
        name=name,
        address=address,
        versions={
            "python": platform.python_version(),
            "orchestrator": __version__,
            **{library: installed(library) for library in (*LIBRARIES, *libraries)},
        },
        devices=devices(),
        ram=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        shm_total=shm.total if shm else 0,
        shm_free=shm.free if shm else 0,
        limits=Limits(
            *(
                _soft(kind)
                for kind in (resource.RLIMIT_NOFILE, resource.RLIMIT_NPROC, resource.RLIMIT_MEMLOCK)
            )
        ),
        rdma=any(Path("/sys/class/infiniband").glob("*")),
        interface=interface_of(address),
        ports=_ports(),
        cuda=built_for(),
        absent=tuple(
            MissingModel(model.path, why) for model in models if (why := _absence(model)) is not None
        ),
    )


def _ports() -> tuple[int, int]:
    if not PORT_RANGE.is_file():
        return 49152, 65535  # IANA's, as on macOS
    low, high = PORT_RANGE.read_text().split()
    return int(low), int(high)


def installed(library: str) -> str:
    """The version that an import would find first, "missing" where there is none."""
    try:
        return version(library)
    except PackageNotFoundError:
        return MISSING


def unmet_requirements() -> tuple[UnmetRequirement, ...]:
    """Libraries here that are older than this program asks for; nothing where it runs without being
    installed."""
    try:
        lines = requires("orchestrator") or []
    except PackageNotFoundError:
        return ()
    wanted = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate({"extra": ""})]
    found = [(r, installed(r.name)) for r in wanted]
    return tuple(
        UnmetRequirement(f"{r.name} {has}" if has != MISSING else f"no {r.name}", f"{r.name}{r.specifier}")
        for r, has in found
        if has == MISSING or not r.specifier.contains(has, prereleases=True)
    )


def devices() -> tuple[Gpu, ...]:
    """The GPUs of the machine, whatever CUDA_VISIBLE_DEVICES hides from this process."""
    if shutil.which("nvidia-smi") is None:
        return ()
    query = [
        "nvidia-smi",
        "--query-gpu=name,memory.total,driver_version,compute_cap",
        "--format=csv,noheader,nounits",
    ]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # a broken driver: Ray's own count says what can be used
        return ()
    rows = [
        [part.strip() for part in line.rsplit(",", 3)] for line in said.splitlines() if line.count(",") >= 3
    ]
    # memory is "[N/A]" where GPU and CPU share it
    return tuple(
        Gpu(
            name,
            int(memory) * 2**20 if memory.isdecimal() else 0,
            driver,
            compute if compute.replace(".", "", 1).isdecimal() else "",
        )
        for name, memory, driver, compute in rows
    )


def built_for() -> str:
    """The CUDA version that torch here is built for, "" for a build without it."""
    import torch

    return torch.version.cuda or ""


def _soft(kind: int) -> int | None:
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft


def interface_of(address: str) -> str:
    """The network device that holds an IPv4 address, "" where none does or the system is no Linux."""
    if sys.platform != "linux":
        return ""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                held = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))[20:24]
            except OSError:  # a device without an address
                continue
            if socket.inet_ntoa(held) == address:
                return name
    return ""


def shared_folder(root: Path) -> Path:
    """The folder of a run, or the nearest one above it that exists: where it can be tried without leaving a
    trace."""
    root = root.resolve()
    return next(folder for folder in (root, *root.parents) if folder.is_dir())


def mark(folder: str, nonce: str, name: str) -> Storage:
    """Writes this node's marker and tells how the folder is."""
    marker = _marker(folder, nonce, name)
    try:
        free = shutil.disk_usage(folder).free
        with marker.open("x") as file:
            file.write(name)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        with suppress(
            OSError
        ):  # a full disk makes the file and cannot fill it; a read-only one refuses this too
            marker.unlink()
        return Storage(folder, error.strerror or str(error), 0)
    return Storage(folder, None, free, sum(map(_bytes, Path(folder).glob("checkpoints/step_*/*"))))


def _bytes(path: Path) -> int:
    """Of a file; 0 for a folder, and for what a run that goes on has removed meanwhile."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


def unseen(folder: str, nonce: str, names: Sequence[str], patience_s: float) -> tuple[str, ...]:
    """Nodes whose markers are not seen here within the patience: a network file system may show a new file
    late."""
    deadline = time.monotonic() + patience_s
    while True:
        missing = tuple(name for name in names if not _seen(_marker(folder, nonce, name), name))
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.1)


def _marker(folder: str, nonce: str, name: str) -> Path:
    """name: of the node, which may hold what a file name cannot."""
    return Path(folder) / f"{MARKER}{nonce}-{uuid.uuid5(uuid.NAMESPACE_OID, name)}"


def _seen(marker: Path, name: str) -> bool:
    try:
        return marker.read_text() == name
    except OSError:
        return False


def sweep(folder: str, nonce: str) -> None:
    """Removes the markers that this node sees, those of nodes that were lost meanwhile too."""
    for marker in Path(folder).glob(f"{MARKER}{nonce}-*"):
        marker.unlink(missing_ok=True)


def _absence(model: ModelSource) -> str | None:
    """Why a worker here could not load the weights; None where it can."""
    if not model.hub:
        return None if Path(model.path).is_dir() else "no such folder here"
    from huggingface_hub import constants, try_to_load_from_cache

    if any(
        isinstance(try_to_load_from_cache(model.path, name, revision=model.revision), str) for name in WEIGHTS
    ):
        return None
    if constants.HF_HUB_OFFLINE:
        return "not in this node's cache, and HF_HUB_OFFLINE forbids to ask the hub"
    trouble = unanswered(constants.ENDPOINT)
    return None if trouble is None else f"not in this node's cache, and {trouble}"


def wandb_trouble() -> str | None:
    """Why a run could not be tracked online from this process; None where it could. The key itself is not
    looked at."""
    server = os.environ.get("WANDB_BASE_URL") or WANDB_SERVER
    trouble = unanswered(server)
    if trouble is not None or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return trouble
    host = urlparse(server).hostname or server
    try:
        known = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        known = None
    return None if known is not None else f"there is no key for {host}"


def unanswered(url: str) -> str | None:
    """Why a server does not answer; None where it does, whatever it says."""
    host = urlparse(url).hostname or url
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=ANSWER_S).close()
    except urllib.error.HTTPError as error:
        return f"{host} answers {error.code}" if error.code == 407 or error.code >= 500 else None
    except (OSError, HTTPException) as error:
        return f"{host} does not answer: {getattr(error, 'reason', None) or error}"
    except ValueError:
        return f"{host} is no address: it needs https:// before it"
    return None
