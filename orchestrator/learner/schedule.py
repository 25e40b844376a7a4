"""Learning rate as a function of the optimizer step."""

import math

from orchestrator.config import Optimizer


def learning_rate(optimizer: Optimizer, step: int, total_steps: int) -> float:
    """Learning rate of the 0-based optimizer step `step`; micro-batches never count.

    As transformers' schedules, so that a recipe moves the weights as TRL does: linear warm-up over `warmup_steps`, from 0 at the first
    step to the peak at step `warmup_steps`; then constant, linear or cosine decay to `min_learning_rate` at step `total_steps`.
    """
    peak, floor, warmup = optimizer.learning_rate, optimizer.min_learning_rate, optimizer.warmup_steps
    if step < warmup:
        return peak * step / warmup
    if optimizer.schedule == "constant":
        return peak
    done = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if optimizer.schedule == "linear":
        return floor + (peak - floor) * (1.0 - done)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
