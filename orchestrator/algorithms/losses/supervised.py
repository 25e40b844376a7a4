"""Supervised fine-tuning."""

from orchestrator.algorithms.losses.interface import LossSum, TokenScores
from orchestrator.core.batches import LossUnits


def cross_entropy(scores: TokenScores, units: LossUnits) -> LossSum:
    """Token cross-entropy: -sum_t log p(x_t | x_<t) / T with T scored tokens in the EFFECTIVE batch."""
    total = -scores.logps.sum()
    sums, tokens = -scores.sums().detach().sum(1), scores.lengths().sum(1)
    return LossSum(
        total / units.tokens,
        {"nll_loss": (total.detach(), float(len(scores.logps)))},
        per_example={"loss": (sums, tokens)},
    )
