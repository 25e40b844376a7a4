"""Rotary frequencies that do not depend on the other sequences of a batch.

transformers chooses longrope's and dynamic RoPE's frequencies by the longest position in the batch, so the
cut of a step would change the step. Here they are those of one length for all cuts: the longest that the
recipe allows (data.max_length).
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

PINNED = "pinned"
"""A kind that transformers does not update in the forward."""


def pinned(model: nn.Module) -> tuple[str, ...]:
    """Kinds of the rotary embeddings that pin() has fixed, e.g. ("longrope",)."""
    kinds = {getattr(module, "pinned_rope", None) for module in model.modules()}
    return tuple(sorted(kind for kind in kinds if isinstance(kind, str)))


def pin(model: nn.Module, longest: int) -> None:
    """Sets the frequencies of every rotary embedding to those for sequences of up to `longest` tokens."""
    for module, layer_type, kind in list(_moving(model)):
        _fix(module, layer_type, kind, longest)


def _moving(model: nn.Module) -> Iterator[tuple[Any, str | None, str]]:
    """(module, type of layers, kind) of rotary embeddings whose frequencies depend on the batch."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        by_layer = kinds.items() if isinstance(kinds, dict) else [(None, kinds)]
        for layer_type, kind in by_layer:
            if isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind):
                yield module, layer_type, kind


def _fix(module: Any, layer_type: str | None, kind: str, longest: int) -> None:
    prefix = "" if layer_type is None else f"{layer_type}_"
    present: torch.Tensor = getattr(module, f"{prefix}inv_freq")
    own = getattr(module, f"{prefix}max_seq_len_cached", None) or module.max_seq_len_cached
    # up to its own length dynamic RoPE keeps its initial frequencies
    if kind == "longrope" or longest > own:
        options = {} if layer_type is None else {"layer_type": layer_type}
        frequencies, scaling = ROPE_INIT_FUNCTIONS[kind](
            module.config, present.device, seq_len=longest, **options
        )
        module.register_buffer(f"{prefix}inv_freq", frequencies.to(present.dtype), persistent=False)
        setattr(module, f"{prefix}attention_scaling", scaling)
    module.pinned_rope = kind
    if layer_type is None:
        module.rope_type = PINNED
    else:
        module.rope_type[layer_type] = PINNED
