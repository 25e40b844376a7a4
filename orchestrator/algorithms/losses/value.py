"""PPO's critic: its loss, and the share of the returns' variance that it explains."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from orchestrator.algorithms.losses.interface import LossSum, Means, TokenScores, required
from orchestrator.core.batches import LossUnits


def value_losses(
    values: Float[Tensor, " N"],
    old_values: Float[Tensor, " N"],
    returns: Float[Tensor, " N"],
    clip: float | None,
) -> Float[Tensor, " N"]:
    """0.5 max((V - R)^2, (V_old + clip(V - V_old, -c, c) - R)^2); 0.5 (V - R)^2 if c is None.

    The clipped form is that of OpenAI's baselines (ppo2) and of arXiv 2005.12729, sec. 2. It is a pessimistic
    bound: one rollout batch moves a value by at most c.
    """
    plain = (values - returns).square()
    if clip is None:
        return 0.5 * plain
    near = old_values + (values - old_values).clamp(-clip, clip)
    return 0.5 * torch.max(plain, (near - returns).square())


def explained_variance(error_sq: float, returns: float, returns_sq: float) -> float:
    """1 - E[(V - R)^2] / Var(R), from the means `value/error_sq`, `value/return` and `value/return_sq`.

    NaN if all returns are equal.
    """
    variance = returns_sq - returns**2
    return 1.0 - error_sq / variance if variance > 0 else float("nan")


@dataclass(frozen=True, slots=True)
class ValueLoss:
    """The critic's loss summed over tokens, divided by the tokens of the effective batch."""

    clip: float | None = 0.2
    """Largest change of a value from one rollout batch; None: unclipped."""

    def __call__(self, scores: TokenScores, units: LossUnits) -> LossSum:
        loss = "the critic's loss"
        experience = required(scores.experience, loss, "experience")
        returns = required(experience.returns, loss, "returns")
        live = required(scores.values, loss, "a critic's values")
        losses = value_losses(live, required(experience.values, loss, "old values"), returns, self.clip)
        values = live.detach()
        columns = {
            "value/loss": losses.detach(),
            "value/mean": values,
            "value/clip_fraction": 2.0 * losses.detach() > (values - returns).square(),
            "value/error_sq": (values - returns).square(),
            "value/return": returns,
            "value/return_sq": returns.square(),
        }
        count = float(len(values))
        means: Means = {name: (column.double().sum(), count) for name, column in columns.items()}
        return LossSum(losses.sum() / max(units.tokens, 1), means)
