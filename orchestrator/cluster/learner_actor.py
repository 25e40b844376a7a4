"""One learner rank as a Ray actor."""

import os
import socket
from datetime import timedelta
from pathlib import Path
from typing import Any

import ray

from orchestrator.cluster.actors import (
    ActorResources,
    grow_segments,
    keep_to_share,
    outlive_sigterm,
    own_device,
    redirect_output,
)
from orchestrator.cluster.failures import reports_errors
from orchestrator.cluster.network import use_interface_of
from orchestrator.cluster.ranks import Rank


@reports_errors
class LearnerActor(Rank):
    """A rank in its own process, with the verbs that send weights to rollout actors."""

    def __init__(self, rank: int, log: str | None, resources: ActorResources) -> None:
        if log is not None:
            redirect_output(Path(log))
        outlive_sigterm()
        if resources.expandable:
            os.environ.update(grow_segments(os.environ))
        import torch

        torch.set_num_threads(resources.threads)
        self.resources = resources
        self.node = ray.util.get_node_ip_address()
        use_interface_of(self.node)
        super().__init__(rank, own_device())
        self.store: Any = None
        self.channel: Any = None

    def host(self) -> str:
        """This node's address."""
        return self.node

    def address(self) -> tuple[str, int]:
        """This node's address and a free port, for the rendezvous at rank 0."""
        with socket.socket() as free:
            free.bind(("", 0))
            return self.node, free.getsockname()[1]

    def join(self, world: int, address: str, port: int, timeout_s: float) -> int:
        pid = super().join(world, address, port, timeout_s)
        keep_to_share(self.device, self.resources.gpus)
        return pid

    def put_buckets(self, bucket_bytes: int) -> tuple[list[Any], int]:
        """Rank 0 puts the weights into Ray's object store: a reference per bucket, and the bytes of all. A
        collective at ZeRO-3."""
        from orchestrator.learner.weights import flat_buckets
        from orchestrator.models.weight_buckets import Bucket, checksum

        references, size = [], 0
        for plan, flat in flat_buckets(self.learner, bucket_bytes, keep=self.rank == 0):
            flat = flat.cpu()
            references.append(ray.put(Bucket(plan.entries, flat.numpy(), checksum(flat))))
            size += plan.size
        return references, size

    def listen(self, timeout_s: float) -> tuple[str, int]:
        """Rank 0 opens the store at which the members of a new channel meet; its address and port."""
        from torch._C._distributed_c10d import TCPStore

        self.store = TCPStore(
            self.node, 0, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False
        )
        return self.node, self.store.port

    def open_channel(self, rendezvous: Any) -> str | None:
        """Rank 0 waits for the other members; the reason if the channel did not open."""
        from orchestrator.models.weight_buckets import Channel, ChannelBroken

        self.channel = None
        try:
            self.channel = Channel(rendezvous, 0, self.store)
        except ChannelBroken as error:
            return str(error)
        return None

    def broadcast_buckets(self, bucket_bytes: int) -> str | None:
        """Sends the weights through the channel; the reason if it broke."""
        from orchestrator.learner.weights import broadcast

        return broadcast(self.learner, self.channel, bucket_bytes)
