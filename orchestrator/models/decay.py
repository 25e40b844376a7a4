"""Which parameters weight decay pulls towards zero: transformers' own rule, so that the same number means the
same step as in its Trainer."""

from collections.abc import Sequence
from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups for AdamW over all that learns: biases and the weights of norms do not decay. One group where
    nothing decays."""
    learns = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not weight_decay:
        return [{"params": [p for _, p in learns], "weight_decay": 0.0}]
    decays = decayed(model)
    split = ([p for name, p in learns if name in decays], [p for name, p in learns if name not in decays])
    return [
        {"params": group, "weight_decay": decay}
        for group, decay in zip(split, (weight_decay, 0.0), strict=True)
        if group
    ]


def decayed(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that decay."""
    from transformers import Trainer

    names: Sequence[str] = Trainer.get_decay_parameter_names(None, model)  # pyright: ignore[reportArgumentType] (it does not look at itself)
    return frozenset(names)
