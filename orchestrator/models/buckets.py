"""Weights on their way from learners to generators: by name, in buckets of bounded size, each with a checksum."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from orchestrator.errors import OrchestratorError

_CHUNK = 1 << 22
"""Words summed at once: bounds the memory that a checksum takes."""


class CorruptWeights(OrchestratorError):
    """What arrived is not what was sent: the receiver takes no traffic with it."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One parameter of a bucket by its Hugging Face name. start: of its bytes, a multiple of 16."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class Bucket:
    """Some whole parameters. data: UInt8[bytes]; checksum: of data as the sender had it.

    Example: two fp32 parameters of 3 and 8 values: entries start at 0 and 16, data has 48 bytes.
    """

    entries: tuple[Entry, ...]
    data: np.ndarray
    checksum: int


def layout(named: Sequence[tuple[str, tuple[int, ...]]], dtype: torch.dtype) -> tuple[tuple[Entry, ...], int]:
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
        view = flat[entry.start : entry.start + entry.size].view(getattr(torch, entry.dtype)).view(entry.shape)
        view.copy_(tensors[entry.name].detach())
    return flat


def parts(entries: Sequence[Entry], flat: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) views of a bucket's bytes."""
    for entry in entries:
        yield entry.name, flat[entry.start : entry.start + entry.size].view(getattr(torch, entry.dtype)).view(entry.shape)


def checksum(flat: Tensor) -> int:
    """64 bits over UInt8[16 k]: the sum of the 32-bit words and their sum weighted by position, so that a flipped bit, a lost
    piece and two exchanged pieces all show. Computed where the bytes lie."""
    words = flat.view(torch.int32)
    plain = weighted = 0
    for start in range(0, len(words), _CHUNK):
        chunk = words[start : start + _CHUNK].to(torch.int64)
        places = torch.arange(1, len(chunk) + 1, device=flat.device)
        plain += int(chunk.sum())
        weighted += int((chunk * places).sum()) + start * int(chunk.sum())
    return (plain & 0xFFFF_FFFF) << 32 | (weighted & 0xFFFF_FFFF)


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
    """Puts buckets into a model in place. version: of the weights it holds, None while they are incomplete or damaged."""

    def __init__(self, model: nn.Module) -> None:
        self.parameters = dict(model.named_parameters())
        self.version: int | None = None

    @torch.no_grad()
    def take(self, entries: Sequence[Entry], flat: Tensor) -> None:
        """One bucket."""
        for name, tensor in parts(entries, flat):
            self.parameters[name].copy_(tensor)

    def load(self, version: int, buckets: Iterable[Bucket]) -> None:
        """All buckets of a version, each verified before it is used."""
        self.version = None
        for index, bucket in enumerate(buckets):
            flat = as_bytes(bucket)
            check(flat, bucket.checksum, version, index)
            self.take(bucket.entries, flat)
        self.version = version

