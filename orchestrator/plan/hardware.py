"""What a run is planned for: machines with their memory, how fast they speak, and how many workers find room
on them.

this machine | facts of a cluster (measured) | a table of known devices  ->  Hardware  ->  plan/planner.py
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orchestrator.core.errors import ConfigError, NotEnoughResources
from orchestrator.core.resources import WorkerGroup


@dataclass(frozen=True, slots=True)
class Machine:
    """One node. cpus, gpus: what can be given out; ram: bytes; gpu_memory: bytes of each GPU, 0 without one;
    bf16: whether its GPUs compute in it."""

    cpus: float
    gpus: float
    ram: int
    gpu_memory: int = 0
    bf16: bool = True

    def holds(self, group: WorkerGroup) -> int:
        """Workers of the group that it has room for."""
        return group.fit(self.cpus, self.gpus)


@dataclass(frozen=True, slots=True)
class Hardware:
    """What is there. within, between: bytes per second that a worker sends to others on its node, and that a
    node sends to other nodes; None: not known. source: where the numbers come from, e.g. "measured"."""

    machines: tuple[Machine, ...]
    within: float | None = None
    between: float | None = None
    source: str = "this machine"

    @property
    def gpu_memory(self) -> int | None:
        """Bytes of the smallest GPU; None without one."""
        return min((m.gpu_memory for m in self.machines if m.gpu_memory), default=None)

    @property
    def has_gpus(self) -> bool:
        """Has any machine a GPU to give out?"""
        return any(m.gpus > 0 for m in self.machines)

    @property
    def link(self) -> float | None:
        """Bytes per second of the narrowest link that an all-reduce over all nodes passes."""
        return self.between if len(self.machines) > 1 else self.within

    def room_for(self, group: WorkerGroup, others: Sequence[WorkerGroup] = ()) -> int:
        """Workers of `group` that fit beside all `others`, each worker whole on one machine.
        NotEnoughResources where the others do not fit themselves."""
        machines = list(self.machines)
        for other in sorted(others, key=lambda g: (-g.gpus, -g.cpus)):
            for _ in range(other.workers):
                place = max(range(len(machines)), key=lambda i: machines[i].holds(other), default=None)
                if place is None or not machines[place].holds(other):
                    raise NotEnoughResources(
                        f"no machine has room for another of {other.workers} {other.what} ({_words(other)} "
                        "each)",
                        why=str(self),
                        fix=f"set {other.what}.workers lower, or plan for more machines",
                    )
                taken = machines[place]
                machines[place] = replace(taken, cpus=taken.cpus - other.cpus, gpus=taken.gpus - other.gpus)
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


def _words(group: WorkerGroup) -> str:
    return f"{group.cpus:g} CPUs" + (f", {group.gpus:g} GPUs" if group.gpus else "")


def this_machine() -> Hardware:
    """What this process sees."""
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
    """Does every GPU that this process sees compute in bf16: Ampere and newer?"""
    import torch

    return all(torch.cuda.get_device_properties(i).major >= 8 for i in range(gpus))


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU by its data sheet. memory: bytes; link: bytes per second and direction to another GPU of the node
    (NVLink, else PCIe); per_node: how many a usual machine has."""

    memory: int
    link: float
    per_node: int


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
"""Data sheets, for planning without the machines. `plan --address` measures instead."""
NETWORK = 12.5e9
"""Bytes per second between nodes that a plan without the machines assumes: 100 Gbit/s."""
CPUS_PER_GPU, RAM_PER_GPU = 12, 128_000_000_000
"""Of a usual GPU machine."""


def hypothetical_hardware(
    nodes: int, gpu: str, gpus_per_node: int | None = None, network_gbit: float | None = None
) -> Hardware:
    """Machines that are not there. gpu: a name of DEVICES; network_gbit: between nodes, in Gbit/s.
    ConfigError for others."""
    device = DEVICES.get(gpu.lower())
    if device is None:
        raise ConfigError(
            f"--gpu {gpu} is not in the table",
            fix=f"use one of {', '.join(DEVICES)}, or plan --address on the real machines",
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
