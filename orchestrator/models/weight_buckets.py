"""Weights on their way from learners to generators: by name, in buckets of bounded size, each with a
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

WIRE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "bf16_autocast": torch.bfloat16}
"""What generators compute with and learners send, by learners.precision: that of the learners' own forward,
so that log-probs agree."""
_CHUNK = 1 << 20
"""Words summed at once: bounds the memory that a checksum takes."""
_PLACE, _FIRST, _SECOND = 0x2545_F491_4F6C_DD1D, 0x369D_EA0F_31A5_3F85, 0x5851_F42D_4C95_7F2D
"""Odd multipliers of the checksum, below 2**63."""


class CorruptWeights(OrchestratorError):
    """What arrived is not what was sent: the receiver takes no traffic with it."""


class ChannelBroken(WorkerLost):
    """A broadcast did not reach everybody: a member died or is late. The channel has to be opened anew."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter of a bucket by its Hugging Face name. start: of its bytes, a multiple of 16."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """One bucket: where each parameter lies in it, by Hugging Face name, and its bytes. The same on every
    rank and version."""

    entries: tuple[Entry, ...]
    size: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Some whole parameters. data: UInt8[bytes]; checksum: of data as the sender had it.

    Example: two fp32 parameters of 3 and 8 values: entries start at 0 and 16, data has 48 bytes.
    """

    entries: tuple[Entry, ...]
    data: np.ndarray
    checksum: int


def plan_bucket(
    named: Sequence[tuple[str, tuple[int, ...]]], dtype: torch.dtype
) -> tuple[tuple[Entry, ...], int]:
    """Where each parameter lies in a bucket, and the bytes of the whole."""
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
    """64 bits over UInt8[16 k], computed where the bytes lie: the sum over its 64-bit words of a mix of word
    and place.

    The mix is not linear, so no structure of weights can hide damage. A plain sum weighted by place misses a
    block of 1024 zeroed ones (an RMSNorm), and two exchanged blocks of numbers that bf16 holds exactly if
    they lie 256 KiB apart.
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
    """CorruptWeights where the bytes are not those that were sent."""
    found = checksum(flat)
    if found != expected:
        raise CorruptWeights(
            f"bucket {index} of weight version {version} arrived damaged",
            why=f"its checksum is {found:016x}, the sender's {expected:016x}",
            fix="it is sent again; if it repeats, look at that host's memory and network",
        )


def as_bytes(bucket: Bucket) -> Tensor:
    """The bucket's bytes as a tensor (a copy: shared memory is read-only)."""
    return torch.from_numpy(np.array(bucket.data))


class Receiver:
    """Puts buckets into a model in place. version: of the weights it holds, None while they are incomplete or
    damaged."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters())
        self.version: int | None = None

    @torch.no_grad()
    def take(self, entries: Sequence[Entry], flat: Tensor) -> None:
        """One bucket. CorruptWeights where it names a parameter that the model does not have, or not in this
        shape."""
        for name, tensor in bucket_views(entries, flat):
            parameter = self.parameters.get(name)
            if (
                parameter is None or parameter.shape != tensor.shape
            ):  # copy_ would stretch a smaller tensor in silence
                has = "no such parameter" if parameter is None else f"one of shape {tuple(parameter.shape)}"
                raise CorruptWeights(
                    f"weights arrived for {name} of shape {tuple(tensor.shape)}, but the generator's model "
                    f"has {has}",
                    fix="give learners and rollouts the same model; if they have it, report a bug",
                )
            parameter.copy_(tensor)

    def load(self, version: int, buckets: Iterable[Bucket]) -> None:
        """All buckets of a version, each verified before it is used."""
        self.version = None
        for index, bucket in enumerate(buckets):
            flat = as_bytes(bucket)
            check(flat, bucket.checksum, version, index)
            self.take(bucket.entries, flat)
        self.version = version

    def dump(self, plans: Sequence[BucketPlan]) -> Iterator[Bucket]:
        """The weights it holds, as they came: for a receiver that has none."""
        for plan in plans:
            tensors = {e.name: self.parameters[e.name] for e in plan.entries}
            flat = fill(plan.entries, plan.size, tensors, torch.device("cpu"))
            yield Bucket(plan.entries, flat.numpy(), checksum(flat))


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the members of a channel meet. members: their number, the sender (member 0) included; timeout_s:
    of one broadcast."""

    address: str
    port: int
    members: int
    backend: str
    timeout_s: float


class Channel:
    """A process group of its own, for weights: one sender and the generators. The default group is
    DeepSpeed's (or vLLM's).

    gloo carries bytes in main memory, nccl those on GPUs.
    """

    def __init__(self, meeting: Rendezvous, member: int, store: TCPStore) -> None:
        """Blocks until all members came."""
        self.limit = timedelta(seconds=meeting.timeout_s)
        self.device = torch.device("cuda" if meeting.backend == "nccl" else "cpu")
        with _breaking("opened"):
            self.group: Any = _process_group(meeting, member, PrefixStore("weights", store), self.limit)

    def send(self, flat: Tensor) -> None:
        """UInt8[size] of one bucket and its checksum, to all other members."""
        flat = flat.to(self.device)
        self._broadcast(torch.tensor([_signed(checksum(flat))], device=self.device))
        self._broadcast(flat)

    def receive(self, flat: Tensor) -> int:
        """Fills UInt8[size] with the next bucket; the checksum that its sender gave."""
        expected = torch.zeros(1, dtype=torch.int64, device=self.device)
        self._broadcast(expected)
        self._broadcast(flat)
        return int(expected) % (1 << 64)

    def close(self) -> None:
        """Leaves: whoever waits for this member hears of it at once."""
        self.group = None

    def _broadcast(self, tensor: Tensor) -> None:
        options: Any = BroadcastOptions()
        options.rootRank = 0
        with _breaking("used"):
            self.group.broadcast([tensor], options).wait(self.limit)
            if self.device.type == "cuda":
                torch.cuda.synchronize()  # NCCL's wait only orders streams; the buffer is used again


def join(meeting: Rendezvous, member: int) -> Channel:
    """Becomes a receiver of a channel that its sender has begun to open."""
    with _breaking("reached"):
        store = TCPStore(
            meeting.address, meeting.port, is_master=False, timeout=timedelta(seconds=meeting.timeout_s)
        )
    return Channel(meeting, member, store)


def _process_group(meeting: Rendezvous, member: int, store: PrefixStore, limit: timedelta) -> Any:
    from torch.distributed import distributed_c10d

    if meeting.backend == "gloo":
        return distributed_c10d.ProcessGroupGloo(store, member, meeting.members, limit)
    options: Any = distributed_c10d.ProcessGroupNCCL.Options()
    options._timeout = limit
    return distributed_c10d.ProcessGroupNCCL(store, member, meeting.members, options)


@contextmanager
def _breaking(verb: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch's DistBackendError among them
        raise ChannelBroken(
            f"the channel for weights could not be {verb}",
            why=str(error).splitlines()[0],
            fix="see logs/ of the other members",
        ) from error


def _signed(number: int) -> int:
    """64 bits as int64 holds them."""
    return number - (1 << 64) if number >= 1 << 63 else number
