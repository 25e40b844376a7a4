"""Which of two answers is preferred, ties counting one half.

A margin that is only rounding noise says nothing of the model. Counted as wrong, as a bare `>` counts an
exact tie, it makes every run that starts at its reference begin at an accuracy of 0 and end as a triumph.

    noise of the log-ratio of two answers = TOKEN_NOISE * sqrt(scored tokens of both) nat

The errors of tokens add up like a random walk. Measured on 16 pairs of 266 scored tokens of GSM8K under
SmolLM2-135M, the same weights with rows batched and laid out otherwise: in fp32 1.0e-5 to 6.5e-5 nat rms, at
most 1.1e-4; in bf16 0.9 to 1.1 nat rms, at most 2.5. So a tie is what is below 1.2e-4 nat there in fp32, the
most that was seen, and below 1.0 nat in bf16, its rms: more would hide what many pairs say together.
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

EPSILON = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7, "bf16_autocast": 2.0**-7}
"""Spacing of numbers at 1, by learners.precision."""
TOKEN_NOISE = {"fp32": 64 * EPSILON["fp32"]} | {
    name: 8 * EPSILON[name] for name in ("fp16", "bf16", "bf16_autocast")
}
"""Rounding of a scored token's log-prob in nat, by learners.precision; fp16's by its spacing, it is not
measured."""

Length = TypeVar("Length", float, Tensor, NDArray[np.float64])


def margin_noise(tokens: Length, precision: str) -> Length:
    """Rounding noise in nat of the log-ratio of two answers that hold so many scored tokens together."""
    return TOKEN_NOISE[precision] * tokens**0.5  # pyright: ignore[reportReturnType]  # of a float it could be complex, were it negative


def preferred(margin: Tensor, noise: Tensor) -> Tensor:
    """Float64[n]: 1 where the margin is above the noise, 0 where it is below -noise, one half for a tie."""
    return 0.5 * ((margin > noise).double() + (margin >= -noise).double())


def tied(margin: Tensor, noise: Tensor) -> Tensor:
    """Float64[n]: 1 for a tie."""
    return (margin.abs() <= noise).double()


def reward_noise(chosen: Tensor, rejected: Tensor, precision: str) -> Tensor:
    """Rounding noise of the difference of two rewards: one spacing of the larger of them."""
    return EPSILON[precision] * torch.maximum(chosen.abs(), rejected.abs())


def accuracy(margins: Sequence[float], noises: Sequence[float]) -> float:
    """Share of right pairs, ties counting one half; NaN where all are ties: then nothing is known."""
    if all(abs(m) <= n for m, n in zip(margins, noises, strict=True)):
        return math.nan
    return sum(0.5 if abs(m) <= n else float(m > n) for m, n in zip(margins, noises, strict=True)) / len(
        margins
    )
