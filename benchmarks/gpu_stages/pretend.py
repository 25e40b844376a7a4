"""FlexAttention on a device; on a CPU with what torch can do there: Dynamo's graphs run eagerly.

torch refuses FlexAttention's backward on a CPU though its eager mathematics can do it; with the check off, masks, padding, gradients and
the number of compilations are those of a GPU. The kernel is not.
"""

from typing import Any

import torch
from torch.nn.attention import flex_attention


def compiled_flex(device: torch.device) -> Any:
    """flex_attention compiled once for every length."""
    if device.type == "cuda":
        return torch.compile(flex_attention.flex_attention, dynamic=True)
    allow_backward()
    return torch.compile(flex_attention.flex_attention, backend="eager", dynamic=True)


def allow_backward() -> None:
    """Takes off torch's refusal of a backward on a CPU, in this process."""
    flex_attention._validate_device = lambda *_: None
