"""One small actor per node finds out what `judge` wants to know; a node that is late becomes a fact, not a hang.

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
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from orchestrator.cluster.actors import Share, made
from orchestrator.cluster.placement import connect
from orchestrator.cluster.probe_actor import COLLECTIVE_S, SETTLE_S, Door, Probe
from orchestrator.facts import AllReduce, Capacity, ClusterFacts, ModelSource, NodeFacts, PairRate, Silent, Storage
from orchestrator.node_facts import ANSWER_S, mark, node_facts, shared_folder, sweep, unmet_requirements

START_S = 90.0
"""For a worker process to start and import the program on a busy or far node."""
ASK_S = 60.0
"""For one question to a node."""
GRACE_S = 10.0
"""On top of a deadline that the other side keeps itself: its own message says more."""
SIZES = {"gloo": 16_000_000, "nccl": 256_000_000}
"""Bytes of the measured all-reduce: large enough that latency does not count, small enough for a second."""


@dataclass(frozen=True, slots=True)
class Node:
    """A node that Ray counts as alive."""

    id: str
    capacity: Capacity

    @property
    def name(self) -> str:
        return self.capacity.node


def alive_nodes() -> list[Node]:
    """The driver's node first, each with a name of its own: the host's, with the address where several share it."""
    here = ray.get_runtime_context().get_node_id()
    alive = sorted((n for n in ray.nodes() if n["Alive"]), key=lambda n: (n["NodeID"] != here, n["NodeManagerAddress"], n["NodeID"]))
    hosts = Counter(n["NodeManagerHostname"] for n in alive)
    addresses = Counter(n["NodeManagerAddress"] for n in alive)

    def name(node: Mapping[str, Any]) -> str:
        host, address = node["NodeManagerHostname"], node["NodeManagerAddress"]
        if hosts[host] == 1:
            return host
        return f"{host} ({address})" if addresses[address] == 1 else f"{host} ({address}, {node['NodeID'][:6]})"

    def capacity(node: Mapping[str, Any]) -> Capacity:
        has = node["Resources"]
        return Capacity(name(node), has.get("CPU", 0.0), has.get("GPU", 0.0), int(has.get("object_store_memory", 0)))

    return [Node(n["NodeID"], capacity(n)) for n in alive]


Questions = Mapping[str, tuple[str, tuple[Any, ...]]]
"""Node -> (verb, its arguments)."""


class Broken(Exception):
    """Something that several nodes do together failed. Says whose failure was seen first."""


@dataclass(slots=True)
class _Probes:
    """The probes that still answer, by the name of their node, and the nodes that have fallen silent."""

    actors: dict[str, Any]
    silent: list[Silent] = field(default_factory=list)

    @classmethod
    def start(cls, nodes: Iterable[Node], gpus: int = 0) -> "_Probes":
        """Asks for a probe on every node, without waiting for it."""
        return cls({n.name: _place(n.id, gpus).remote(n.name) for n in nodes})

    def each(self, verb: str, *args: Any, timeout_s: float = ASK_S) -> dict[str, Any]:
        return self.ask(dict.fromkeys(self.actors, (verb, args)), timeout_s)

    def ask(self, questions: Questions, timeout_s: float = ASK_S) -> dict[str, Any]:
        """Answers by node; who fails, or does not answer before the deadline, is not asked again."""
        answers = dict(self._answers(questions, timeout_s))
        for name, silent in ((n, a) for n, a in answers.items() if isinstance(a, Silent)):
            ray.kill(self.actors.pop(name))
            self.silent.append(silent)
        return {name: answer for name, answer in answers.items() if not isinstance(answer, Silent)}

    def together(self, questions: Questions) -> dict[str, Any]:
        """Answers by node of something they do with each other: the first failure is the end, the others wait for it in vain."""
        answers = {}
        for name, answer in self._answers(questions, COLLECTIVE_S + GRACE_S):
            if isinstance(answer, Silent):
                raise Broken(f"{name}: {answer.why}")
            answers[name] = answer
        return answers

    def _answers(self, questions: Questions, timeout_s: float) -> Iterator[tuple[str, Any]]:
        """(node, its answer, or Silent), as they come."""
        waiting = {getattr(self.actors[name], verb).remote(*args): name for name, (verb, args) in questions.items()}
        deadline = time.monotonic() + timeout_s
        while waiting:
            done, _ = ray.wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                break
            name = waiting.pop(done[0])
            try:
                yield name, ray.get(done[0])
            except RayError as error:  # its task failed, it died, or its node was gone before it came up
                yield name, Silent(name, f"`{questions[name][0]}` failed: {_last_line(error)}")
        for name in waiting.values():
            yield name, Silent(name, f"no answer to `{questions[name][0]}` within {timeout_s:.0f} s")

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
    return ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS"))


def survey(root: Path | None, models: Sequence[ModelSource], libraries: Sequence[str], *, gpus: bool) -> ClusterFacts:
    """Everything about the cluster of `connect()`. root: of the run folder; gpus: measure between GPUs where there are any.
    A cluster of this node alone is looked at from here, without an actor."""
    connect()
    nodes = alive_nodes()
    capacities = tuple(n.capacity for n in nodes)
    folder = str(shared_folder(root)) if root is not None else None
    common = {"capacities": capacities, "unmet": unmet_requirements(), "auth": asks_for_token()}
    if len(nodes) == 1 and nodes[0].id == ray.get_runtime_context().get_node_id():
        facts = here(nodes[0].name, ray.util.get_node_ip_address(), folder, models, libraries)
        return ClusterFacts((facts,), skipped="there is one node", **common)
    with closing(_Probes.start(nodes)) as probes:
        offsets = _clock_offsets(probes)
        facts = probes.each("facts", models, libraries)
        if folder is not None:
            facts = _with_storage(probes, facts, folder)
        facts = _with_neighbours(probes, facts)
        found = tuple(replace(f, clock_offset_s=offsets[name]) for name, f in facts.items() if name in probes.actors)
        silent = tuple(probes.silent)
        trouble = "not every node answers" if silent else "some nodes cannot reach others" if any(f.unreachable for f in found) else ""
        result = trouble or ("there is one node" if len(found) < 2 else _all_reduce(probes, nodes, gpus))
    measured = {"skipped": result} if isinstance(result, str) else {"all_reduce": result}
    return ClusterFacts(found, silent=silent, **measured, **common)


def here(name: str, address: str, folder: str | None, models: Sequence[ModelSource], libraries: Sequence[str]) -> NodeFacts:
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
    """True where the dashboard refuses who has no token. Where it cannot be asked, what this process itself has to show."""
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
        probes.ask({n: ("sweep", (folder, nonce)) for n in probes.actors if n in marked and marked[n].error is None})
    return {name: replace(facts[name], storage=replace(marked[name], unseen=lost)) for name, lost in missed.items()}


def _with_neighbours(probes: _Probes, facts: Mapping[str, NodeFacts]) -> dict[str, NodeFacts]:
    nonce = uuid.uuid4().hex
    doors: dict[str, Door] = probes.each("listen", nonce)
    others = {name: [door for door in doors.values() if door.node != name] for name in doors}
    lost = probes.ask({name: ("knock", (them, nonce)) for name, them in others.items() if them})
    return {name: replace(facts[name], unreachable=lost.get(name, ())) for name in doors}


def _all_reduce(probes: _Probes, nodes: Sequence[Node], gpus: bool) -> AllReduce | str:
    """Over one GPU of every node that has one, or over all nodes' CPUs; in words why it cannot be tried."""
    with_gpu = [n for n in nodes if n.capacity.gpus >= 1] if gpus else []
    if len(with_gpu) < 2:
        return _measure(probes, "gloo")
    with closing(_Probes.start(with_gpu, gpus=1)) as members:
        members.each("now", timeout_s=START_S)
        if members.silent:
            return f"no free GPU on {', '.join(s.node for s in members.silent)} within {START_S:.0f} s"
        return _measure(members, "nccl")


def _measure(members: _Probes, backend: str) -> AllReduce:
    """The all-reduce and the rates of all pairs; whoever fails or is late makes it an error that names them."""
    names, size = tuple(members.actors), SIZES[backend]
    try:
        where = members.together({names[0]: ("meeting", ())})[names[0]]
        members.together({name: ("join", (rank, len(names), *where)) for rank, name in enumerate(names)})
        seconds = members.together(dict.fromkeys(names, ("all_reduce", (size,))))
        rates: dict[str, dict[int, float]] = members.together(dict.fromkeys(names, ("exchange", (size // 4,)))) if len(names) > 2 else {}
    except Broken as failure:
        return AllReduce(backend, names, size, error=str(failure))
    slower = {(i, j): min(rates[names[i]][j], rates[names[j]][i]) for i, j in combinations(range(len(names)), 2)} if rates else {}
    return AllReduce(backend, names, size, max(seconds.values()), tuple(PairRate(names[i], names[j], rate) for (i, j), rate in slower.items()))
