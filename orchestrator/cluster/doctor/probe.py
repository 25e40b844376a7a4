"""What the doctor's actor does on its node: it collects facts, leaves a marker file, listens, connects to the
other nodes, and takes part in an all-reduce."""

import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import ray

from orchestrator.cluster.actors import own_device
from orchestrator.cluster.doctor.deadlines import COLLECTIVE_S, CONNECT_S, SETTLE_S
from orchestrator.cluster.doctor.facts import BlockedPort, ModelSource, NodeFacts, Storage
from orchestrator.cluster.doctor.node import missing_markers, node_facts, remove_markers, write_marker
from orchestrator.cluster.doctor.smoke import product_problem
from orchestrator.cluster.network import use_interface_of
from orchestrator.learner.engine import ProcessGroup

ROUNDS = 5
"""Measurements of which the median counts."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Where a probe listens."""

    node: str
    """Name of its node."""
    address: str
    port: int


class Probe:
    """An actor on one node. It holds only its listening socket and, for the all-reduce, its place in the
    process group."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.address = ray.util.get_node_ip_address()
        self.listening: socket.socket | None = None
        self.group: ProcessGroup | None = None
        self.device: Any = None

    def now(self) -> float:
        return time.time()

    def facts(self, models: Sequence[ModelSource], libraries: Sequence[str]) -> NodeFacts:
        return node_facts(self.name, self.address, models, libraries)

    def write_marker(self, folder: str, nonce: str) -> Storage:
        return write_marker(folder, nonce, self.name)

    def missing_markers(self, folder: str, nonce: str, names: Sequence[str]) -> tuple[str, ...]:
        return missing_markers(folder, nonce, names, SETTLE_S)

    def remove_markers(self, folder: str, nonce: str) -> None:
        remove_markers(folder, nonce)

    def listen(self, nonce: str) -> Listener:
        """Opens a free port, taken as the master port is, and sends the nonce to every client."""
        self.listening = socket.create_server(("", 0), backlog=128)
        threading.Thread(target=serve_nonce, args=(self.listening, nonce.encode()), daemon=True).start()
        return Listener(self.name, self.address, self.listening.getsockname()[1])

    def try_connect(self, listeners: Sequence[Listener], nonce: str) -> tuple[BlockedPort, ...]:
        """The listeners that this node cannot reach."""
        with ThreadPoolExecutor(min(32, len(listeners))) as threads:
            problems = threads.map(lambda listener: connection_problem(listener, nonce.encode()), listeners)
            return tuple(
                BlockedPort(listener.node, listener.address, listener.port, why)
                for listener, why in zip(listeners, problems, strict=True)
                if why
            )

    def kernel(self) -> str | None:
        """What is wrong with the GPU that Ray gave this probe; None if nothing is."""
        return product_problem(own_device())

    def rendezvous(self) -> tuple[str, int]:
        """Address and port at which the process group meets, if this is its rank 0."""
        with socket.create_server(("", 0)) as free:
            return self.address, free.getsockname()[1]

    def join(self, rank: int, world: int, address: str, port: int) -> None:
        """Joins the process group as a learner does, so that what would stop a learner stops this."""
        use_interface_of(self.address)
        self.device = own_device()
        self.group = ProcessGroup(rank, world, address, port, COLLECTIVE_S)
        self.group.join(self.device)

    def all_reduce(self, size: int) -> float:
        """Seconds of an all-reduce of `size` bytes: the median after two that warm up."""
        import torch
        import torch.distributed as dist

        data = torch.zeros(size // 4, device=self.device)
        return median([self._timed(lambda: dist.all_reduce(data)) for _ in range(ROUNDS + 2)][2:])

    def exchange(self, size: int, ranks: int) -> dict[int, float]:
        """Bytes per second to and from every other node, one after the other; disjoint pairs measure at the
        same time.

        ranks: processes on each node; rank r is on node r // ranks. The first rank of a node exchanges with
        the first of the other, and so on, so that all network cards work.
        """
        import torch
        import torch.distributed as dist

        assert self.group is not None
        out, back = (torch.zeros(size // 4, device=self.device) for _ in range(2))
        node, local_rank = divmod(self.group.rank, ranks)
        rates = {}
        for partners in round_robin_pairs(self.group.world // ranks):
            other = partners[node]
            dist.barrier()
            if other is not None:
                swap = partial(_swap, out, back, other * ranks + local_rank)
                rates[other] = size / median([self._timed(swap) for _ in range(ROUNDS + 1)][1:])
        return rates

    def _timed(self, work: Callable[[], Any]) -> float:
        import torch

        start = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def serve_nonce(server: socket.socket, nonce: bytes) -> None:
    """Sends the nonce to every client, until the socket is closed."""
    while True:
        try:
            connection, _ = server.accept()
        except OSError:  # closed
            return
        with connection, suppress(OSError):  # the client has closed: the next one is accepted
            connection.sendall(nonce)


def connection_problem(listener: Listener, nonce: bytes) -> str | None:
    """Why a listener could not be reached; None if it answered with the nonce."""
    try:
        with closing(socket.create_connection((listener.address, listener.port), CONNECT_S)) as connection:
            connection.settimeout(CONNECT_S)
            answer = connection.recv(len(nonce), socket.MSG_WAITALL)
    except TimeoutError:
        return f"no answer within {CONNECT_S:g} s"
    except OSError as error:
        return error.strerror or str(error)
    return None if answer == nonce else "something else answers there"


def _swap(out: Any, back: Any, other: int) -> None:
    import torch.distributed as dist

    sends = dist.P2POp(dist.isend, out, other)
    receives = dist.P2POp(dist.irecv, back, other)
    for work in dist.batch_isend_irecv([sends, receives]):
        work.wait()


def round_robin_pairs(nodes: int) -> list[list[int | None]]:
    """Rounds of disjoint pairs in which every node meets every other once.

    [round][node] is the node's partner in that round, None if it has to wait.
    """
    even = nodes + nodes % 2
    rounds = []
    for turn in range(even - 1):
        circle = [0, *((turn + i) % (even - 1) + 1 for i in range(even - 1))]
        partners: list[int | None] = [None] * nodes
        for one, other in zip(circle[: even // 2], reversed(circle[even // 2 :]), strict=True):
            if one < nodes and other < nodes:
                partners[one], partners[other] = other, one
        rounds.append(partners)
    return rounds
