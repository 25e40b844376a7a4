"""Transfer of weights from learners to generators: by name, in buckets of bounded size, each with a
checksum."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._C._distributed_c10d import BroadcastOptions, PrefixStore, TCPStore

from orchestrator.core.errors import OrchestratorError, WorkerLost

_CHUNK = 1 << 20
"""64-bit words that a checksum sums in one pass, which bounds its memory."""
_PLACE, _FIRST, _SECOND = 0x2545_F491_4F6C_DD1D, 0x369D_EA0F_31A5_3F85, 0x5851_F42D_4C95_7F2D
"""Odd multipliers of the checksum, below 2**63."""


class CorruptWeights(OrchestratorError):
    """The received weights are not those that were sent. The receiver serves no requests with them."""


class ChannelBroken(WorkerLost):
    """A broadcast did not reach all members: one died or is late. The channel has to be opened again."""


@dataclass(frozen=True, slots=True)
class Entry:
    """Place of one parameter in a bucket."""

    name: str
    """Hugging Face name."""
    shape: tuple[int, ...]
    dtype: str
    """torch's name of the type, e.g. "bfloat16"."""
    start: int
    """Offset of its first byte, a multiple of 16."""
    size: int
    """Number of its bytes."""


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """Layout of one bucket. It is the same on every rank and for every version."""

    entries: tuple[Entry, ...]
    size: int
    """Bytes of the bucket."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """One or more whole parameters.

    Example: two fp32 parameters of 3 and 8 values: entries start at 0 and 16, data has 48 bytes.
    """

    entries: tuple[Entry, ...]
    data: np.ndarray
    """UInt8[bytes]."""
    checksum: int
    """Checksum of the data at the sender."""


def plan_bucket(
    named: Sequence[tuple[str, tuple[int, ...]]], dtype: torch.dtype
) -> tuple[tuple[Entry, ...], int]:
    """The place of each parameter in a bucket, and the bytes of the bucket."""
    entries, start = [], 0
    for name, shape in named:
        size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
        entries.append(Entry(name, tuple(shape), str(dtype).removeprefix("torch."), start, size))
        start += -(-size // 16) * 16
    return tuple(entries), start


def fill(entries: Sequence[Entry], total: int, tensors: Mapping[str, Tensor], device: torch.device) -> Tensor:
    """UInt8[total] that holds the tensors, cast to the entries' dtype."""
    flat = torch.zeros(total, dtype=torch.uint8, device=device)
    for entry in entries:
        view = (
            flat[entry.start : entry.start + entry.size].view(getattr(torch, entry.dtype)).view(entry.shape)
        )
        view.copy_(tensors[entry.name].detach())
    return flat


def bucket_views(entries: Sequence[Entry], flat: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) views of a bucket's bytes."""
    for entry in entries:
        yield (
            entry.name,
            flat[entry.start : entry.start + entry.size].view(getattr(torch, entry.dtype)).view(entry.shape),
        )


def checksum(flat: Tensor) -> int:
    """64 bits over UInt8[16 k], computed on the device of the bytes: the sum of mix(word, place) over all
    64-bit words.

    The mix is not linear, so no structure of the weights can hide damage. A plain sum weighted by place would
    miss a block of 1024 ones that became zero (an RMSNorm), and two exchanged blocks of numbers that bf16
    holds exactly if they lie 256 KiB apart.
    """
    words = flat.view(torch.int64)
    total = 0
    for start in range(0, len(words), _CHUNK):
        chunk = words[start : start + _CHUNK]
        mixed = (
            torch.arange(start + 1, start + 1 + len(chunk), device=flat.device)
            .mul_(_PLACE)
            .bitwise_xor_(chunk)
        )
        mixed.bitwise_xor_(mixed >> 32).mul_(_FIRST)  # integers wrap around, on a GPU too
        mixed.bitwise_xor_(mixed >> 29).mul_(_SECOND)
        total += int(mixed.bitwise_xor_(mixed >> 32).sum())
    return total & 0xFFFF_FFFF_FFFF_FFFF


def check(flat: Tensor, expected: int, version: int, index: int) -> None:
    """Raises CorruptWeights if the bytes are not those that were sent."""
    received = checksum(flat)
    if received != expected:
        raise CorruptWeights(
            f"bucket {index} of weight version {version} arrived damaged",
            why=f"its checksum is {received:016x}, the sender's {expected:016x}",
            fix="it is sent again; if this repeats, check that host's memory and network",
        )


def as_bytes(bucket: Bucket) -> Tensor:
    """A copy of the bucket's bytes as a tensor. Shared memory itself is read-only."""
    return torch.from_numpy(np.array(bucket.data))


class Receiver:
    """Writes buckets into a model in place."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters())
        self.version: int | None = None
        """Version of the weights. None while they are incomplete or damaged."""

    @torch.no_grad()
    def take(self, entries: Sequence[Entry], flat: Tensor) -> None:
        """Writes one bucket. Raises CorruptWeights if the model has no such parameter, or another shape."""
        for name, tensor in bucket_views(entries, flat):
            parameter = self.parameters.get(name)
            # copy_ would silently broadcast a smaller tensor
            if parameter is None or parameter.shape != tensor.shape:
                has = "no such parameter" if parameter is None else f"one of shape {tuple(parameter.shape)}"
                raise CorruptWeights(
                    f"weights arrived for {name} of shape {tuple(tensor.shape)}, but the generator's model "
                    f"has {has}",
                    fix="give learners and rollouts the same model; if they have the same, report a bug",
                )
            parameter.copy_(tensor)

    def load(self, version: int, buckets: Iterable[Bucket]) -> None:
        """Writes all buckets of a version, each verified before it is used."""
        self.version = None
        for index, bucket in enumerate(buckets):
            flat = as_bytes(bucket)
            check(flat, bucket.checksum, version, index)
            self.take(bucket.entries, flat)
        self.version = version

    def dump(self, plans: Sequence[BucketPlan]) -> Iterator[Bucket]:
        """The model's weights as buckets, for another receiver that has none."""
        for plan in plans:
            tensors = {e.name: self.parameters[e.name] for e in plan.entries}
            flat = fill(plan.entries, plan.size, tensors, torch.device("cpu"))
            yield Bucket(plan.entries, flat.numpy(), checksum(flat))


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Address and size of a channel, which its members need to join it."""

    address: str
    port: int
    members: int
    """Number of members, the sender (member 0) included."""
    backend: str
    """Either "gloo" or "nccl"."""
    timeout_s: float
    """Deadline of joining and of one broadcast."""


class Channel:
    """A separate process group for weights, of one sender and the generators. The default group belongs to
    DeepSpeed (or vLLM).

    gloo sends bytes in main memory, nccl bytes on GPUs.
    """

    def __init__(self, rendezvous: Rendezvous, member: int, store: TCPStore) -> None:
        """Blocks until all members have joined."""
        self.limit = timedelta(seconds=rendezvous.timeout_s)
        self.device = torch.device("cuda" if rendezvous.backend == "nccl" else "cpu")
        with _breaking("opened"):
            self.group: Any = _process_group(rendezvous, member, PrefixStore("weights", store), self.limit)

    def send(self, flat: Tensor) -> None:
        """Sends UInt8[size] of one bucket and its checksum to all other members."""
        flat = flat.to(self.device)
        self._broadcast(torch.tensor([_signed(checksum(flat))], device=self.device))
        self._broadcast(flat)

    def receive(self, flat: Tensor) -> int:
        """Fills UInt8[size] with the next bucket, and returns the sender's checksum."""
        expected = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._broadcast(expected)
        self._broadcast(flat)
        return int(expected) % (1 << 64)

    def close(self) -> None:
        """Leaves the channel. Members that wait for this one then fail immediately."""
        self.group = None

    def _broadcast(self, tensor: Tensor) -> None:
        options: Any = BroadcastOptions()
        options.rootRank = 0
        with _breaking("used"):
            self.group.broadcast([tensor], options).wait(self.limit)
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # NCCL's wait only orders streams, and the buffer is used again


def join(rendezvous: Rendezvous, member: int) -> Channel:
    """Joins a channel as a receiver. Its sender must have begun to open it."""
    with _breaking("reached"):
        store = TCPStore(
            rendezvous.address,
            rendezvous.port,
            is_master=False,
            timeout=timedelta(seconds=rendezvous.timeout_s),
        )
    return Channel(rendezvous, member, store)


def _process_group(rendezvous: Rendezvous, member: int, store: PrefixStore, limit: timedelta) -> Any:
    from torch.distributed import distributed_c10d

    if rendezvous.backend == "gloo":
        return distributed_c10d.ProcessGroupGloo(store, member, rendezvous.members, limit)
    options: Any = distributed_c10d.ProcessGroupNCCL.Options()
    options._timeout = limit
    return distributed_c10d.ProcessGroupNCCL(store, member, rendezvous.members, options)


@contextmanager
def _breaking(verb: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's DistBackendError among them
        raise ChannelBroken(
            f"the channel for weights could not be {verb}",
            why=str(error).splitlines()[0],
            fix="look at logs/ of the other members",
        ) from error


def _signed(number: int) -> int:
    """The int64 with the same 64 bits."""
    return number - (1 << 64) if number >= 1 << 63 else number
