"""What this process sees of its machine: versions, devices, limits, storage, and whether the hub and wandb
answer."""

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
from orchestrator.cluster.doctor.deadlines import ANSWER_S, SMI_S
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
"""Libraries that run on every node. With different versions of one, results or messages may differ."""
MISSING = "missing"
"""Version of a library that is not installed."""
MARKER = ".preflight-"
"""Beginning of the names of marker files, which show whether nodes share a folder."""
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Files of a hub repository of which one is in the cache if the weights are."""
WANDB_SERVER = "https://api.wandb.ai"
SIOCGIFADDR = 0x8915
"""ioctl that returns the address of a network device."""

SHM = Path("/dev/shm")
PORT_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
"""SHM and PORT_RANGE exist on Linux, but not on a Mac."""


def node_facts(name: str, address: str, models: Sequence[ModelSource], libraries: Sequence[str]) -> NodeFacts:
    """All facts that need no other node.

    libraries: whose versions are reported too, beside LIBRARIES.
    """
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
            _soft_limit(resource.RLIMIT_NOFILE),
            _soft_limit(resource.RLIMIT_NPROC),
            _soft_limit(resource.RLIMIT_MEMLOCK),
        ),
        rdma=any(Path("/sys/class/infiniband").glob("*")),
        interface=interface_of(address),
        ports=_ports(),
        cuda=torch_cuda(),
        absent=tuple(
            MissingModel(model.path, why) for model in models if (why := _why_absent(model)) is not None
        ),
    )


def _ports() -> tuple[int, int]:
    if not PORT_RANGE.is_file():
        return 49152, 65535  # IANA's, as on macOS
    low, high = PORT_RANGE.read_text().split()
    return int(low), int(high)


def installed(library: str) -> str:
    """The version that an import would find first, or "missing"."""
    try:
        return version(library)
    except PackageNotFoundError:
        return MISSING


def unmet_requirements() -> tuple[UnmetRequirement, ...]:
    """Installed libraries that are older than this program requires. Empty if this program runs without being
    installed."""
    try:
        lines = requires("orchestrator") or []
    except PackageNotFoundError:
        return ()
    wanted = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate({"extra": ""})]
    versions = [(r, installed(r.name)) for r in wanted]
    return tuple(
        UnmetRequirement(f"{r.name} {has}" if has != MISSING else f"no {r.name}", f"{r.name}{r.specifier}")
        for r, has in versions
        if has == MISSING or not r.specifier.contains(has, prereleases=True)
    )


def devices() -> tuple[Gpu, ...]:
    """The GPUs of the machine, those included that CUDA_VISIBLE_DEVICES hides from this process."""
    if shutil.which("nvidia-smi") is None:
        return ()
    query = [
        "nvidia-smi",
        "--query-gpu=name,memory.total,driver_version,compute_cap",
        "--format=csv,noheader,nounits",
    ]
    try:
        output = subprocess.run(query, capture_output=True, text=True, timeout=SMI_S, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # a broken driver: Ray's own count is what can be used
        return ()
    lines = (line for line in output.splitlines() if line.count(",") >= 3)
    rows = [[part.strip() for part in line.rsplit(",", 3)] for line in lines]
    # memory is "[N/A]" if GPU and CPU share it
    return tuple(
        Gpu(
            name,
            int(memory) * 2**20 if memory.isdecimal() else 0,
            driver,
            compute if compute.replace(".", "", 1).isdecimal() else "",
        )
        for name, memory, driver, compute in rows
    )


def torch_cuda() -> str:
    """The CUDA version that the installed torch is built for; "" for a build without CUDA."""
    import torch

    return torch.version.cuda or ""


def _soft_limit(kind: int) -> int | None:
    soft, _ = resource.getrlimit(kind)
    return None if soft == resource.RLIM_INFINITY else soft


def interface_of(address: str) -> str:
    """The network device that holds an IPv4 address; "" if none does, or if the system is not Linux."""
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
    """The folder of a run, or the nearest one above it that exists, so that checking it leaves no trace."""
    root = root.resolve()
    return next(folder for folder in (root, *root.parents) if folder.is_dir())


def write_marker(folder: str, nonce: str, name: str) -> Storage:
    """Writes this node's marker; the state of the folder."""
    marker = _marker(folder, nonce, name)
    try:
        free = shutil.disk_usage(folder).free
        with marker.open("x") as file:
            file.write(name)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        # a full disk creates the file and cannot fill it; a read-only one refuses to remove it too
        with suppress(OSError):
            marker.unlink()
        return Storage(folder, error.strerror or str(error), 0)
    return Storage(folder, None, free, sum(map(_bytes, Path(folder).glob("checkpoints/step_*/*"))))


def _bytes(path: Path) -> int:
    """Bytes of a file; 0 for a folder, and for a file that a running run has removed meanwhile."""
    try:
        return path.stat().st_size if path.is_file() else 0
    except FileNotFoundError:
        return 0


def missing_markers(folder: str, nonce: str, names: Sequence[str], wait_s: float) -> tuple[str, ...]:
    """Nodes whose markers are not seen here within `wait_s` seconds: a network file system may show a new
    file late."""
    deadline = time.monotonic() + wait_s
    while True:
        missing = tuple(name for name in names if not _seen(_marker(folder, nonce, name), name))
        if not missing or time.monotonic() > deadline:
            return missing
        time.sleep(0.1)


def _marker(folder: str, nonce: str, name: str) -> Path:
    """Marker file of a node. The node's name is hashed, as it may have characters that a file name cannot
    have."""
    return Path(folder) / f"{MARKER}{nonce}-{uuid.uuid5(uuid.NAMESPACE_OID, name)}"


def _seen(marker: Path, name: str) -> bool:
    try:
        return marker.read_text() == name
    except OSError:
        return False


def remove_markers(folder: str, nonce: str) -> None:
    """Removes the markers that this node sees, those of nodes that were lost meanwhile included."""
    for marker in Path(folder).glob(f"{MARKER}{nonce}-*"):
        marker.unlink(missing_ok=True)


def _why_absent(model: ModelSource) -> str | None:
    """Why a worker on this node could not load the weights; None if it can."""
    if not model.hub:
        return None if Path(model.path).is_dir() else "no such folder here"
    from huggingface_hub import constants, try_to_load_from_cache

    cached = (try_to_load_from_cache(model.path, name, revision=model.revision) for name in WEIGHTS)
    if any(isinstance(file, str) for file in cached):
        return None
    if constants.HF_HUB_OFFLINE:
        return "not in this node's cache, and HF_HUB_OFFLINE forbids requests to the hub"
    problem = server_problem(constants.ENDPOINT)
    return None if problem is None else f"not in this node's cache, and {problem}"


def wandb_problem() -> str | None:
    """Why a run could not be tracked online from this process; None if it could. The key itself is not
    checked."""
    server = os.environ.get("WANDB_BASE_URL") or WANDB_SERVER
    problem = server_problem(server)
    if problem is not None or os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return problem
    host = urlparse(server).hostname or server
    try:
        entry = netrc.netrc(os.environ.get("NETRC")).authenticators(host)
    except (OSError, netrc.NetrcParseError):
        entry = None
    return None if entry is not None else f"no key for {host} is set"


def server_problem(url: str) -> str | None:
    """Why a server does not answer; None if it does, whatever the answer is unless 407 or from 500 on."""
    host = urlparse(url).hostname or url
    try:
        urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=ANSWER_S).close()
    except urllib.error.HTTPError as error:
        return f"{host} answers {error.code}" if error.code == 407 or error.code >= 500 else None
    except (OSError, HTTPException) as error:
        return f"{host} does not answer: {getattr(error, 'reason', None) or error}"
    except ValueError:
        return f"{host} is not an address: it needs https:// before it"
    return None
