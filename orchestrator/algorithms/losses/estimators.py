"""From the rewards of a rollout batch to an advantage for each token, in the one shape that the online loop
needs.

rewards Float[G, n], KL penalties Float[N], a critic's values Float[N]  --Estimator-->  advantages Float[N], returns Float[N]
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from orchestrator.algorithms.losses import advantages


@dataclass(frozen=True, slots=True)
class Episodes:
    """A rollout batch. rewards: Float[G, n]; penalties: Float[N], what each scored token costs (the KL
    coefficient times its KL, zeros without); lengths: scored tokens of the G*n episodes, group after group;
    values: Float[N] of a critic."""

    rewards: Tensor
    penalties: Tensor
    lengths: tuple[int, ...]
    values: Tensor | None = None

    def penalised(self) -> Tensor:
        """Float[G, n]: the reward of each episode less its tokens' penalties."""
        owner = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
        costs = torch.zeros(len(self.lengths), dtype=self.rewards.dtype).index_add(
            0, owner, self.penalties.to(self.rewards.dtype)
        )
        return self.rewards - costs.view_as(self.rewards)


AdvantageEstimator = Callable[[Episodes], tuple[Tensor, Tensor | None]]
"""(advantages Float[N], returns Float[N] for a critic or None)."""


def by_group(estimate: Callable[[Tensor], Tensor]) -> AdvantageEstimator:
    """Every token of a completion gets its completion's advantage; the KL penalty is part of the completion's
    reward."""

    def estimator(episodes: Episodes) -> tuple[Tensor, None]:
        return estimate(episodes.penalised()).flatten().repeat_interleave(
            torch.tensor(episodes.lengths)
        ), None

    return estimator


def reinforce_pp(episodes: Episodes) -> tuple[Tensor, None]:
    """See advantages.reinforce_pp."""
    return advantages.reinforce_pp(episodes.rewards.flatten(), episodes.penalties, episodes.lengths), None


def reinforce_pp_baseline(episodes: Episodes) -> tuple[Tensor, None]:
    """See advantages.reinforce_pp_baseline."""
    return advantages.reinforce_pp_baseline(episodes.penalised(), episodes.lengths), None


def gae(gamma: float, lam: float, *, whiten: bool) -> AdvantageEstimator:
    """PPO: GAE over tokens; advantages are whitened over the rollout batch, returns are not."""

    def estimator(episodes: Episodes) -> tuple[Tensor, Tensor]:
        assert episodes.values is not None, "GAE needs a critic's values"
        rewards = advantages.token_rewards(episodes.rewards.flatten(), episodes.penalties, episodes.lengths)
        found, returns = advantages.episodes_gae(
            rewards, episodes.values.to(rewards.dtype), episodes.lengths, gamma, lam
        )
        return (advantages.whiten(found) if whiten else found), returns

    return estimator
