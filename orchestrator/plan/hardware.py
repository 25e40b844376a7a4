"""Hardware of a plan: machines with their memory and bandwidth, and the number of workers that fit on them.

this machine | measured cluster facts | a table of known devices  ->  Hardware  ->  plan/planner.py
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.core.errors import ConfigError, NotEnoughResources
from orchestrator.core.resources import WorkerGroup


@dataclass(frozen=True, slots=True)
class Machine:
    """One node. Example: Machine(cpus=96, gpus=8, ram=10**12, gpu_memory=80_000_000_000)."""

    cpus: float
    """CPUs that can be given to workers."""
    gpus: float
    """GPUs that can be given to workers."""
    ram: int
    """Bytes of RAM."""
    gpu_memory: int = 0
    """Bytes of each GPU; 0 without one."""
    bf16: bool = True
    """Whether its GPUs compute in bf16."""

    def holds(self, group: WorkerGroup) -> int:
        """Number of workers of the group that fit."""
        return group.fit(self.cpus, self.gpus)


@dataclass(frozen=True, slots=True)
class Hardware:
    """All machines of a run."""

    machines: tuple[Machine, ...]
    """The nodes."""
    within: float | None = None
    """Bytes per second that a worker sends to others on its node. None if not known."""
    between: float | None = None
    """Bytes per second that a node sends to other nodes. None if not known."""
    source: str = "this machine"
    """Source of the numbers. Example: "measured"."""

    @property
    def gpu_memory(self) -> int | None:
        """Bytes of the smallest GPU. None without one."""
        return min((m.gpu_memory for m in self.machines if m.gpu_memory), default=None)

    @property
    def has_gpus(self) -> bool:
        """Whether a machine has a GPU that can be given to workers."""
        return any(m.gpus > 0 for m in self.machines)

    @property
    def link(self) -> float | None:
        """Bytes per second of the slowest link of an all-reduce over all nodes. None if not known."""
        return self.between if len(self.machines) > 1 else self.within

    def room_for(self, group: WorkerGroup, others: Sequence[WorkerGroup] = ()) -> int:
        """Number of workers of `group` that fit beside all `others`. A worker is never split over machines.
        Raises NotEnoughResources if the others do not fit."""
        machines = list(self.machines)
        for other in sorted(others, key=lambda g: (-g.gpus, -g.cpus)):
            for _ in range(other.workers):
                place = max(range(len(machines)), key=lambda i: machines[i].holds(other), default=None)
                if place is None or not machines[place].holds(other):
                    raise NotEnoughResources(
                        f"the machines have no room for {other.workers} {other.what} (each needs "
                        f"{_resources(other)})",
                        why=str(self),
                        fix=f"set {other.what}.workers lower, or plan for more machines",
                    )
                host = machines[place]
                machines[place] = replace(host, cpus=host.cpus - other.cpus, gpus=host.gpus - other.gpus)
        return sum(machine.holds(group) for machine in machines)

    def __str__(self) -> str:
        """Example: 4 machines: 4 × 96 CPUs, 8 GPUs of 80.0 GB (h100-80g)"""
        kinds: dict[str, int] = {}
        for m in self.machines:
            gpus = f", {m.gpus:g} GPUs of {m.gpu_memory / 1e9:.1f} GB" if m.gpus else ""
            kinds[f"{m.cpus:g} CPUs{gpus}"] = kinds.get(f"{m.cpus:g} CPUs{gpus}", 0) + 1
        listed = "; ".join(f"{count} × {kind}" for kind, count in kinds.items())
        return (
            f"{len(self.machines)} machine{'s' if len(self.machines) > 1 else ''}: {listed} ({self.source})"
        )


def _resources(group: WorkerGroup) -> str:
    return f"{group.cpus:g} CPUs" + (f", {group.gpus:g} GPUs" if group.gpus else "")


def this_machine() -> Hardware:
    """The machine of this process, with the GPUs that it sees."""
    gpus = visible_gpus()
    ram = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Hardware(
        (Machine(float(os.cpu_count() or 1), float(len(gpus)), ram, min(gpus, default=0), _bf16(len(gpus))),)
    )


def visible_gpus() -> list[int]:
    """Bytes of each GPU that this process sees."""
    import torch

    return [torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())]


def _bf16(gpus: int) -> bool:
    """Whether every GPU that this process sees computes in bf16, as Ampere and newer ones do."""
    import torch

    return all(torch.cuda.get_device_properties(i).major >= 8 for i in range(gpus))


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU by its data sheet."""

    memory: int
    """Bytes of memory."""
    link: float
    """Bytes per second and direction to another GPU of the node, over NVLink or else PCIe."""
    per_node: int
    """GPUs of a typical machine."""


DEVICES: dict[str, Device] = {
    "a10g-24g": Device(24_000_000_000, 25e9, 4),
    "l4-24g": Device(24_000_000_000, 25e9, 4),
    "rtx4090-24g": Device(24_000_000_000, 25e9, 2),
    "l40s-48g": Device(48_000_000_000, 25e9, 8),
    "a100-40g": Device(40_000_000_000, 300e9, 8),
    "a100-80g": Device(80_000_000_000, 300e9, 8),
    "h100-80g": Device(80_000_000_000, 450e9, 8),
    "h200-141g": Device(141_000_000_000, 450e9, 8),
    "b200-180g": Device(180_000_000_000, 900e9, 8),
    "mi300x-192g": Device(192_000_000_000, 448e9, 8),
}
"""Data sheets, for plans without the machines. `plan --address` measures real machines."""
NETWORK = 12.5e9
"""Assumed bytes per second between nodes in plans without the machines: 100 Gbit/s."""
CPUS_PER_GPU, RAM_PER_GPU = 12, 128_000_000_000
"""Assumed CPUs and bytes of RAM per GPU in plans without the machines."""


def hypothetical_hardware(
    nodes: int, gpu: str, gpus_per_node: int | None = None, network_gbit: float | None = None
) -> Hardware:
    """Hardware of a plan without the machines. Raises ConfigError for an unknown GPU.

    gpu: a name of DEVICES. network_gbit: bandwidth between nodes in Gbit/s.
    """
    device = DEVICES.get(gpu.lower())
    if device is None:
        raise ConfigError(
            f"--gpu {gpu} is not in the table",
            fix=f"use one of {', '.join(DEVICES)}, or `plan --address` with the real machines",
        )
    count = gpus_per_node or device.per_node
    machine = Machine(CPUS_PER_GPU * count, count, RAM_PER_GPU * count, device.memory)
    between = NETWORK if network_gbit is None else network_gbit * 1e9 / 8
    assumed = (
        f", {between * 8 / 1e9:g} Gbit/s between nodes {'assumed' if network_gbit is None else 'given'}"
        if nodes > 1
        else ""
    )
    return Hardware((machine,) * nodes, device.link, between, f"{gpu.lower()} by its data sheet{assumed}")
