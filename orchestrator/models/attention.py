"""Attention masks for rows that hold several sequences, and which architectures can take them.

The masks here are dense and made for short rows. One long row has masks of blocks (block_attention.py).
"""

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PretrainedConfig

from orchestrator.core.batches import Layout

_ONE_MASK = frozenset(
    {
        "llama",
        "mistral",
        "gemma",
        "phi",
        "phi3",
        "gpt2",
        "gpt_neox",
        "olmo2",
        "granite",
        "cohere",
        "falcon",
        "mixtral",
    }
)
_MASK_PER_KIND = frozenset({"qwen2", "qwen2_moe", "qwen3", "gemma2", "gemma3_text"})
"""Architectures that were measured to give the same log-probs under a 4-D mask
(tests/invariants/test_layouts.py). The second set needs one mask per kind of layer. All others get padded
rows, which need no mask of ours."""

_NO_BLOCKS = frozenset({"gpt2", "falcon"})
"""Architectures whose code needs a tensor as the mask, so that a long row cannot have a mask of blocks."""

_ALL: frozenset[Layout] = frozenset({"prefix_shared", "packed", "padded"})
Mask = Float[Tensor, "R 1 T T"] | dict[str, Float[Tensor, "R 1 T T"]] | None


def plain_attention(config: PretrainedConfig) -> str | None:
    """The attention implementation of transformers for rows without block masks. "eager" for models that cap
    their attention logits (Gemma 2), since SDPA silently drops the cap. Otherwise None, the library's own
    choice, which is SDPA."""
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


@dataclass(frozen=True, slots=True)
class Capabilities:
    """Rows and masks that an architecture can take."""

    layouts: frozenset[Layout]
    reason: str
    """Why it can take these layouts and no others."""
    window: int | None
    """Size of the sliding window in tokens."""
    kinds: tuple[str, ...]
    """Kinds of attention layers that need a mask each. Empty: one mask serves all layers."""
    blocks: bool = False
    """Whether a micro-batch may be one long row under masks of blocks."""


def capabilities(config: PretrainedConfig) -> Capabilities:
    """Rows and masks that a model of this configuration can take."""
    kind = config.model_type
    layers = tuple(sorted(set(getattr(config, "layer_types", None) or ())))
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    unknown = [layer for layer in layers if layer not in ("full_attention", "sliding_attention")]
    if kind not in _ONE_MASK | _MASK_PER_KIND:
        return Capabilities(
            frozenset({"padded"}), f"{kind} has not been shown to take a 4-D attention mask", window, ()
        )
    if unknown:
        return Capabilities(
            frozenset({"padded"}),
            f"{kind} has {', '.join(unknown)} layers, which no mask keeps apart",
            window,
            (),
        )
    if kind == "falcon" and getattr(config, "alibi", False):
        return Capabilities(frozenset({"padded"}), "falcon with alibi takes no position ids", None, ())
    return Capabilities(
        _ALL,
        f"{kind} takes a 4-D mask",
        window,
        layers if kind in _MASK_PER_KIND else (),
        kind not in _NO_BLOCKS,
    )


def attention_windows(config: PretrainedConfig) -> tuple[int | None, ...]:
    """Tokens that each layer's attention covers, the query included. None: all tokens before it."""
    window = capabilities(config).window
    kinds = getattr(config, "layer_types", None) or (None,) * (
        getattr(config, "num_hidden_layers", None) or 1
    )
    return tuple(window if kind in (None, "sliding_attention") else None for kind in kinds)


def attention_mask(
    segment: Int[Tensor, "R T"],
    branch: Int[Tensor, "R T"],
    positions: Int[Tensor, "R T"],
    layout: Layout,
    can: Capabilities,
    dtype: torch.dtype,
) -> Mask:
    """The additive mask of a micro-batch. One per kind of layer if the model mixes kinds.

    Token i sees token j iff j <= i, same segment, branch[j] in {0, branch[i]} and, in sliding layers, the
    POSITION distance is below the window (rows hold several sequences, so the distance in the row would be
    wrong). None for padded rows: padding is on the right, so plain causal attention is exact and fastest.
    """
    if layout == "padded":
        return None
    size = segment.shape[1]
    causal = torch.ones(size, size, dtype=torch.bool, device=segment.device).tril()
    same = segment[:, :, None] == segment[:, None, :]
    shared = (branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None])
    full = causal & same & shared
    if can.window is None:
        return _additive(full, dtype)
    near = (positions[:, :, None] - positions[:, None, :]) < can.window
    if not can.kinds:
        return _additive(full & near, dtype)
    masks = {"full_attention": full, "sliding_attention": full & near}
    return {kind: _additive(masks[kind], dtype) for kind in can.kinds}


def _additive(allowed: Bool[Tensor, "R T T"], dtype: torch.dtype) -> Float[Tensor, "R 1 T T"]:
    mask = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return mask.masked_fill_(~allowed, torch.finfo(dtype).min)[:, None]
