"""One small actor per node finds out what `judge` wants to know; a node that is late becomes a fact, not a
hang.

facts, marker  ->  each sees the other markers?  ->  each reaches each  ->  all-reduce over one process per node
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

from orchestrator.cluster.actors import Share, made
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
    ANSWER_S,
    mark,
    node_facts,
    shared_folder,
    sweep,
    unmet_requirements,
)
from orchestrator.cluster.doctor.probe import COLLECTIVE_S, SETTLE_S, Listener, Probe
from orchestrator.cluster.joining import connect, named_cluster

START_S = 90.0
"""For a worker process to start and import the program on a busy or far node."""
ASK_S = 60.0
"""For one question to a node."""
GRACE_S = 10.0
"""On top of a deadline that the other side keeps itself: its own message says more."""
MOST_GPUS = 8
"""GPUs of a node that are looked at: as many as a machine has that has a network card for each."""
SIZES = {"gloo": 16_000_000, "nccl": 256_000_000}
"""Bytes of the measured all-reduce: large enough that latency does not count, small enough for a second."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node that Ray counts as alive."""

    id: str
    capacity: NodeCapacity

    @property
    def name(self) -> str:
        return self.capacity.node


def alive_nodes() -> list[Node]:
    """The driver's node first, each with a name of its own: the host's, with the address where several share
    it."""
    local_node_facts = ray.get_runtime_context().get_node_id()
    alive = sorted(
        (n for n in ray.nodes() if n["Alive"]),
        key=lambda n: (n["NodeID"] != local_node_facts, n["NodeManagerAddress"], n["NodeID"]),
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


Questions = Mapping[str, tuple[str, tuple[Any, ...]]]
"""Node -> (verb, its arguments)."""


class CollectiveFailed(Exception):
    """Something that several nodes do together failed. Says whose failure was seen first."""


@dataclass(slots=True)
class _Probes:
    """The probes that still answer, by the name of their node, and the nodes that have fallen silent."""

    actors: dict[str, Any]
    silent: list[SilentNode] = field(default_factory=list)

    @classmethod
    def start(cls, nodes: Iterable[Node]) -> "_Probes":
        """Asks for a probe on every node, without waiting for it."""
        return cls({n.name: _place(n.id, 0).remote(n.name) for n in nodes})

    def each(self, verb: str, *args: Any, timeout_s: float = ASK_S) -> dict[str, Any]:
        return self.ask(dict.fromkeys(self.actors, (verb, args)), timeout_s)

    def ask(self, questions: Questions, timeout_s: float = ASK_S) -> dict[str, Any]:
        """Answers by node; who fails, or does not answer before the deadline, is not asked again."""
        answers = dict(self._answers(questions, timeout_s))
        for name, silent in ((n, a) for n, a in answers.items() if isinstance(a, SilentNode)):
            ray.kill(self.actors.pop(name))
            self.silent.append(silent)
        return {name: answer for name, answer in answers.items() if not isinstance(answer, SilentNode)}

    def together(self, questions: Questions) -> dict[str, Any]:
        """Answers by node of something they do with each other: the first failure is the end, the others wait
        for it in vain."""
        answers = {}
        for name, answer in self._answers(questions, COLLECTIVE_S + GRACE_S):
            if isinstance(answer, SilentNode):
                raise CollectiveFailed(f"{name}: {answer.why}")
            answers[name] = answer
        return answers

    def _answers(self, questions: Questions, timeout_s: float) -> Iterator[tuple[str, Any]]:
        """(node, its answer, or Silent), as they come."""
        waiting = {
            getattr(self.actors[name], verb).remote(*args): name for name, (verb, args) in questions.items()
        }
        deadline = time.monotonic() + timeout_s
        while waiting:
            done, _ = ray.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                break
            name = waiting.pop(done[0])
            try:
                yield name, ray.get(done[0])
            except RayError as error:  # its task failed, it died, or its node was gone before it came up
                yield name, SilentNode(name, f"`{questions[name][0]}` failed: {_last_line(error)}")
        for name in waiting.values():
            yield name, SilentNode(name, f"no answer to `{questions[name][0]}` within {timeout_s:.0f} s")

    def close(self) -> None:
        for actor in self.actors.values():
            ray.kill(actor)


def _place(node_id: str, gpus: int) -> Any:
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return made(Probe, Share(cpus=0, gpus=gpus), strategy=there)


def _last_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1]


def on_cluster() -> bool:
    """True where a Ray runs or is named, so that there is something to survey."""
    return ray.is_initialized() or named_cluster() is not None


def survey(
    root: Path | None, models: Sequence[ModelSource], libraries: Sequence[str], *, gpus: bool
) -> ClusterFacts:
    """Everything about the cluster of `connect()`. root: of the run folder; gpus: try the GPUs, and measure
    between them. A cluster of this node alone is looked at from here, without an actor but for its GPUs."""
    connect()
    nodes = alive_nodes()
    capacities = tuple(n.capacity for n in nodes)
    folder = str(shared_folder(root)) if root is not None else None
    common = {"capacities": capacities, "unmet": unmet_requirements(), "auth": asks_for_token()}
    with ExitStack() as stack:
        if len(nodes) == 1 and nodes[0].id == ray.get_runtime_context().get_node_id():
            found = (
                local_node_facts(nodes[0].name, ray.util.get_node_ip_address(), folder, models, libraries),
            )
            kernels = _kernels(_closing(stack, _gpu_probes(nodes))) if gpus else {}
            return ClusterFacts(
                (replace(found[0], kernels=kernels.get(nodes[0].name, ())),),
                skipped="there is one node",
                **common,
            )
        probes = stack.enter_context(closing(_Probes.start(nodes)))
        offsets = _clock_offsets(probes)
        facts = probes.each("facts", models, libraries)
        if folder is not None:
            facts = _with_storage(probes, facts, folder)
        facts = _with_neighbours(probes, facts)
        found = tuple(
            replace(f, clock_offset_s=offsets[name]) for name, f in facts.items() if name in probes.actors
        )
        silent = tuple(probes.silent)
        members = _closing(stack, _gpu_probes([n for n in nodes if n.name in probes.actors])) if gpus else {}
        kernels = _kernels(members)
        found = tuple(replace(f, kernels=kernels.get(f.name, ())) for f in found)
        trouble = (
            "not every node answers"
            if silent
            else "some nodes cannot reach others"
            if any(f.unreachable for f in found)
            else ""
        )
        trouble = trouble or ("there is one node" if len(found) < 2 else "")
        trouble = trouble or (
            "a GPU does not compute" if any(k.trouble for f in found for k in f.kernels) else ""
        )
        result = trouble or (
            _on_gpus(members) if len(members) > 1 else _measure(probes, tuple(probes.actors), "gloo")
        )
    measured = {"skipped": result} if isinstance(result, str) else {"all_reduce": result}
    return ClusterFacts(found, silent=silent, **measured, **common)


def _closing(stack: ExitStack, members: dict[str, "_Probes"]) -> dict[str, "_Probes"]:
    """The same; they end with the stack."""
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
        return replace(facts, storage=mark(folder, nonce, name))
    finally:
        sweep(folder, nonce)


def asks_for_token() -> bool | None:
    """True where the dashboard refuses who has no token. Where it cannot be asked, what this process itself
    has to show."""
    url = ray.init(ignore_reinit_error=True, logging_level=logging.ERROR).dashboard_url
    if url:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            direct.open(f"http://{url.removeprefix('http://')}/api/version", timeout=ANSWER_S).close()
        except urllib.error.HTTPError as error:
            if error.code < 500:  # a dashboard in trouble tells nothing
                return error.code in (401, 403)
        except OSError:  # it listens on the head's loopback address, or not at all
            pass
        else:
            return False
    mode = os.environ.get("RAY_AUTH_MODE")
    return None if mode is None else mode == "token"


def _clock_offsets(probes: _Probes) -> dict[str, float]:
    """Seconds that each node's clock is ahead of the driver's, as well as one round trip lets it be known."""
    probes.each("now", timeout_s=START_S)  # waits until they have started
    offsets = {}
    for name in tuple(probes.actors):
        before = time.time()
        for remote in probes.ask({name: ("now", ())}).values():
            offsets[name] = remote - (before + time.time()) / 2
    return offsets


def _with_storage(probes: _Probes, facts: Mapping[str, NodeFacts], folder: str) -> dict[str, NodeFacts]:
    nonce, marked = uuid.uuid4().hex, dict[str, Storage]()
    try:
        marked = probes.each("mark", folder, nonce)
        written = [name for name, storage in marked.items() if storage.error is None]
        missed = probes.each("unseen", folder, nonce, written, timeout_s=ASK_S + SETTLE_S)
    finally:  # where it can be written only: removing fails on a read-only mount, also of what is not there
        probes.ask(
            {n: ("sweep", (folder, nonce)) for n in probes.actors if n in marked and marked[n].error is None}
        )
    return {
        name: replace(facts[name], storage=replace(marked[name], unseen=lost))
        for name, lost in missed.items()
    }


def _with_neighbours(probes: _Probes, facts: Mapping[str, NodeFacts]) -> dict[str, NodeFacts]:
    nonce = uuid.uuid4().hex
    doors: dict[str, Listener] = probes.each("listen", nonce)
    others = {name: [door for door in doors.values() if door.node != name] for name in doors}
    lost = probes.ask({name: ("knock", (them, nonce)) for name, them in others.items() if them})
    return {name: replace(facts[name], unreachable=lost.get(name, ())) for name in doors}


def _gpu_probes(nodes: Sequence[Node]) -> dict[str, "_Probes"]:
    """Of each node with GPUs a probe on each of them that is free, up to MOST_GPUS; the probes are named NODE
    GPU 0, NODE GPU 1 … The caller closes them."""
    members = {
        n.name: _Probes(
            {
                f"{n.name} GPU {i}": _place(n.id, 1).remote(n.name)
                for i in range(min(MOST_GPUS, int(n.capacity.gpus)))
            }
        )
        for n in nodes
        if n.capacity.gpus >= 1
    }
    deadline = time.monotonic() + START_S
    for probes in members.values():
        probes.each("now", timeout_s=max(1.0, deadline - time.monotonic()))
    return members


def _kernels(members: Mapping[str, "_Probes"]) -> dict[str, tuple[Kernel, ...]]:
    """What a small product on each GPU gave, by node; a process that does not survive it is its trouble."""
    found = {}
    for name, probes in members.items():
        seats = tuple(probes.actors)
        troubles = probes.each("kernel")
        died = {silent.node: silent.why for silent in probes.silent}
        found[name] = tuple(
            Kernel(seat.removeprefix(f"{name} "), troubles[seat] if seat in troubles else died[seat])
            for seat in seats
        )
    return found


def _on_gpus(members: Mapping[str, "_Probes"]) -> AllReduce | str:
    """The all-reduce over as many GPUs of each node, or in words why it cannot be tried."""
    taken = [name for name, probes in members.items() if not probes.actors]
    if taken:
        return f"no free GPU on {', '.join(taken)} within {START_S:.0f} s"
    ranks = min(len(probes.actors) for probes in members.values())
    seats = {
        seat: actor for probes in members.values() for seat, actor in list(probes.actors.items())[:ranks]
    }
    return _measure(_Probes(seats), tuple(members), "nccl")


def _measure(members: _Probes, nodes: Sequence[str], backend: str) -> AllReduce:
    """The all-reduce and the rates of all pairs of nodes; whoever fails or is late makes it an error that
    names them."""
    names, size = tuple(members.actors), SIZES[backend]
    count, ranks = len(nodes), len(names) // len(nodes)
    rates: dict[str, dict[int, float]] = {}
    try:
        where = members.together({names[0]: ("meeting", ())})[names[0]]
        members.together({name: ("join", (rank, len(names), *where)) for rank, name in enumerate(names)})
        seconds = members.together(dict.fromkeys(names, ("all_reduce", (size,))))
        if count > 2:
            rates = members.together(dict.fromkeys(names, ("exchange", (size // 4, ranks))))
    except CollectiveFailed as failure:
        return AllReduce(backend, tuple(nodes), size, error=str(failure), ranks=ranks)
    return AllReduce(
        backend, tuple(nodes), size, max(seconds.values()), _pairs(names, nodes, rates), ranks=ranks
    )


def _pairs(
    names: Sequence[str], nodes: Sequence[str], rates: Mapping[str, Mapping[int, float]]
) -> tuple[PairRate, ...]:
    """Of two nodes: what all their ranks together send to each other. names: of the ranks, node by node."""
    ranks = len(names) // len(nodes)

    def between(i: int, j: int) -> float:
        return sum(min(rates[names[i * ranks + r]][j], rates[names[j * ranks + r]][i]) for r in range(ranks))

    return tuple(
        PairRate(nodes[i], nodes[j], between(i, j)) for i, j in combinations(range(len(nodes)), 2) if rates
    )
