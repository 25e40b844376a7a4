"""Facts about a cluster, and what a run requires of it: records, which doctor/checks.py compares.

node.py --NodeFacts of each node--> survey.py --ClusterFacts--> checks.py
run/preflight.py --ClusterRequirements------------------------> checks.py
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from orchestrator.core.errors import NotEnoughResources
from orchestrator.core.resources import WorkerGroup
from orchestrator.plan.hardware import Hardware, Machine


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device as nvidia-smi reports it."""

    name: str
    """Example: NVIDIA H100 80GB HBM3."""
    memory: int
    """Bytes; 0 if not reported."""
    driver: str = ""
    """Version of its driver, such as 580.65.06; "" if not reported."""
    compute: str = ""
    """Compute capability, such as 9.0; "" if not reported."""

    @property
    def knows_bf16(self) -> bool:
        """Whether it computes in bf16: from Ampere (8.0) on, or if its compute capability is unknown."""
        return not self.compute or float(self.compute) >= 8.0


@dataclass(frozen=True, slots=True)
class Kernel:
    """A small product computed on a GPU."""

    device: str
    """GPU of its node, such as "GPU 0"."""
    problem: str | None
    """What was wrong with the product; None if nothing was."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Soft limits of a worker process; None if unlimited."""

    open_files: int | None
    """ulimit -n."""
    processes: int | None
    """ulimit -u."""
    locked_memory: int | None
    """Bytes; ulimit -l."""


@dataclass(frozen=True, slots=True)
class Storage:
    """The run folder as a node sees it."""

    folder: str
    error: str | None
    """Why it cannot be written; None if it can."""
    free: int
    """Bytes."""
    held: int = 0
    """Bytes of checkpoints in it."""
    unseen: tuple[str, ...] = ()
    """Nodes that wrote a marker which this node does not see."""


@dataclass(frozen=True, slots=True)
class BlockedPort:
    """A TCP connection that failed."""

    node: str
    """The node that was not reached."""
    address: str
    port: int
    why: str


@dataclass(frozen=True, slots=True)
class MissingModel:
    """Model weights that a node can neither read nor fetch."""

    path: str
    why: str


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What a process on a node sees of it."""

    name: str
    """Unique in the cluster."""
    address: str
    versions: Mapping[str, str]
    """Versions of Python, this program and libraries; "missing" if one is not installed."""
    devices: tuple[Gpu, ...]
    ram: int
    """Bytes."""
    shm_total: int
    """Bytes of /dev/shm; 0 without one."""
    shm_free: int
    """Bytes."""
    limits: Limits
    rdma: bool
    """Whether it has an InfiniBand or RoCE card."""
    interface: str
    """Network device that holds the address, such as eth0."""
    ports: tuple[int, int]
    """First and last of the ports that the system gives out."""
    storage: Storage | None = None
    absent: tuple[MissingModel, ...] = ()
    unreachable: tuple[BlockedPort, ...] = ()
    clock_offset_s: float = 0.0
    """Seconds that its clock is ahead of the driver's."""
    cuda: str = ""
    """CUDA version that its torch is built for; "" for a build without CUDA."""
    kernels: tuple[Kernel, ...] = ()
    """Products computed on its GPUs; empty if none was tried."""


@dataclass(frozen=True, slots=True)
class NodeCapacity:
    """What Ray gives out on a node."""

    node: str
    cpus: float
    gpus: float
    object_store: int = 0
    """Bytes; 0 if unknown."""


@dataclass(frozen=True, slots=True)
class SilentNode:
    """A node that Ray counts as alive and that did not answer."""

    node: str
    why: str


@dataclass(frozen=True, slots=True)
class PairRate:
    """Measured rate between two nodes that send to each other."""

    one: str
    other: str
    rate: float
    """Bytes per second in each direction."""


@dataclass(frozen=True, slots=True)
class AllReduce:
    """A measured all-reduce over all nodes."""

    backend: str
    """gloo or nccl."""
    nodes: tuple[str, ...]
    size: int
    """Bytes."""
    seconds: float = 0.0
    """Median of the slowest process."""
    pairs: tuple[PairRate, ...] = ()
    error: str | None = None
    """Why it failed; None if it was measured."""
    ranks: int = 1
    """Processes on each node."""

    @property
    def rate(self) -> float:
        """Bytes per second that each node sends and receives, through all its network cards together:
        2 (n - 1) / n times the size, divided by the time."""
        return 2 * (len(self.nodes) - 1) / len(self.nodes) * self.size / self.seconds


@dataclass(frozen=True, slots=True)
class UnmetRequirement:
    """A library whose version does not meet this program's requirement."""

    version: str
    """Example: trl 1.10.0."""
    wanted: str
    """Example: trl>=1.16."""


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """All facts about a cluster."""

    nodes: tuple[NodeFacts, ...]
    """The nodes that answered, the driver's first."""
    capacities: tuple[NodeCapacity, ...]
    silent: tuple[SilentNode, ...] = ()
    unmet: tuple[UnmetRequirement, ...] = ()
    """Requirements that the driver's own installation does not meet."""
    auth: bool | None = None
    """Whether Ray asks for a token; None if unknown."""
    all_reduce: AllReduce | None = None
    skipped: str = ""
    """Why no all-reduce was tried."""
    wandb: str | None = None
    """Why the driver cannot use wandb's server; None if it can."""


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Weights that the workers load."""

    path: str
    """A folder, or a name on the hub."""
    revision: str | None
    hub: bool
    """Whether `path` is a name on the hub."""


@dataclass(frozen=True, slots=True)
class ClusterRequirements:
    """What a run requires of the cluster."""

    groups: tuple[WorkerGroup, ...] = ()
    checkpoint_bytes: int = 0
    """Size of one checkpoint."""
    keep: int = 0
    """Number of checkpoints that are kept."""
    wandb: Literal["online", "offline", "off"] = "off"
    models: tuple[ModelSource, ...] = ()
    libraries: tuple[str, ...] = ()
    """Libraries beyond those that every run uses."""
    object_store: int = 0
    """Bytes of published weights in Ray's object store at the same time."""

    @property
    def gpus(self) -> bool:
        return any(group.gpus for group in self.groups)


def of_cluster(facts: ClusterFacts) -> Hardware:
    """Hardware of the machines that answered, with the measured bandwidth of their all-reduce.

    NotEnoughResources if none answered.
    """
    if not facts.nodes:
        silent = "; ".join(f"{s.node}: {s.why}" for s in facts.silent)
        raise NotEnoughResources(
            "no node of the cluster answered",
            why=silent,
            fix="look at `ray status`, and at `orchestrator doctor`",
        )
    capacity = {c.node: c for c in facts.capacities}
    machines = tuple(
        Machine(
            capacity[n.name].cpus,
            capacity[n.name].gpus,
            n.ram,
            min((d.memory for d in n.devices), default=0),
            all(d.knows_bf16 for d in n.devices),
        )
        for n in facts.nodes
    )
    reduced = facts.all_reduce
    measured = reduced.rate if reduced is not None and reduced.error is None else None
    return Hardware(
        machines,
        between=measured,
        source="measured" if measured else "as it is" if len(machines) == 1 else "as Ray counts it",
    )
