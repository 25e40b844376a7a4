"""Reward models from preference pairs."""

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from orchestrator.algorithms.losses.interface import LossSum, PerExample, TokenScores, required, totals
from orchestrator.algorithms.losses.ties import preferred, reward_noise, tied
from orchestrator.core.batches import LossUnits


def bradley_terry_losses(
    chosen: Float[Tensor, " n"],
    rejected: Float[Tensor, " n"],
    margin: Float[Tensor, " n"] | None,
    centring: float,
) -> Float[Tensor, " n"]:
    """-log sigmoid(r_c - r_r - m) + c (r_c + r_r)^2.

    Bradley-Terry as in InstructGPT (arXiv 2203.02155, eq. 1), with the margin m of Llama 2 (arXiv 2307.09288,
    eq. 2) and the centring c of Eisenstein et al. (arXiv 2312.09244), which keeps the mean reward near 0.
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    return -F.logsigmoid(difference) + centring * (chosen + rejected).square()


def bradley_terry(scores: TokenScores, units: LossUnits, *, centring: float = 0.0) -> LossSum:
    """The reward loss summed over pairs, divided by the pairs of the effective batch."""
    rewards = required(scores.rewards, "a reward loss", "the rewards of a scalar head")
    chosen, rejected = rewards.unbind(1)
    losses = bradley_terry_losses(chosen, rejected, scores.margin, centring)
    chosen, rejected = chosen.detach(), rejected.detach()
    margins, noise = chosen - rejected, reward_noise(chosen, rejected, scores.precision)
    per_example: PerExample = {
        "rewards/margins": (margins, None),
        "rewards/accuracies": (preferred(margins, noise), None),
        "rewards/ties": (tied(margins, noise), None),
    }
    count = float(scores.examples)
    means = {
        "rewards/chosen": (chosen.sum(), count),
        "rewards/rejected": (rejected.sum(), count),
        **totals(per_example),
    }
    return LossSum(
        losses.sum() / units.examples, means, per_example=per_example | {"loss": (losses.detach(), None)}
    )
