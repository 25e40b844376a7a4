"""What an objective sees and what it returns: sums, never means."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from orchestrator.core.batches import LossUnits


@dataclass(frozen=True, slots=True)
class ExperienceTensors:
    """records.Experience on the device: Float[N] each. old_logps None: the policy's own, detached."""

    advantages: Tensor
    sampled_logps: Tensor
    old_logps: Tensor | None = None
    ref_logps: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Scores of a micro-batch, or of a whole effective batch: the same objective takes either.

    logps: Float[N], policy log-probs of the scored tokens (carries the gradient); ref_logps: Float[N], the
    reference's. sequence: Int[N], which sequence (example * branches + branch) a token belongs to. label,
    margin: Float[n]. wpo: Float[N], log p(token) - log sum p^2, without gradient. rewards: Float[n, branches]
    of a scalar head. entropy: Float[N], of the distribution at each scored token. values: Float[N] of a
    critic (carries its gradient). experience: what RL knows of the tokens. precision: learners.precision,
    that all these were made in.
    """

    logps: Tensor
    sequence: Tensor
    examples: int
    branches: int
    ref_logps: Tensor | None = None
    label: Tensor | None = None
    margin: Tensor | None = None
    wpo: Tensor | None = None
    rewards: Tensor | None = None
    entropy: Tensor | None = None
    values: Tensor | None = None
    experience: ExperienceTensors | None = None
    precision: str = "fp32"

    def per_sequence(self, values: Tensor) -> Tensor:
        """Sums Float[N] token values into Float[n, branches]."""
        total = torch.zeros(self.examples * self.branches, dtype=values.dtype, device=values.device)
        return total.index_add(0, self.sequence, values).view(self.examples, self.branches)

    def sums(self) -> Tensor:
        """Float[n, branches]: log-prob of each branch under the policy."""
        return self.per_sequence(self.logps)

    def ref_sums(self) -> Tensor:
        """Float[n, branches]: log-prob of each branch under the reference."""
        assert self.ref_logps is not None, "this objective needs reference log-probs"
        return self.per_sequence(self.ref_logps.to(self.logps.dtype))

    def lengths(self) -> Tensor:
        """Float[n, branches]: scored tokens of each branch."""
        return self.per_sequence(torch.ones_like(self.logps))


@dataclass(frozen=True, slots=True)
class LossSum:
    """total: scalar, a sum of losses already divided by the GLOBAL count of its unit. means: name -> (sum,
    count), a count that only the device knows being a tensor: nothing in an objective may wait for the
    device. maxima: name -> scalar, metrics whose reduction over micro-batches and ranks is the maximum.
    per_example: name -> (Float[n] sums, Float[n] counts or None for 1): of the means that are also told for
    each source of the data."""

    total: Tensor
    means: "Means"
    maxima: dict[str, Tensor] = field(default_factory=dict)
    per_example: "PerExample" = field(default_factory=dict)


Means = dict[str, tuple[Tensor, float | Tensor]]
PerExample = dict[str, tuple[Tensor, Tensor | None]]
Objective = Callable[[TokenScores, LossUnits], LossSum]


def totals(per_example: PerExample) -> Means:
    """The means of a micro-batch from its examples' values."""
    return {
        name: (sums.sum(), float(len(sums)) if counts is None else counts.sum())
        for name, (sums, counts) in per_example.items()
    }
