"""Attention over short rows of different lengths, without computing their padding anywhere else.

    rows [R, T] --tokens alone--> [1, N] --embeddings, norms, products--> [1, N] --attend--+
                                            [1, N] <-- SDPA <-- blocks of rows [r, t] <----+

All rows are as long as the longest, and products with weights are most of a step: 30 % of a step is padding
if a batch has short and long answers. Here only attention, which is a small part of a short row's work,
computes rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

RAGGED = "ragged_rows"
"""Name of `attend` among transformers' attention functions."""
INSIDE = "sdpa"
"""Name of transformers' own attention, which computes the blocks of rows."""
_ROWS = "orchestrator_rows"
NEAR = 0.8
"""A row joins a block if its length is at least this share of the block's longest row. Attention grows with
the square of the length."""
SHORT = 48
"""Rows of at most this many tokens share a block, whatever their lengths."""


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of similar length."""

    rows: slice
    tokens: slice
    """Their tokens among the N tokens of all rows."""
    length: int
    """Tokens of the longest row."""

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start


@dataclass(frozen=True, slots=True)
class Ragged:
    """Places of N tokens in rows [R, T]."""

    at: Tensor
    """Int[N], r*T + t of each token."""
    within: Tensor
    """Int[N], the same within the rows of the token's block."""
    blocks: tuple[Block, ...]


def blocks_of(lengths: Sequence[int]) -> tuple[Block, ...]:
    """Blocks of rows with these numbers of tokens. Example: [100, 90, 20] -> rows 0 and 1 in a block of
    length 100, row 2 in one of length 20."""
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
    """Attaches the places of the tokens to the mask of their rows [R, T]. The mask is the only argument of
    ours that reaches the layers, also when one is computed again in the backward, by which time other rows
    may have passed through another model."""
    for tensor in mask.values() if isinstance(mask, dict) else (mask,):
        setattr(tensor, _ROWS, rows)
    return mask


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention interface. query: [1, heads, N, D]; key, value: [1, kv heads, N, D]; output:
    [1, N, heads, D]."""
    rows: Ragged | None = getattr(attention_mask, _ROWS, None)
    if rows is None:
        raise TypeError(
            f"{type(module).__name__} got a mask without rows: this architecture builds its own masks"
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
