"""What an objective is given and what it returns: sums, never means."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from torch import Tensor

from orchestrator.core.batches import LossUnits
from orchestrator.core.errors import OrchestratorError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ExperienceTensors:
    """core.batches.Experience on the device: Float[N] each."""

    advantages: Tensor
    sampled_logps: Tensor
    old_logps: Tensor | None = None
    """None: the policy's own log-probs of this step, detached."""
    ref_logps: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Scores of a micro-batch or of a whole effective batch; an objective takes either.

    N: scored tokens; n: examples.
    """

    logps: Tensor
    """Float[N]: the policy's log-probs of the scored tokens; carries the gradient."""
    sequence: Tensor
    """Int[N]: sequence of each token, example * branches + branch. Example: 5 is branch 1 of example 2."""
    examples: int
    branches: int
    ref_logps: Tensor | None = None
    """Float[N]: the reference's log-probs."""
    label: Tensor | None = None
    """Float[n]: 1 for a desirable completion, 0 for an undesirable one."""
    margin: Tensor | None = None
    """Float[n]: margin by which the chosen answer is better."""
    wpo: Tensor | None = None
    """Float[N]: log p(token) - log sum p^2, without gradient."""
    rewards: Tensor | None = None
    """Float[n, branches]: output of a scalar head."""
    entropy: Tensor | None = None
    """Float[N]: entropy of the distribution at each scored token."""
    values: Tensor | None = None
    """Float[N]: a critic's values; carries its gradient."""
    experience: ExperienceTensors | None = None
    """Columns of the rollouts that the tokens come from."""
    precision: str = "fp32"
    """learners.precision that these scores were computed in."""

    def per_sequence(self, values: Tensor) -> Tensor:
        """Sums Float[N] token values into Float[n, branches]."""
        total = torch.zeros(self.examples * self.branches, dtype=values.dtype, device=values.device)
        return total.index_add(0, self.sequence, values).view(self.examples, self.branches)

    def sums(self) -> Tensor:
        """Float[n, branches]: the policy's log-prob of each branch."""
        return self.per_sequence(self.logps)

    def ref_sums(self) -> Tensor:
        """Float[n, branches]: the reference's log-prob of each branch."""
        ref_logps = required(self.ref_logps, "this loss", "reference log-probs")
        return self.per_sequence(ref_logps.to(self.logps.dtype))

    def lengths(self) -> Tensor:
        """Float[n, branches]: scored tokens of each branch."""
        return self.per_sequence(torch.ones_like(self.logps))


@dataclass(frozen=True, slots=True)
class LossSum:
    """What an objective returns. Nothing in an objective may wait for the device."""

    total: Tensor
    """Scalar: a sum of losses, already divided by the GLOBAL count of its unit."""
    means: "Means"
    """Name -> (sum, count). A count that only the device knows is a tensor."""
    maxima: dict[str, Tensor] = field(default_factory=dict)
    """Name -> scalar: metrics whose reduction over micro-batches and ranks is the maximum."""
    per_example: "PerExample" = field(default_factory=dict)
    """Name -> (Float[n] sums, Float[n] counts or None for 1): the means that are also reported per source."""


Means = dict[str, tuple[Tensor, float | Tensor]]
PerExample = dict[str, tuple[Tensor, Tensor | None]]
Objective = Callable[[TokenScores, LossUnits], LossSum]


def totals(per_example: PerExample) -> Means:
    """The means of a micro-batch from its examples' values."""
    return {
        name: (sums.sum(), float(len(sums)) if counts is None else counts.sum())
        for name, (sums, counts) in per_example.items()
    }


def required(column: T | None, loss: str, name: str) -> T:
    """The column; OrchestratorError if the batch does not hold it.

    The recipe's checks exclude that. Without them a missing column would end as a lost worker.
    """
    if column is None:
        raise OrchestratorError(
            f"{loss} needs {name}, and the batch holds none",
            fix="this is a bug: report it with logs/ of the run",
        )
    return column
