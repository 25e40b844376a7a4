"""Collects the facts of a cluster by one small actor per node. A node that is late becomes a fact, not a
hang.

    facts of each node, marker files -> does each node see the others' markers?
    -> does each node reach each other? -> all-reduce over one process per node
"""

import logging
import os
import time
import urllib.error
import urllib.request
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster.actors import ActorResources, actor_class
from orchestrator.cluster.doctor.deadlines import (
    ANSWER_S,
    COLLECTIVE_S,
    GRACE_S,
    REQUEST_S,
    SETTLE_S,
    START_S,
)
from orchestrator.cluster.doctor.facts import (
    AllReduce,
    ClusterFacts,
    Kernel,
    ModelSource,
    NodeCapacity,
    NodeFacts,
    PairRate,
    SilentNode,
    Storage,
)
from orchestrator.cluster.doctor.node import (
    node_facts,
    remove_markers,
    shared_folder,
    unmet_requirements,
    write_marker,
)
from orchestrator.cluster.doctor.probe import Listener, Probe
from orchestrator.cluster.joining import connect, named_cluster

MAX_GPUS = 8
"""GPUs of a node that are checked: as many as a machine has that has a network card for each."""
SIZES = {"gloo": 16_000_000, "nccl": 256_000_000}
"""Bytes of the measured all-reduce: so large that latency does not count, and small enough for a second."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node that Ray counts as alive."""

    id: str
    capacity: NodeCapacity

    @property
    def name(self) -> str:
        return self.capacity.node


def alive_nodes() -> list[Node]:
    """The nodes, the driver's first, each with a unique name: the host's, with the address if several nodes
    have the same."""
    own_id = ray.get_runtime_context().get_node_id()
    alive = sorted(
        (n for n in ray.nodes() if n["Alive"]),
        key=lambda n: (n["NodeID"] != own_id, n["NodeManagerAddress"], n["NodeID"]),
    )
    hosts = Counter(n["NodeManagerHostname"] for n in alive)
    addresses = Counter(n["NodeManagerAddress"] for n in alive)

    def name(node: Mapping[str, Any]) -> str:
        host, address = node["NodeManagerHostname"], node["NodeManagerAddress"]
        if hosts[host] == 1:
            return host
        return (
            f"{host} ({address})" if addresses[address] == 1 else f"{host} ({address}, {node['NodeID'][:6]})"
        )

    def capacity(node: Mapping[str, Any]) -> NodeCapacity:
        has = node["Resources"]
        return NodeCapacity(
            name(node), has.get("CPU", 0.0), has.get("GPU", 0.0), int(has.get("object_store_memory", 0))
        )

    return [Node(n["NodeID"], capacity(n)) for n in alive]


Requests = Mapping[str, tuple[str, tuple[Any, ...]]]
"""Node -> (verb, its arguments)."""


class CollectiveFailed(Exception):
    """A collective of several nodes failed. The message names the node whose failure came first."""


@dataclass(slots=True)
class _Probes:
    """The probes of a cluster."""

    actors: dict[str, Any]
    """Probes that still answer, by the name of their node."""
    silent: list[SilentNode] = field(default_factory=list)
    """Nodes that have stopped answering."""

    @classmethod
    def start(cls, nodes: Iterable[Node]) -> "_Probes":
        """Starts a probe on every node, without waiting for it."""
        return cls({n.name: probe_on(n.id, 0).remote(n.name) for n in nodes})

    def call_all(self, verb: str, *args: Any, timeout_s: float = REQUEST_S) -> dict[str, Any]:
        """Calls a verb on every node; answers by node, as `call`."""
        return self.call(dict.fromkeys(self.actors, (verb, args)), timeout_s)

    def call(self, requests: Requests, timeout_s: float = REQUEST_S) -> dict[str, Any]:
        """Answers by node. A node that fails, or does not answer before the deadline, becomes silent."""
        answers = dict(self._answers(requests, timeout_s))
        for name, silent in ((n, a) for n, a in answers.items() if isinstance(a, SilentNode)):
            ray.kill(self.actors.pop(name))
            self.silent.append(silent)
        return {name: answer for name, answer in answers.items() if not isinstance(answer, SilentNode)}

    def collective(self, requests: Requests) -> dict[str, Any]:
        """Answers by node of a collective. CollectiveFailed at the first failure: the other nodes would wait
        for that one in vain."""
        answers = {}
        for name, answer in self._answers(requests, COLLECTIVE_S + GRACE_S):
            if isinstance(answer, SilentNode):
                raise CollectiveFailed(f"{name}: {answer.why}")
            answers[name] = answer
        return answers

    def _answers(self, requests: Requests, timeout_s: float) -> Iterator[tuple[str, Any]]:
        """(node, its answer or SilentNode), as they come."""
        waiting = {
            getattr(self.actors[name], verb).remote(*args): name for name, (verb, args) in requests.items()
        }
        deadline = time.monotonic() + timeout_s
        while waiting:
            done, _ = ray.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                break
            name = waiting.pop(done[0])
            try:
                yield name, ray.get(done[0])
            except RayError as error:  # its task failed, it died, or its node was gone before it started
                yield name, SilentNode(name, f"`{requests[name][0]}` failed: {_last_line(error)}")
        for name in waiting.values():
            yield name, SilentNode(name, f"no answer to `{requests[name][0]}` within {timeout_s:.0f} s")

    def close(self) -> None:
        for actor in self.actors.values():
            ray.kill(actor)


def probe_on(node_id: str, gpus: int) -> Any:
    """The actor class of a probe on a node, with `gpus` of its GPUs."""
    on_node = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return actor_class(Probe, ActorResources(cpus=0, gpus=gpus), strategy=on_node)


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def on_cluster() -> bool:
    """Whether this process has joined a Ray or RAY_ADDRESS names one, so that there is a cluster to
    survey."""
    return ray.is_initialized() or named_cluster() is not None


def survey(
    root: Path | None, models: Sequence[ModelSource], libraries: Sequence[str], *, gpus: bool
) -> ClusterFacts:
    """All facts about the cluster of `connect()`.

    root: the run folder; gpus: whether to check the GPUs, and to measure between them. If this node is the
    whole cluster, this process collects its facts; actors are started for its GPUs only.
    """
    connect()
    nodes = alive_nodes()
    capacities = tuple(n.capacity for n in nodes)
    folder = str(shared_folder(root)) if root is not None else None
    common = {"capacities": capacities, "unmet": unmet_requirements(), "auth": asks_for_token()}
    with ExitStack() as stack:
        if len(nodes) == 1 and nodes[0].id == ray.get_runtime_context().get_node_id():
            name, address = nodes[0].name, ray.util.get_node_ip_address()
            facts = local_node_facts(name, address, folder, models, libraries)
            kernels = _kernels(_closing(stack, _gpu_probes(nodes))) if gpus else {}
            own = replace(facts, kernels=kernels.get(name, ()))
            return ClusterFacts((own,), skipped="there is one node", **common)
        probes = stack.enter_context(closing(_Probes.start(nodes)))
        offsets = _clock_offsets(probes)
        facts = probes.call_all("facts", models, libraries)
        if folder is not None:
            facts = _with_storage(probes, facts, folder)
        facts = _with_neighbours(probes, facts)
        answered = {name: f for name, f in facts.items() if name in probes.actors}
        silent = tuple(probes.silent)
        members = _closing(stack, _gpu_probes([n for n in nodes if n.name in probes.actors])) if gpus else {}
        kernels = _kernels(members)
        surveyed = tuple(
            replace(f, clock_offset_s=offsets[name], kernels=kernels.get(name, ()))
            for name, f in answered.items()
        )
        result = _why_not_measured(surveyed, silent) or (
            _on_gpus(members) if len(members) > 1 else _measure(probes, tuple(probes.actors), "gloo")
        )
    measured = {"skipped": result} if isinstance(result, str) else {"all_reduce": result}
    return ClusterFacts(surveyed, silent=silent, **measured, **common)


def _why_not_measured(nodes: Sequence[NodeFacts], silent: Sequence[SilentNode]) -> str:
    """Why an all-reduce over the nodes is not tried; "" if it is."""
    if silent:
        return "not every node answers"
    if any(node.unreachable for node in nodes):
        return "some nodes cannot reach others"
    if len(nodes) < 2:
        return "there is one node"
    return "a GPU does not compute" if any(k.problem for node in nodes for k in node.kernels) else ""


def _closing(stack: ExitStack, members: dict[str, "_Probes"]) -> dict[str, "_Probes"]:
    """Makes the probes end with the stack; returns them."""
    for probes in members.values():
        stack.enter_context(closing(probes))
    return members


def local_node_facts(
    name: str, address: str, folder: str | None, models: Sequence[ModelSource], libraries: Sequence[str]
) -> NodeFacts:
    """The facts of this process's own node, without an actor."""
    facts = node_facts(name, address, models, libraries)
    if folder is None:
        return facts
    nonce = uuid.uuid4().hex
    try:
        return replace(facts, storage=write_marker(folder, nonce, name))
    finally:
        remove_markers(folder, nonce)


def asks_for_token() -> bool | None:
    """Whether the dashboard refuses a request without a token. If the dashboard cannot be reached, whether
    this process itself has to send one; None if neither is known."""
    url = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR).dashboard_url
    if url:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            direct.open(f"http://{url.removeprefix('http://')}/api/version", timeout=ANSWER_S).close()
        except urllib.error.HTTPError as error:
            if error.code < 500:  # a server error says nothing about tokens
                return error.code in (401, 403)
        except OSError:  # it listens on the head's loopback address, or not at all
            pass
        else:
            return False
    mode = os.environ.get("RAY_AUTH_MODE")
    return None if mode is None else mode == "token"


def _clock_offsets(probes: _Probes) -> dict[str, float]:
    """Seconds that each node's clock is ahead of the driver's, as precise as one round trip."""
    probes.call_all("now", timeout_s=START_S)  # waits until they have started
    offsets = {}
    for name in tuple(probes.actors):
        before = time.time()
        for remote in probes.call({name: ("now", ())}).values():
            offsets[name] = remote - (before + time.time()) / 2
    return offsets


def _with_storage(probes: _Probes, facts: Mapping[str, NodeFacts], folder: str) -> dict[str, NodeFacts]:
    """The facts with the state of the folder, and the nodes whose markers each node does not see."""
    nonce, marked = uuid.uuid4().hex, dict[str, Storage]()
    try:
        marked = probes.call_all("write_marker", folder, nonce)
        written = [name for name, storage in marked.items() if storage.error is None]
        unseen = probes.call_all("missing_markers", folder, nonce, written, timeout_s=REQUEST_S + SETTLE_S)
    finally:
        # not on a read-only mount, on which removing fails, even a file that does not exist
        writable = [n for n in probes.actors if n in marked and marked[n].error is None]
        probes.call(dict.fromkeys(writable, ("remove_markers", (folder, nonce))))
    return {
        name: replace(facts[name], storage=replace(marked[name], unseen=names))
        for name, names in unseen.items()
    }


def _with_neighbours(probes: _Probes, facts: Mapping[str, NodeFacts]) -> dict[str, NodeFacts]:
    """The facts with the nodes that each node cannot reach."""
    nonce = uuid.uuid4().hex
    listeners: dict[str, Listener] = probes.call_all("listen", nonce)
    others = {name: [other for other in listeners.values() if other.node != name] for name in listeners}
    blocked = probes.call({name: ("try_connect", (o, nonce)) for name, o in others.items() if o})
    return {name: replace(facts[name], unreachable=blocked.get(name, ())) for name in listeners}


def _gpu_probes(nodes: Sequence[Node]) -> dict[str, "_Probes"]:
    """For each node with GPUs a probe on each free GPU, up to MAX_GPUS. The probes are named NODE GPU 0, NODE
    GPU 1 … The caller closes them."""
    members = {
        n.name: _Probes(
            {
                f"{n.name} GPU {i}": probe_on(n.id, 1).remote(n.name)
                for i in range(min(MAX_GPUS, int(n.capacity.gpus)))
            }
        )
        for n in nodes
        if n.capacity.gpus >= 1
    }
    deadline = time.monotonic() + START_S
    for probes in members.values():
        probes.call_all("now", timeout_s=max(1.0, deadline - time.monotonic()))
    return members


def _kernels(members: Mapping[str, "_Probes"]) -> dict[str, tuple[Kernel, ...]]:
    """Results of a small product on each GPU, by node. If a process does not survive it, that is the GPU's
    problem."""
    kernels = {}
    for name, probes in members.items():
        gpus = tuple(probes.actors)
        problems = probes.call_all("kernel")
        died = {silent.node: silent.why for silent in probes.silent}
        kernels[name] = tuple(
            Kernel(gpu.removeprefix(f"{name} "), problems[gpu] if gpu in problems else died[gpu])
            for gpu in gpus
        )
    return kernels


def _on_gpus(members: Mapping[str, "_Probes"]) -> AllReduce | str:
    """The all-reduce over the same number of GPUs of each node, or why it cannot be tried."""
    busy = [name for name, probes in members.items() if not probes.actors]
    if busy:
        return f"no free GPU on {', '.join(busy)} within {START_S:.0f} s"
    ranks = min(len(probes.actors) for probes in members.values())
    chosen = {gpu: actor for probes in members.values() for gpu, actor in list(probes.actors.items())[:ranks]}
    return _measure(_Probes(chosen), tuple(members), "nccl")


def _measure(members: _Probes, nodes: Sequence[str], backend: str) -> AllReduce:
    """The all-reduce, and the rates of all pairs of nodes. A probe that fails or is late makes it an error
    that names the probe."""
    names, size = tuple(members.actors), SIZES[backend]
    count, ranks = len(nodes), len(names) // len(nodes)
    rates: dict[str, dict[int, float]] = {}
    try:
        master = members.collective({names[0]: ("rendezvous", ())})[names[0]]
        members.collective({name: ("join", (rank, len(names), *master)) for rank, name in enumerate(names)})
        seconds = members.collective(dict.fromkeys(names, ("all_reduce", (size,))))
        if count > 2:
            rates = members.collective(dict.fromkeys(names, ("exchange", (size // 4, ranks))))
    except CollectiveFailed as failure:
        return AllReduce(backend, tuple(nodes), size, error=str(failure), ranks=ranks)
    return AllReduce(
        backend, tuple(nodes), size, max(seconds.values()), pair_rates(names, nodes, rates), ranks=ranks
    )


def pair_rates(
    names: Sequence[str], nodes: Sequence[str], rates: Mapping[str, Mapping[int, float]]
) -> tuple[PairRate, ...]:
    """Rates of all pairs of nodes: what all ranks of a node together send to the other's.

    names: of the ranks, node by node; rates: of each rank, by the other node.
    """
    ranks = len(names) // len(nodes)

    def between(i: int, j: int) -> float:
        return sum(min(rates[names[i * ranks + r]][j], rates[names[j * ranks + r]][i]) for r in range(ranks))

    return tuple(
        PairRate(nodes[i], nodes[j], between(i, j)) for i, j in combinations(range(len(nodes)), 2) if rates
    )
