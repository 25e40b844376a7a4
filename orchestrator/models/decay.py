"""Which parameters decay. The rule is that of transformers' Trainer, so that the same weight decay gives the
same step."""

from collections.abc import Sequence
from typing import Any

from torch import nn


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of the trainable parameters for AdamW. Biases and the weights of norms do not decay. A single
    group if weight_decay is 0."""
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if not weight_decay:
        return [{"params": [p for _, p in trainable], "weight_decay": 0.0}]
    decays = decayed(model)
    split = (
        [p for name, p in trainable if name in decays],
        [p for name, p in trainable if name not in decays],
    )
    return [
        {"params": group, "weight_decay": decay}
        for group, decay in zip(split, (weight_decay, 0.0), strict=True)
        if group
    ]


def decayed(model: nn.Module) -> frozenset[str]:
    """Names of the parameters that decay."""
    from transformers import Trainer

    no_trainer: Any = None  # the method does not use self
    names: Sequence[str] = Trainer.get_decay_parameter_names(no_trainer, model)
    return frozenset(names)
