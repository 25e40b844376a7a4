"""Losses over a whole effective batch, learned micro-batch by micro-batch through a linear surrogate.

    dL/dtheta = sum_t (dL/dlogp_t) (dlogp_t/dtheta)      by the chain rule

Once the coefficients dL/dlogp_t of the whole batch are known, sum_t coefficient_t * logp_t has the gradient
of the one large batch, however that batch is cut.
"""

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from orchestrator.algorithms.losses.interface import LossSum, Objective, TokenScores
from orchestrator.core.batches import LossUnits


def coefficients(
    objective: Objective, scores: TokenScores, units: LossUnits
) -> tuple[LossSum, Float[Tensor, " N"]]:
    """(loss of the whole effective batch, dL/dlogp in the order of scores.logps)."""
    logps = scores.logps.detach().requires_grad_()
    with torch.enable_grad():
        loss = objective(replace(scores, logps=logps), units)
        (gradient,) = torch.autograd.grad(loss.total, logps)
    return replace(loss, total=loss.total.detach()), gradient


def linear(logps: Float[Tensor, " N"], weights: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    """sum_t weight_t * logp_t: has the gradient of the coupled loss, not its value."""
    return (weights * logps).sum()
