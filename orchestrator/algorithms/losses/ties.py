"""Which of two answers is preferred; a tie counts one half.

A margin within rounding noise is a tie. A bare `>` counts an exact tie as wrong: a run that starts at its
reference would begin at an accuracy of 0 and seem to improve.

    noise of the log-ratio of two answers = TOKEN_NOISE * sqrt(scored tokens of both) nat

The errors of tokens add up like a random walk. Measured on 16 pairs of 266 scored tokens of GSM8K under
SmolLM2-135M, the same weights with rows batched and laid out in different ways:

    fp32  1.0e-5 to 6.5e-5 nat rms, at most 1.1e-4
    bf16  0.9 to 1.1 nat rms, at most 2.5

So for these pairs a margin below 1.2e-4 nat is a tie in fp32 (the maximum), and one below 1.0 nat in bf16
(the rms: a larger bound would hide a preference that shows over many pairs).
"""

import math
from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float, Float64
from numpy.typing import NDArray
from torch import Tensor

EPSILON = {"fp32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7, "bf16_autocast": 2.0**-7}
"""Spacing of numbers at 1 for each learners.precision."""
TOKEN_NOISE = {"fp32": 64 * EPSILON["fp32"]} | {
    name: 8 * EPSILON[name] for name in ("fp16", "bf16", "bf16_autocast")
}
"""Rounding of a scored token's log-prob in nat for each learners.precision. fp16 is not measured: its value
follows from its spacing."""

Length = TypeVar("Length", float, Tensor, NDArray[np.float64])


def margin_noise(tokens: Length, precision: str) -> Length:
    """Rounding noise in nat of the log-ratio of two answers. tokens: scored tokens of both together."""
    # the type checker minds a negative float, whose root would be complex
    return TOKEN_NOISE[precision] * tokens**0.5  # pyright: ignore[reportReturnType]


def preferred(margin: Float[Tensor, " n"], noise: Float[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """1 for a margin above the noise, 0 for one below -noise, one half for a tie."""
    return 0.5 * ((margin > noise).double() + (margin >= -noise).double())


def tied(margin: Float[Tensor, " n"], noise: Float[Tensor, " n"]) -> Float64[Tensor, " n"]:
    """1 for a tie."""
    return (margin.abs() <= noise).double()


def reward_noise(
    chosen: Float[Tensor, " n"], rejected: Float[Tensor, " n"], precision: str
) -> Float[Tensor, " n"]:
    """Rounding noise of the difference of two rewards: one spacing of the larger one."""
    return EPSILON[precision] * torch.maximum(chosen.abs(), rejected.abs())


def accuracy(margins: Sequence[float], noises: Sequence[float]) -> float:
    """Share of right pairs, where a tie counts one half; NaN if all pairs are ties."""
    if all(abs(m) <= n for m, n in zip(margins, noises, strict=True)):
        return math.nan
    return sum(0.5 if abs(m) <= n else float(m > n) for m, n in zip(margins, noises, strict=True)) / len(
        margins
    )
