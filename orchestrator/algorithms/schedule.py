"""Learning rate as a function of the optimizer step."""

import math

from orchestrator.recipe.schema import Optimizer


def warmup(optimizer: Optimizer, total_steps: int) -> int:
    """Optimizer steps of the warm-up: warmup_steps, or warmup_ratio of the run, rounded up (transformers)."""
    return optimizer.warmup_steps or math.ceil(total_steps * optimizer.warmup_ratio)


def learning_rate(optimizer: Optimizer, step: int, total_steps: int) -> float:
    """Learning rate of the 0-based optimizer step `step`; micro-batches never count.

    It equals transformers' schedules, so that a recipe moves the weights as TRL does. The rate rises linearly
    from 0 at the first step to the peak after `warmup` steps. Then it stays constant, or decays (linearly or
    by a cosine) to `min_learning_rate` at step `total_steps`.
    """
    peak, floor, first = optimizer.learning_rate, optimizer.min_learning_rate, warmup(optimizer, total_steps)
    if step < first:
        return peak * step / first
    if optimizer.schedule == "constant":
        return peak
    done = min(1.0, (step - first) / max(1, total_steps - first))
    if optimizer.schedule == "linear":
        return floor + (peak - floor) * (1.0 - done)
    return floor + (peak - floor) * 0.5 * (1.0 + math.cos(math.pi * done))
