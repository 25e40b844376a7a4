"""Transfer of a micro-batch to the device: one buffer and one copy, for which the host does not wait.

    numpy columns --packed--> one buffer (pinned for a GPU) --one copy--> device --sliced--> tensors

With a copy per column the host would wait for each one, until the device has finished all queued work.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.algorithms.losses.interface import ExperienceTensors
from orchestrator.core.batches import Experience, Layout, MicroBatch
from orchestrator.models.ragged_attention import Block, Ragged, blocks_of

PADDING = 0.03
"""Share of padding from which on rows are computed without it. Below, the gathers around each layer's
attention cost more."""
ALIGNMENT = 16
"""Each column starts at a multiple of this many bytes, as views and vectorised loads need."""
NARROW = frozenset({"position_ids", "segment", "branch"})
"""Columns of small integers that are compared but index nothing. They are int32 on the device."""


def to_device(columns: Sequence[NDArray[Any] | None], device: torch.device) -> list[Tensor | None]:
    """The columns as tensors of the same shapes and types on `device`, sent in one copy. None stays None."""
    starts, size = [], 0
    for column in columns:
        starts.append(size)
        size += 0 if column is None else -(-column.nbytes // ALIGNMENT) * ALIGNMENT
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True) if device.type == "cuda" else None
    host = np.empty(size, np.uint8) if pinned is None else pinned.numpy()
    for start, column in zip(starts, columns, strict=True):
        if column is not None:
            host[start : start + column.nbytes].view(column.dtype)[:] = column.ravel()
    # torch keeps the pinned buffer until the copy is done
    buffer = torch.from_numpy(host) if pinned is None else pinned.to(device, non_blocking=True)
    return [
        None if column is None else _slice(buffer, start, column)
        for start, column in zip(starts, columns, strict=True)
    ]


def _slice(buffer: Tensor, start: int, column: NDArray[Any]) -> Tensor:
    dtype = torch.from_numpy(np.empty(0, column.dtype)).dtype
    return buffer[start : start + column.nbytes].view(dtype).view(column.shape)


@dataclass(frozen=True, slots=True)
class MicroBatchTensors:
    """The columns of a core.batches.MicroBatch on the device, with the same names and shapes."""

    layout: Layout
    one_row: bool
    branches: int
    input_ids: Int[Tensor, "R T"]
    position_ids: Int[Tensor, "R T"]
    segment: Int[Tensor, "R T"]
    branch: Int[Tensor, "R T"]
    score_at: Int[Tensor, " N"]
    targets: Int[Tensor, " N"]
    sequence: Int[Tensor, " N"]
    last_at: Int[Tensor, " sequences"]
    identity: Int[Tensor, "R T"]
    ragged: Ragged | None = None
    """Places of the tokens that are not padding. None: the rows are computed with their padding."""
    source: Int[Tensor, " n"] | None = None
    ref_logprobs: Float[Tensor, " N"] | None = None
    coefficients: Float[Tensor, " N"] | None = None
    label: Float[Tensor, " n"] | None = None
    margin: Float[Tensor, " n"] | None = None
    experience: ExperienceTensors | None = None

    @classmethod
    def of(cls, mb: MicroBatch, device: torch.device) -> "MicroBatchTensors":
        """Copies the micro-batch to `device`."""
        names = [
            f.name
            for f in fields(cls)
            if f.name not in ("layout", "one_row", "branches", "experience", "ragged")
        ]
        columns = [_narrowed(name, getattr(mb, name)) for name in names]
        rl_columns = [] if mb.experience is None else experience_columns(mb.experience)
        places, blocks = _places(mb)
        tensors: list[Any] = to_device([*columns, *rl_columns, *places], device)
        at, within = tensors[-2:]
        ragged = None if at is None else Ragged(at, within, blocks)
        experience = ExperienceTensors(*tensors[len(names) : -2]) if rl_columns else None
        named: dict[str, Any] = dict(zip(names, tensors, strict=False))
        return cls(mb.layout, mb.one_row, mb.branches, **named, ragged=ragged, experience=experience)


def experience_columns(experience: Experience) -> list[NDArray[Any] | None]:
    """The columns of an Experience in the order of ExperienceTensors."""
    return [getattr(experience, f.name) for f in fields(Experience)]


def _places(mb: MicroBatch) -> tuple[tuple[NDArray[Any] | None, NDArray[Any] | None], tuple[Block, ...]]:
    """The columns of Ragged and its blocks. Without columns if there is almost no padding, and for padded
    rows: these need no mask, which saves more."""
    real = mb.segment >= 0
    at = np.flatnonzero(real)
    if mb.layout == "padded" or mb.one_row or len(at) > (1 - PADDING) * mb.positions:
        return (None, None), ()
    blocks = blocks_of(real.sum(1).tolist())
    row, column = np.divmod(at, mb.input_ids.shape[1])
    within = [(row[b.tokens] - b.rows.start) * b.length + column[b.tokens] for b in blocks]
    return (at, np.concatenate(within)), blocks


def _narrowed(name: str, column: NDArray[Any] | None) -> NDArray[Any] | None:
    return column.astype(np.int32) if name in NARROW and column is not None else column
