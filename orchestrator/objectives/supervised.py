"""Supervised fine-tuning."""

from orchestrator.objectives.scores import LossSum, TokenScores
from orchestrator.records import LossUnits


def cross_entropy(scores: TokenScores, units: LossUnits) -> LossSum:
    """Token cross-entropy: -sum_t log p(x_t | x_<t) / T, T = scored tokens of the EFFECTIVE batch."""
    total = -scores.logps.sum()
    return LossSum(total / units.tokens, {"nll_loss": (total.detach(), float(len(scores.logps)))})
