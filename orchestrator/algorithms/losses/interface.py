"""What an objective is given and what it returns: sums, never means."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from orchestrator.core.batches import LossUnits
from orchestrator.core.errors import OrchestratorError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ExperienceTensors:
    """core.batches.Experience on the device."""

    advantages: Float[Tensor, " N"]
    sampled_logps: Float[Tensor, " N"]
    old_logps: Float[Tensor, " N"] | None = None
    """None: the policy's own log-probs of this step, detached."""
    ref_logps: Float[Tensor, " N"] | None = None
    values: Float[Tensor, " N"] | None = None
    returns: Float[Tensor, " N"] | None = None


@dataclass(frozen=True, slots=True)
class TokenScores:
    """Scores of a micro-batch or of a whole effective batch; an objective takes either.

    N: scored tokens; n: examples.
    """

    logps: Float[Tensor, " L"]
    """The policy's log-probs of the scored tokens (L = N); carries the gradient. Empty (L = 0) under a scalar
    head or a critic."""
    sequence: Int[Tensor, " N"]
    """Sequence of each token, example * branches + branch. Example: 5 is branch 1 of example 2."""
    examples: int
    branches: int
    ref_logps: Float[Tensor, " N"] | None = None
    """The reference's log-probs."""
    label: Float[Tensor, " n"] | None = None
    """1 for a desirable completion, 0 for an undesirable one."""
    margin: Float[Tensor, " n"] | None = None
    """Margin by which the chosen answer is better."""
    wpo: Float[Tensor, " N"] | None = None
    """log p(token) - log sum p^2, without gradient."""
    rewards: Float[Tensor, "n branches"] | None = None
    """Output of a scalar head."""
    entropy: Float[Tensor, " N"] | None = None
    """Entropy of the distribution at each scored token."""
    values: Float[Tensor, " N"] | None = None
    """A critic's values; carries its gradient."""
    experience: ExperienceTensors | None = None
    """Columns of the rollouts that the tokens come from."""
    precision: str = "fp32"
    """learners.precision that these scores were computed in."""

    def per_sequence(self, values: Float[Tensor, " N"]) -> Float[Tensor, "n branches"]:
        """Sums of the token values of each sequence."""
        total = torch.zeros(self.examples * self.branches, dtype=values.dtype, device=values.device)
        return total.index_add(0, self.sequence, values).view(self.examples, self.branches)

    def sums(self) -> Float[Tensor, "n branches"]:
        """The policy's log-prob of each branch."""
        return self.per_sequence(self.logps)

    def ref_sums(self) -> Float[Tensor, "n branches"]:
        """The reference's log-prob of each branch."""
        ref_logps = required(self.ref_logps, "this loss", "reference log-probs")
        return self.per_sequence(ref_logps.to(self.logps.dtype))

    def lengths(self) -> Float[Tensor, "n branches"]:
        """Scored tokens of each branch."""
        return self.per_sequence(torch.ones_like(self.logps))


@dataclass(frozen=True, slots=True)
class LossSum:
    """What an objective returns. Nothing in an objective may wait for the device."""

    total: Float[Tensor, ""]
    """A sum of losses, already divided by the GLOBAL count of its unit."""
    means: "Means"
    """Name -> (sum, count). A count that only the device knows is a tensor."""
    maxima: dict[str, Float[Tensor, ""]] = field(default_factory=dict)
    """Metrics whose reduction over micro-batches and ranks is the maximum."""
    per_example: "PerExample" = field(default_factory=dict)
    """Name -> (sums, counts or None for 1) of the examples: the means that are also reported per source."""


Means = dict[str, tuple[Float[Tensor, ""], float | Num[Tensor, ""]]]
PerExample = dict[str, tuple[Float[Tensor, " n"], Float[Tensor, " n"] | None]]
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
