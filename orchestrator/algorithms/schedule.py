"""Learning rate as a function of the optimizer step."""

import math

from orchestrator.recipe.schema import Optimizer


def warmup(optimizer: Optimizer, total_steps: int) -> int:
    """Optimizer steps of the warm-up: as set, or warmup_ratio of the run, rounded up as transformers does."""
    return optimizer.warmup_steps or math.ceil(total_steps * optimizer.warmup_ratio)


def learning_rate(optimizer: Optimizer, step: int, total_steps: int) -> float:
    """Learning rate of the 0-based optimizer step `step`; micro-batches never count.

    As transformers' schedules, so that a recipe moves the weights as TRL does: linear warm-up over so many
    steps as `warmup` says, from 0 at the first step to the peak after them; then constant, linear or cosine
    decay to `min_learning_rate` at step `total_steps`.
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
