"""How every actor is made: what its process may see and use of the machine, whoever started Ray.

ActorResources --worker_environment--> variables of the process --actor_class--> ray.remote(kind).options
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
"""Variables that set up torch's allocator: the name since torch 2.9, and the older ones, which it still
reads."""
EXPANDABLE = "expandable_segments:True"
"""Allocator segments that grow: micro-batches of many lengths leave no holes. CUDA IPC and vLLM's sleep mode
cannot share such memory."""


@dataclass(frozen=True, slots=True)
class ActorResources:
    """What one actor has of its node."""

    cpus: float
    """CPUs reserved in Ray."""
    gpus: float
    """GPUs reserved in Ray; 0.5 is half of one."""
    threads: int = 1
    """Threads that it computes with on the CPU."""
    expandable: bool = False
    """Whether its GPU's memory may be laid out in segments that grow."""


def worker_environment(resources: ActorResources) -> dict[str, str]:
    """Environment variables of an actor's process.

    Without a GPU the process is made to see none: Ray would leave it what the node's Ray was started with,
    which is every GPU of the machine. With a GPU, Ray itself names it. Planned faults are passed on, also to
    a Ray that somebody else started.
    """
    planned = {faults.VARIABLE: os.environ[faults.VARIABLE]} if faults.VARIABLE in os.environ else {}
    hidden = {} if resources.gpus else NO_GPUS
    return {"OMP_NUM_THREADS": str(resources.threads), "TOKENIZERS_PARALLELISM": "false", **hidden, **planned}


def actor_class(
    kind: type, resources: ActorResources, *, strategy: Any = None, name: str | None = None
) -> Any:
    """The class as an actor class of Ray, ready for `.remote(…)`.

    strategy: Ray's scheduling strategy, which says where the actor is placed; name: as Ray's dashboard shows
    it.
    """
    options = {"name": name} if name is not None else {}
    placed = {"scheduling_strategy": strategy} if strategy is not None else {}
    forked = None if resources.gpus else py_executable(os.environ)
    environment = {"env_vars": worker_environment(resources), **({"py_executable": forked} if forked else {})}
    return ray.remote(kind).options(
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        runtime_env=environment,
        max_restarts=0,
        max_concurrency=1,
        **options,
        **placed,
    )


def outlive_sigterm() -> None:
    """Makes this process survive SIGTERM, which systemd, Slurm and containers send to all processes of a run.

    The driver handles it, and ends this process once it has saved. A handler is installed because a signal
    that is ignored or blocked stays so in the processes that the user's code starts here.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


def grow_segments(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables to add to the process so that torch's allocator grows its segments.

    Empty if the user, or whoever started Ray on the node, set the allocator up. Call it in the process
    itself, before it uses its GPU.
    """
    return {} if any(name in environment for name in ALLOCATOR) else {ALLOCATOR[0]: EXPANDABLE}


def own_device() -> Any:
    """The torch.device that this actor computes on: the GPU that Ray gave it, else the CPU."""
    import torch

    return torch.device("cuda" if ray.get_gpu_ids() else "cpu")


def device_name(device: Any) -> str:
    """A name that two processes share only if they use the same device: a GPU's UUID, or a CPU's node."""
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).uuid)
    return f"the CPU of {ray.util.get_node_ip_address()}"


def keep_to_share(device: Any, gpus: float) -> None:
    """Limits what torch's allocator may reserve of a GPU that others use too to this actor's part of it.

    The limit is on reserved bytes: what is allocated is less, and only what is reserved is kept from others.
    """
    import torch

    if device.type == "cuda" and gpus < 1:
        # of the current device: torch refuses a device without an index here
        torch.cuda.set_per_process_memory_fraction(gpus)


def redirect_output(path: Path) -> None:
    """Sends this process's stdout and stderr to the run folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
