"""The margin that ranks held-out pairs: training's own. The sum of log-probs would rank by length.

algorithm           basis               margin: chosen less rejected of
with a reference    implicit reward     beta * log pi(y)/pi_ref(y)
without             log-prob per token  log pi(y)/|y|
a reward model      reward              r(y)
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from orchestrator.algorithms.losses.ties import EPSILON, margin_noise
from orchestrator.algorithms.table import AlgorithmSpec
from orchestrator.core.batches import Floats, MicroBatch, PackedBatch
from orchestrator.core.roles import PerMicroBatch
from orchestrator.recipe.schema import Recipe

Basis = Literal["implicit reward", "log-prob per token", "reward"]


@dataclass(frozen=True, slots=True)
class Margin:
    """Chosen less rejected."""

    value: float
    noise: float
    """Rounding that the value may hold."""


@dataclass(frozen=True, slots=True)
class Ranking:
    """How pairs are ranked."""

    basis: Basis
    beta: float = 1.0
    """Factor of the implicit reward."""
    precision: str = "fp32"
    """learners.precision."""
    starts_at_reference: bool = False
    """Before the first step policy and reference are the same model; rounding may make them differ."""

    @classmethod
    def of(cls, recipe: Recipe, algorithm: AlgorithmSpec, *, itself: bool = True) -> "Ranking":
        """The ranking of an algorithm. itself: the policy starts as the recipe's model."""
        precision = recipe.learners.precision
        if algorithm.head == "scalar":
            return cls("reward", precision=precision)
        if not algorithm.needs_reference:
            return cls("log-prob per token", precision=precision)
        return cls(
            "implicit reward", recipe.algorithm.beta, precision, itself and recipe.model.reference is None
        )

    def margins(self, batch: PackedBatch, sums: PerMicroBatch) -> dict[int, Margin]:
        """The margin of each example by its id.

        sums[rank][i]: Float[n, 2], log-prob sums (or rewards) of chosen and rejected.
        """
        by_example: dict[int, Margin] = {}
        for rank, values in zip(batch.micro_batches, sums, strict=True):
            for mb, per_example in zip(rank, values, strict=True):
                if mb.weight:
                    margins, noises = self._of(mb, per_example.astype(np.float64))
                    for example, margin, noise in zip(mb.examples, margins, noises, strict=True):
                        by_example[int(example)] = Margin(float(margin), float(noise))
        return by_example

    def _of(self, mb: MicroBatch, sums: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        if self.basis == "reward":
            return sums[:, 0] - sums[:, 1], EPSILON[self.precision] * np.abs(sums).max(1)
        lengths = (
            np.maximum(1, np.bincount(mb.sequence, minlength=sums.size))
            .reshape(sums.shape)
            .astype(np.float64)
        )
        if self.basis == "log-prob per token":
            means = sums / lengths
            return means[:, 0] - means[:, 1], margin_noise((1.0 / lengths).sum(1), self.precision)
        ratios = sums - _reference_sums(mb, sums.shape)
        return self.beta * (ratios[:, 0] - ratios[:, 1]), self.beta * margin_noise(
            lengths.sum(1), self.precision
        )


def _reference_sums(mb: MicroBatch, shape: tuple[int, ...]) -> np.ndarray:
    """Float[n, 2]: the reference's log-prob of each answer."""
    ref: Floats | None = mb.ref_logprobs
    assert ref is not None, "an implicit reward needs the reference's log-probs"
    return np.bincount(mb.sequence, weights=ref.astype(np.float64), minlength=int(np.prod(shape))).reshape(
        shape
    )
