"""How every actor is made: what its process may see and use of the machine, whoever started Ray.

Share (CPUs, GPUs, threads) --worker_environment--> variables of the process --made--> ray.remote(kind).options(…)
"""

import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from orchestrator.cluster.forkserver import py_executable
from orchestrator.core import faults
from orchestrator.core.resources import NO_GPUS

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""How torch's allocator is told what to do: the name since torch 2.9, and the older ones, which it still
reads."""
EXPANDABLE = "expandable_segments:True"
"""Segments that grow: micro-batches of many lengths leave no holes. CUDA IPC and vLLM's sleep mode cannot
share such memory."""


@dataclass(frozen=True, slots=True)
class Share:
    """What an actor has of its node. cpus, gpus: reserved in Ray; threads: that it computes with on the CPU;
    expandable: its GPU's memory may be laid out in segments that grow."""

    cpus: float
    gpus: float
    threads: int = 1
    expandable: bool = False


def worker_environment(share: Share) -> dict[str, str]:
    """Variables of an actor's process. Without a GPU it sees none: Ray leaves such a process what the node's
    Ray was started with, which is every GPU of the machine. With one, Ray itself names it. Planned faults go
    along, also to a Ray that somebody else started."""
    planned = {faults.VARIABLE: os.environ[faults.VARIABLE]} if faults.VARIABLE in os.environ else {}
    hidden = {} if share.gpus else NO_GPUS
    return {"OMP_NUM_THREADS": str(share.threads), "TOKENIZERS_PARALLELISM": "false", **hidden, **planned}


def made(kind: type, share: Share, *, strategy: Any = None, name: str | None = None) -> Any:
    """The class as an actor class of Ray, ready for `.remote(…)`. strategy: where it is placed; name: as
    Ray's dashboard shows it."""
    options = {"name": name} if name is not None else {}
    placed = {"scheduling_strategy": strategy} if strategy is not None else {}
    forked = None if share.gpus else py_executable(os.environ)
    return ray.remote(kind).options(
        num_cpus=share.cpus,
        num_gpus=share.gpus,
        runtime_env={"env_vars": worker_environment(share), **({"py_executable": forked} if forked else {})},
        max_restarts=0,
        max_concurrency=1,
        **options,
        **placed,
    )


def outlive_sigterm() -> None:
    """SIGTERM, which systemd, Slurm and containers send to all processes of a run, is the driver's affair: it
    ends this one when it has saved. A handler, as what is ignored or blocked stays so in the processes that
    the user's code starts here."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def grow_segments(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to the process's variables so that torch's allocator grows its segments; nothing where the
    user, or whoever started Ray on the node, set the allocator up. To be asked in the process itself, before
    it uses its GPU."""
    return {} if any(name in environment for name in ALLOCATOR) else {ALLOCATOR[0]: EXPANDABLE}


def own_device() -> Any:
    """The torch.device that this actor computes on: the GPU that Ray gave it, else the CPU."""
    import torch

    return torch.device("cuda" if ray.get_gpu_ids() else "cpu")


def device_name(device: Any) -> str:
    """The same for two processes only if they use the same device: a GPU's UUID, or a CPU's node."""
    import torch

    return (
        str(torch.cuda.get_device_properties(device).uuid)
        if device.type == "cuda"
        else f"the CPU of {ray.util.get_node_ip_address()}"
    )


def keep_to_share(device: Any, gpus: float) -> None:
    """Bounds what torch's allocator may reserve of a GPU that others use too to this actor's part of it.
    Reserved bytes count: what is allocated is less, and only what is reserved keeps others from it."""
    import torch

    if device.type == "cuda" and gpus < 1:
        torch.cuda.set_per_process_memory_fraction(
            gpus
        )  # of the current device; one without an index is refused


def redirect_output(path: Path) -> None:
    """Sends this process's stdout and stderr to the run folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
