"""What is known of a cluster, and what a run needs of it: records. `cluster/doctor/checks.py` judges them.

node_facts.py -> NodeFacts × nodes ──cluster/doctor/survey.py──► ClusterFacts        preflight.py -> Need
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from orchestrator.core.errors import NotEnoughResources
from orchestrator.core.resources import WorkerGroup
from orchestrator.plan.hardware import Hardware, Machine


@dataclass(frozen=True, slots=True)
class Gpu:
    """A device as nvidia-smi sees it. memory: bytes, 0 where it does not say; driver: its version, "" where
    it does not say; compute: its compute capability, such as 9.0, "" where it does not say."""

    name: str
    memory: int
    driver: str = ""
    compute: str = ""

    @property
    def knows_bf16(self) -> bool:
        """From Ampere (8.0) on; what does not say is taken for one that does."""
        return not self.compute or float(self.compute) >= 8.0


@dataclass(frozen=True, slots=True)
class Kernel:
    """A small product computed on a GPU. device: which one of its node; trouble: what was wrong with it, None
    where nothing was."""

    device: str
    trouble: str | None


@dataclass(frozen=True, slots=True)
class Limits:
    """Soft limits of a worker process (ulimit -n, -u, -l in bytes); None: no limit."""

    open_files: int | None
    processes: int | None
    locked_memory: int | None


@dataclass(frozen=True, slots=True)
class Storage:
    """The run folder as a node sees it. error: why it cannot be written; free: bytes; held: bytes of
    checkpoints that lie there already; unseen: nodes that wrote a marker which this one does not see."""

    folder: str
    error: str | None
    free: int
    held: int = 0
    unseen: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class BlockedPort:
    """A TCP connection that did not come about. node: the other side."""

    node: str
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
    """What a process on a node sees. name: unique in the cluster; versions: of python and the libraries
    ("missing" where there is none); devices: GPUs by nvidia-smi; cuda: the version that its torch is built
    for, "" without; kernels: what was computed on its GPUs, empty where none was tried; ram, shm_*: bytes;
    interface: the network device that holds the address; ports: from which the system takes free ones;
    clock_offset_s: against the driver's clock."""

    name: str
    address: str
    versions: Mapping[str, str]
    devices: tuple[Gpu, ...]
    ram: int
    shm_total: int
    shm_free: int
    limits: Limits
    rdma: bool
    interface: str
    ports: tuple[int, int]
    storage: Storage | None = None
    absent: tuple[MissingModel, ...] = ()
    unreachable: tuple[BlockedPort, ...] = ()
    clock_offset_s: float = 0.0
    cuda: str = ""
    kernels: tuple[Kernel, ...] = ()


@dataclass(frozen=True, slots=True)
class NodeCapacity:
    """What Ray gives out on a node. object_store: bytes; 0 where it is not known."""

    node: str
    cpus: float
    gpus: float
    object_store: int = 0


@dataclass(frozen=True, slots=True)
class SilentNode:
    """A node that Ray counts as alive and that did not answer."""

    node: str
    why: str


@dataclass(frozen=True, slots=True)
class PairRate:
    """Measured bytes per second and direction between two nodes, both sending."""

    one: str
    other: str
    rate: float


@dataclass(frozen=True, slots=True)
class AllReduce:
    """An all-reduce over `ranks` processes on each node. seconds: median of the slowest process; error: why
    there is no result."""

    backend: str
    nodes: tuple[str, ...]
    size: int
    seconds: float = 0.0
    pairs: tuple[PairRate, ...] = ()
    error: str | None = None
    ranks: int = 1

    @property
    def rate(self) -> float:
        """Bytes per second that each node sends and receives, through all its network cards together: 2 (n -
        1) / n times the size, over the time."""
        return 2 * (len(self.nodes) - 1) / len(self.nodes) * self.size / self.seconds


@dataclass(frozen=True, slots=True)
class UnmetRequirement:
    """A library that is not what this program needs. wanted: e.g. "trl>=1.16"."""

    version: str
    wanted: str


@dataclass(frozen=True, slots=True)
class ClusterFacts:
    """Everything that was found out; the first node is the driver's. auth: Ray's token authentication, None
    where it cannot be told; skipped: why no all-reduce was tried; wandb: why its server cannot be used from
    the driver."""

    nodes: tuple[NodeFacts, ...]
    capacities: tuple[NodeCapacity, ...]
    silent: tuple[SilentNode, ...] = ()
    unmet: tuple[UnmetRequirement, ...] = ()
    auth: bool | None = None
    all_reduce: AllReduce | None = None
    skipped: str = ""
    wandb: str | None = None


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Weights that the workers load: a folder, or a hub name at a revision."""

    path: str
    revision: str | None
    hub: bool


@dataclass(frozen=True, slots=True)
class ClusterRequirements:
    """What a run asks of the cluster. checkpoint_bytes: of one; libraries: beyond those that every run uses;
    object_store: bytes of published weights that lie in it at once."""

    groups: tuple[WorkerGroup, ...] = ()
    checkpoint_bytes: int = 0
    keep: int = 0
    wandb: Literal["online", "offline", "off"] = "off"
    models: tuple[ModelSource, ...] = ()
    libraries: tuple[str, ...] = ()
    object_store: int = 0

    @property
    def gpus(self) -> bool:
        return any(group.gpus for group in self.groups)


def of_cluster(facts: ClusterFacts) -> Hardware:
    """The machines that answered, with the measured bandwidth of their all-reduce. NotEnoughResources where
    none did."""
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
    measured = (
        facts.all_reduce.rate if facts.all_reduce is not None and facts.all_reduce.error is None else None
    )
    return Hardware(
        machines,
        between=measured,
        source="measured" if measured else "as it is" if len(machines) == 1 else "as Ray counts it",
    )
