"""FlexAttention on a device; on a CPU with what torch can do there: Dynamo's graphs run eagerly.

torch refuses FlexAttention's backward on a CPU though its eager mathematics can do it; with the check off,
masks, padding, gradients and the number of compilations are those of a GPU. The kernel is not.
"""

from typing import Any

import torch
from torch.nn.attention import flex_attention

from orchestrator.models.block_attention import compiled_attention


def compiled_flex(device: torch.device) -> Any:
    """The learner's compiled FlexAttention."""
    if device.type == "cpu":
        allow_backward()
    return compiled_attention()


def allow_backward() -> None:
    """Takes off torch's refusal of a backward on a CPU, in this process."""
    flex_attention._validate_device = lambda *_: None
