"""KTO's objective: unpaired answers, each desirable or undesirable.

branch 0, the answer      log-ratio h ------------------------+
branch 1, a mismatched    mean log-ratio, at least 0 --> z ---+--> kto_losses --> sum / examples
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from orchestrator.algorithms.losses.interface import LossSum, Means, TokenScores, required
from orchestrator.algorithms.losses.preference import kto_losses
from orchestrator.core.batches import LossUnits


@dataclass(frozen=True, slots=True)
class Kto:
    """KTO over the effective batch. Branch 1 holds a mismatched completion y', from which z is estimated.

    z = max(0, mean over the EFFECTIVE batch of log pi(y')/pi_ref(y')), without gradient (arXiv 2402.01306,
    eq. 6-8).
    """

    beta: float
    desirable: float
    """Weight of desirable completions."""
    undesirable: float
    """Weight of undesirable completions."""

    def __call__(self, scores: TokenScores, units: LossUnits) -> LossSum:
        label = required(scores.label, "KTO", "a label for each example")
        policy, reference = scores.sums(), scores.ref_sums()
        ratio, mismatched = (policy - reference).unbind(1)
        kl = (mismatched.detach().sum() / units.examples).clamp(min=0)
        losses = kto_losses(ratio, label, kl, self.beta, self.desirable, self.undesirable)
        means = self._metrics(policy[:, 0].detach(), ratio.detach(), label, kl)
        return LossSum(losses.sum() / units.examples, means, per_example={"loss": (losses.detach(), None)})

    def _metrics(
        self,
        logps: Float[Tensor, " n"],
        ratio: Float[Tensor, " n"],
        label: Float[Tensor, " n"],
        kl: Float[Tensor, ""],
    ) -> Means:
        metrics: Means = {"kl": (kl, 1.0)}
        rewards = self.beta * ratio
        for name, mask in (("chosen", label > 0.5), ("rejected", label <= 0.5)):
            count = mask.sum()
            metrics[f"rewards/{name}"] = (torch.where(mask, rewards, 0.0).sum(), count)
            metrics[f"logps/{name}"] = (torch.where(mask, logps, 0.0).sum(), count)
        return metrics
