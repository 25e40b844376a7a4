"""A micro-batch on its way to the device: one buffer, one copy that nothing waits for.

    numpy columns --packed--> one buffer (pinned before a GPU) --one copy--> the same bytes there --sliced--> tensors

A copy per column would stop the host as often, each time until the device has done all that was asked of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from orchestrator.algorithms.losses.interface import ExperienceTensors
from orchestrator.core.batches import Experience, Layout, MicroBatch
from orchestrator.models.ragged_attention import Block, Ragged, blocks_of

PADDING = 0.03
"""Share of rows that may be padding before it is left out: what that costs beside each layer's attention."""
ALIGNMENT = 16
"""Bytes that each column starts at a multiple of: no view is torn, and vectorised loads are."""
NARROW = frozenset({"position_ids", "segment", "branch"})
"""Columns of small whole numbers that are compared but index nothing: int32 there."""


def moved(columns: Sequence[NDArray[Any] | None], device: torch.device) -> list[Tensor | None]:
    """The columns as tensors of the same shapes and types on `device`, by one copy. None stays None."""
    starts, size = [], 0
    for column in columns:
        starts.append(size)
        size += 0 if column is None else -(-column.nbytes // ALIGNMENT) * ALIGNMENT
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=True) if device.type == "cuda" else None
    host = np.empty(size, np.uint8) if pinned is None else pinned.numpy()
    for start, column in zip(starts, columns, strict=True):
        if column is not None:
            host[start : start + column.nbytes].view(column.dtype)[:] = column.ravel()
    there = (
        torch.from_numpy(host) if pinned is None else pinned.to(device, non_blocking=True)
    )  # torch keeps it until that is done
    return [
        None if column is None else _slice(there, start, column)
        for start, column in zip(starts, columns, strict=True)
    ]


def _slice(buffer: Tensor, start: int, column: NDArray[Any]) -> Tensor:
    dtype = torch.from_numpy(np.empty(0, column.dtype)).dtype
    return buffer[start : start + column.nbytes].view(dtype).view(column.shape)


@dataclass(frozen=True, slots=True)
class MicroBatchTensors:
    """The columns of a records.MicroBatch on the device, by their names and shapes. ragged: where in the rows
    the tokens lie that are no padding; None where rows are to be computed as they are."""

    layout: Layout
    one_row: bool
    branches: int
    input_ids: Tensor
    position_ids: Tensor
    segment: Tensor
    branch: Tensor
    score_at: Tensor
    targets: Tensor
    sequence: Tensor
    last_at: Tensor
    identity: Tensor
    ragged: Ragged | None = None
    source: Tensor | None = None
    ref_logprobs: Tensor | None = None
    coefficients: Tensor | None = None
    label: Tensor | None = None
    margin: Tensor | None = None
    experience: ExperienceTensors | None = None

    @classmethod
    def of(cls, mb: MicroBatch, device: torch.device) -> "MicroBatchTensors":
        """The micro-batch on `device`."""
        names = [
            f.name
            for f in fields(cls)
            if f.name not in ("layout", "one_row", "branches", "experience", "ragged")
        ]
        known = [] if mb.experience is None else experience_columns(mb.experience)
        own = [_narrowed(name, getattr(mb, name)) for name in names]
        places, blocks = _places(mb)
        tensors: list[Any] = moved([*own, *known, *places], device)
        at, within = tensors[-2:]
        ragged = None if at is None else Ragged(at, within, blocks)
        experience = ExperienceTensors(*tensors[len(names) : -2]) if known else None
        named: dict[str, Any] = dict(zip(names, tensors, strict=False))
        return cls(mb.layout, mb.one_row, mb.branches, **named, ragged=ragged, experience=experience)


def experience_columns(experience: Experience) -> list[NDArray[Any] | None]:
    """Its columns in the order of ExperienceTensors."""
    return [getattr(experience, f.name) for f in fields(Experience)]


def _places(mb: MicroBatch) -> tuple[tuple[NDArray[Any] | None, NDArray[Any] | None], tuple[Block, ...]]:
    """The columns of Ragged. None where there is next to no padding, and for padded rows: theirs needs no
    mask, which is worth more."""
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
