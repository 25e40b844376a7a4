"""Attention over short rows of different lengths whose padding nothing else computes.

    rows [R, T] --their tokens alone: [1, N]--> embeddings, norms, products --attend: rows [R, T] again--> SDPA --> [1, N]

Rows are as long as the longest, and products with weights are most of a step: 30 % of one is padding where a batch's answers are short and
long. Here only attention, which is a small part of a short row, sees rows at all.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orchestrator.models.attention import Mask

RAGGED = "ragged_rows"
"""The name under which transformers' layers find `attend`."""
INSIDE = "sdpa"
"""transformers' own attention, which computes the rows."""
_AT = "orchestrator_tokens_at"


def spread(values: Tensor, at: Tensor, size: int) -> Tensor:
    """Float[size, ...] with values Float[N, ...] at the places `at` Int[N], zeros elsewhere."""
    return values.new_zeros(size, *values.shape[1:]).index_copy(0, at, values)


def with_tokens(mask: Mask, at: Tensor) -> Mask:
    """The mask of rows [R, T] which says where in them the tokens lie, at: Int[N] of r*T + t. Layers are given their mask and nothing else of
    ours, now and when a layer is computed again in the backward, perhaps after other rows went through another model."""
    for tensor in mask.values() if isinstance(mask, dict) else (mask,):
        setattr(tensor, _AT, at)
    return mask


def attend(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention interface. query: [1, heads, N, D]; key, value: [1, kv heads, N, D]; the output: [1, N, heads, D]."""
    at = getattr(attention_mask, _AT, None)
    if at is None:
        raise TypeError(f"{type(module).__name__} got a mask without rows: this architecture builds masks of its own")
    rows, _, length, _ = attention_mask.shape

    def as_rows(values: Tensor) -> Tensor:
        flat = values[0].transpose(0, 1).flatten(1)
        return spread(flat, at, rows * length).view(rows, length, values.shape[1], values.shape[3]).transpose(1, 2)

    output, weights = ALL_ATTENTION_FUNCTIONS[INSIDE](module, as_rows(query), as_rows(key), as_rows(value), attention_mask, **options)
    return output.flatten(0, 1).index_select(0, at)[None], weights
