"""FlexAttention on a device. On a CPU Dynamo's graphs run eagerly.

torch refuses FlexAttention's backward on a CPU although its eager mathematics can compute it. Without that
check, masks, padding, gradients and the number of compilations are those of a GPU; the kernel is not.
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
    """Disables torch's refusal of a backward on a CPU, in this process."""
    flex_attention._validate_device = lambda *_: None
