"""What a probe does on its node: looks around, leaves a marker, listens, knocks at the others, takes part in
an all-reduce."""

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
from orchestrator.cluster.doctor.facts import BlockedPort, ModelSource, NodeFacts, Storage
from orchestrator.cluster.doctor.node import mark, node_facts, sweep, unseen
from orchestrator.cluster.doctor.smoke import trouble_on
from orchestrator.cluster.network import speak_from
from orchestrator.learner.engine import ProcessGroup

KNOCK_S = 3.0
"""For one TCP connection: a firewall that drops packets is only known by waiting."""
SETTLE_S = 10.0
"""For a file written on one node to be seen on another."""
COLLECTIVE_S = 60.0
"""For processes to find each other, and for each measurement."""
ROUNDS = 5
"""Measurements of which the median counts."""


@dataclass(frozen=True, slots=True)
class Listener:
    """Where a probe listens. node: its name."""

    node: str
    address: str
    port: int


class Probe:
    """On one node. Holds nothing but its listening socket and, for the all-reduce, its place in the process
    group."""

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

    def mark(self, folder: str, nonce: str) -> Storage:
        return mark(folder, nonce, self.name)

    def unseen(self, folder: str, nonce: str, names: Sequence[str]) -> tuple[str, ...]:
        return unseen(folder, nonce, names, SETTLE_S)

    def sweep(self, folder: str, nonce: str) -> None:
        sweep(folder, nonce)

    def listen(self, nonce: str) -> Listener:
        """Opens a free port, taken as the master port is, and answers everybody who comes with the nonce."""
        self.listening = socket.create_server(("", 0), backlog=128)
        threading.Thread(target=_answer, args=(self.listening, nonce.encode()), daemon=True).start()
        return Listener(self.name, self.address, self.listening.getsockname()[1])

    def knock(self, doors: Sequence[Listener], nonce: str) -> tuple[BlockedPort, ...]:
        """Those of the doors that did not open."""
        with ThreadPoolExecutor(min(32, len(doors))) as threads:
            troubles = threads.map(lambda door: _knock(door, nonce.encode()), doors)
            return tuple(
                BlockedPort(d.node, d.address, d.port, why)
                for d, why in zip(doors, troubles, strict=True)
                if why
            )

    def kernel(self) -> str | None:
        """What is wrong with the GPU that Ray gave this probe; None where nothing is."""
        return trouble_on(own_device())

    def meeting(self) -> tuple[str, int]:
        """Where the process group meets, if this is its rank 0."""
        with socket.create_server(("", 0)) as free:
            return self.address, free.getsockname()[1]

    def join(self, rank: int, world: int, address: str, port: int) -> None:
        """The way a learner joins, so that what would stop it stops this."""
        speak_from(self.address)
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
        """Bytes per second to and from every other node, one after the other, disjoint pairs at the same
        time. ranks: on each node; the first of one speaks to the first of the other, and so on, so that all
        network cards work. Rank r is on node r // ranks."""
        import torch
        import torch.distributed as dist

        assert self.group is not None
        out, back = (torch.zeros(size // 4, device=self.device) for _ in range(2))
        node, seat = divmod(self.group.rank, ranks)
        rates = {}
        for partners in tournament(self.group.world // ranks):
            other = partners[node]
            dist.barrier()
            if other is not None:
                swap = partial(_swap, out, back, other * ranks + seat)
                rates[other] = size / median([self._timed(swap) for _ in range(ROUNDS + 1)][1:])
        return rates

    def _timed(self, work: Callable[[], Any]) -> float:
        import torch

        start = time.perf_counter()
        work()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start


def _answer(server: socket.socket, nonce: bytes) -> None:
    while True:
        try:
            connection, _ = server.accept()
        except OSError:  # closed
            return
        with connection, suppress(OSError):  # who came is gone again; the next one is let in
            connection.sendall(nonce)


def _knock(door: Listener, nonce: bytes) -> str | None:
    """Why a door did not open; None where it did, and it was that node's."""
    try:
        with closing(socket.create_connection((door.address, door.port), KNOCK_S)) as connection:
            connection.settimeout(KNOCK_S)
            said = connection.recv(len(nonce), socket.MSG_WAITALL)
    except TimeoutError:
        return f"no answer within {KNOCK_S:g} s"
    except OSError as error:
        return error.strerror or str(error)
    return None if said == nonce else "something else answers there"


def _swap(out: Any, back: Any, other: int) -> None:
    import torch.distributed as dist

    for work in dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, out, other), dist.P2POp(dist.irecv, back, other)]
    ):
        work.wait()


def tournament(players: int) -> list[list[int | None]]:
    """Rounds in which everybody meets everybody once: [round][player] is the partner, None where one has to
    wait."""
    even = players + players % 2
    rounds = []
    for turn in range(even - 1):
        circle = [0, *((turn + i) % (even - 1) + 1 for i in range(even - 1))]
        partners: list[int | None] = [None] * players
        for one, other in zip(circle[: even // 2], reversed(circle[even // 2 :]), strict=True):
            if one < players and other < players:
                partners[one], partners[other] = other, one
        rounds.append(partners)
    return rounds
