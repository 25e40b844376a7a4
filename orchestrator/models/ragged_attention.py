"""Attention over short rows of different lengths whose padding nothing else computes.

    rows [R, T] --their tokens alone: [1, N]--> embeddings, norms, products --attend: rows [R, T] again--> SDPA --> [1, N]

Rows are as long as the longest, and products with weights are most of a step: 30 % of one is padding where a
batch's answers are short and long. Here only attention, which is a small part of a short row, sees rows at
all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

RAGGED = "ragged_rows"
"""The name under which transformers' layers find `attend`."""
INSIDE = "sdpa"
"""transformers' own attention, which computes the rows."""
_ROWS = "orchestrator_rows"
NEAR = 0.8
"""A row joins longer ones where it is at least so long, in parts of the longest: attention grows with the
square of that."""
SHORT = 48
"""Rows of at most so many tokens are near to each other."""


@dataclass(frozen=True, slots=True)
class Block:
    """Rows of about one length that lie one after the other. tokens: theirs among all tokens; length: of the
    longest."""

    rows: slice
    tokens: slice
    length: int

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start


@dataclass(frozen=True, slots=True)
class Ragged:
    """Where tokens lie in rows [R, T]. at: Int[N] of r*T + t; within: Int[N], likewise in the rows of a
    token's block."""

    at: Tensor
    within: Tensor
    blocks: tuple[Block, ...]


def blocks_of(lengths: Sequence[int]) -> tuple[Block, ...]:
    """Blocks of rows with these numbers of tokens. Example: [100, 90, 20] -> rows 0 and 1 of 100, row 2 of
    20."""
    blocks: list[Block] = []
    first = start = 0
    for row in range(1, len(lengths) + 1):
        longest = lengths[first]
        if row < len(lengths) and (
            NEAR * longest <= lengths[row] <= longest or longest <= SHORT >= lengths[row]
        ):
            continue
        end = start + sum(lengths[first:row])
        blocks.append(Block(slice(first, row), slice(start, end), max(lengths[first:row])))
        first, start = row, end
    return tuple(blocks)


def spread(values: Tensor, at: Tensor, size: int) -> Tensor:
    """Float[size, ...] with values Float[N, ...] at the places `at` Int[N], zeros elsewhere."""
    return values.new_zeros(size, *values.shape[1:]).index_copy(0, at, values)


M = TypeVar("M")


def with_rows(mask: M, rows: Ragged) -> M:
    """The mask of rows [R, T] that says where in them the tokens lie. Layers are given their mask and nothing
    else of ours, now and when one is computed again in the backward, perhaps after other rows went through
    another model."""
    for tensor in mask.values() if isinstance(mask, dict) else (mask,):
        setattr(tensor, _ROWS, rows)
    return mask


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface. query: [1, heads, N, D]; key, value: [1, kv heads, N, D]; the
    output: [1, N, heads, D]."""
    rows: Ragged | None = getattr(attention_mask, _ROWS, None)
    if rows is None:
        raise TypeError(
            f"{type(module).__name__} got a mask without rows: this architecture builds masks of its own"
        )
    inside, outputs = ALL_ATTENTION_FUNCTIONS[INSIDE], []
    for block in rows.blocks:
        at = rows.within[block.tokens]
        parts = (_as_rows(values[0, :, block.tokens], at, block) for values in (query, key, value))
        output, _ = inside(
            module, *parts, attention_mask[block.rows, :, : block.length, : block.length], **options
        )
        outputs.append(output.flatten(0, 1).index_select(0, at))
    return torch.cat(outputs)[None], None


def _as_rows(values: Tensor, at: Tensor, block: Block) -> Tensor:
    """Float[rows, heads, length, D] of values Float[heads, n, D]."""
    heads, _, width = values.shape
    return (
        spread(values.transpose(0, 1).flatten(1), at, len(block) * block.length)
        .view(len(block), block.length, heads, width)
        .transpose(1, 2)
    )
