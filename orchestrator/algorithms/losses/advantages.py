"""From the rewards of a rollout batch to an advantage for each token.

    rewards    Float[G, n]: n samples of each of G prompts
    penalties  Float[N]: KL penalty of each token
    values     Float[N]: a critic's value of each token

    Episodes --AdvantageEstimator--> advantages Float[N], returns Float[N] or None

    by_group                 rewards --group_*, leave_one_out--> Float[G, n] --> each token of its completion
    by_gae, by_reinforce_pp  rewards, penalties --token_rewards--> Float[N] --gae, whiten--> Float[N]

Token columns of different lengths are flat, Float[N], one episode after the other. `lengths` holds the tokens
of each episode; zeros are allowed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from orchestrator.algorithms.losses.interface import required

NEGLIGIBLE = 1e-8
"""A deviation below this share of the largest value is rounding: there is nothing to scale."""


@dataclass(frozen=True, slots=True)
class Episodes:
    """The episodes of a rollout batch, group after group."""

    rewards: Float[Tensor, "G n"]
    """Reward of each completion."""
    penalties: Float[Tensor, " N"]
    """KL coefficient times the KL of each scored token; zeros without a penalty."""
    lengths: tuple[int, ...]
    """Scored tokens of each of the G*n episodes. Example: (12, 0, 7, 9) for two groups of two."""
    values: Float[Tensor, " N"] | None = None
    """Value of each scored token, if there is a critic."""

    def penalised(self) -> Float[Tensor, "G n"]:
        """The reward of each episode less its tokens' penalties."""
        owner = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths))
        costs = torch.zeros(len(self.lengths), dtype=self.rewards.dtype).index_add(
            0, owner, self.penalties.to(self.rewards.dtype)
        )
        return self.rewards - costs.view_as(self.rewards)


AdvantageEstimator = Callable[[Episodes], tuple[Float[Tensor, " N"], Float[Tensor, " N"] | None]]
"""(advantages, returns for a critic or None)."""


# ---- estimators: from episodes to tokens, for the table of algorithms


def by_group(estimate: Callable[[Float[Tensor, "G n"]], Float[Tensor, "G n"]]) -> AdvantageEstimator:
    """Gives every token of a completion the advantage of its completion.

    The KL penalty is part of the completion's reward.
    """

    def estimator(episodes: Episodes) -> tuple[Float[Tensor, " N"], None]:
        per_completion = estimate(episodes.penalised()).flatten()
        return per_completion.repeat_interleave(torch.tensor(episodes.lengths)), None

    return estimator


def by_reinforce_pp(episodes: Episodes) -> tuple[Float[Tensor, " N"], None]:
    """REINFORCE++: see `reinforce_pp`."""
    return reinforce_pp(episodes.rewards.flatten(), episodes.penalties, episodes.lengths), None


def by_reinforce_pp_baseline(episodes: Episodes) -> tuple[Float[Tensor, " N"], None]:
    """REINFORCE++ with a baseline: see `reinforce_pp_baseline`."""
    return reinforce_pp_baseline(episodes.penalised(), episodes.lengths), None


def by_gae(gamma: float, lam: float, *, whitened: bool) -> AdvantageEstimator:
    """PPO: GAE over tokens. whitened: advantages are whitened over the rollout batch; returns never are."""

    def estimator(episodes: Episodes) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        values = required(episodes.values, "GAE", "a critic's values")
        rewards = token_rewards(episodes.rewards.flatten(), episodes.penalties, episodes.lengths)
        advantages, returns = episodes_gae(rewards, values.to(rewards.dtype), episodes.lengths, gamma, lam)
        return (whiten(advantages) if whitened else advantages), returns

    return estimator


# ---- equations


def group_centred(rewards: Float[Tensor, "G n"]) -> Float[Tensor, "G n"]:
    """A_i = r_i - mean(r) (Dr. GRPO, arXiv 2503.20783)."""
    return rewards - rewards.mean(1, keepdim=True)


def group_normalised(
    rewards: Float[Tensor, "G n"], scale_by_std: bool = True, eps: float = 1e-4
) -> Float[Tensor, "G n"]:
    """A_i = (r_i - mean(r)) / (std(r) + eps) (GRPO, arXiv 2402.03300, sec. 4.1.2).

    std is the unbiased deviation, eps has TRL's value. A group of one sample has deviation 0. Without scaling
    this is Dr. GRPO's advantage.
    """
    centred = group_centred(rewards)
    if not scale_by_std or rewards.shape[1] < 2:
        return centred
    return centred / (rewards.std(1, keepdim=True) + eps)


def leave_one_out(rewards: Float[Tensor, "G n"]) -> Float[Tensor, "G n"]:
    """A_i = r_i - mean of the other n - 1 rewards of the group (RLOO, arXiv 2402.14740)."""
    n = rewards.shape[1]
    if n < 2:
        raise ValueError(
            f"leave-one-out needs at least 2 samples of a prompt, got {n}: "
            "the baseline is the mean of the others"
        )
    return (n / (n - 1)) * group_centred(rewards)  # r_i - (sum - r_i)/(n - 1)


def token_rewards(
    rewards: Float[Tensor, " B"], penalties: Float[Tensor, " N"], lengths: Sequence[int]
) -> Float[Tensor, " N"]:
    """r_t = [t = T] R - penalty_t (Ziegler et al., arXiv 1909.08593, eq. 2, written per token).

    The last token of an episode gets the episode's reward. An episode without tokens loses its reward.
    penalties: the KL coefficient times k1 of each token.
    """
    sizes = torch.tensor(lengths, device=penalties.device)
    last, has_tokens = sizes.cumsum(0) - 1, sizes > 0
    return (-penalties).index_add(0, last[has_tokens], rewards[has_tokens].to(penalties.dtype))


def gae(
    rewards: Float[Tensor, "*rows T"], values: Float[Tensor, "*rows T"], gamma: float, lam: float
) -> tuple[Float[Tensor, "*rows T"], Float[Tensor, "*rows T"]]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) of finished episodes.

    Returns (advantages, returns):

        delta_t = r_t + gamma V_{t+1} - V_t with V_T = 0
        A_t = delta_t + gamma lam A_{t+1}
        return_t = A_t + V_t

    Zeros that pad the end of a row change nothing before them.
    """
    following = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)
    delta = rewards + gamma * following - values
    advantages, running = torch.empty_like(delta), delta.new_zeros(delta.shape[:-1])
    for t in reversed(range(delta.shape[-1])):
        running = delta[..., t] + gamma * lam * running  # eq. 16
        advantages[..., t] = running
    return advantages, advantages + values


def episodes_gae(
    rewards: Float[Tensor, " N"],
    values: Float[Tensor, " N"],
    lengths: Sequence[int],
    gamma: float,
    lam: float,
) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
    """`gae` of each episode of flat columns: (advantages, returns)."""
    if not len(rewards):
        return rewards.clone(), values.clone()
    inside = (
        torch.arange(max(lengths), device=rewards.device)
        < torch.tensor(lengths, device=rewards.device)[:, None]
    )
    padded = [
        pad_sequence(list(column.split(list(lengths))), batch_first=True) for column in (rewards, values)
    ]
    advantages, returns = gae(padded[0], padded[1], gamma, lam)
    return advantages[inside], returns[inside]


def discounted_returns(rewards: Float[Tensor, "*rows T"], gamma: float) -> Float[Tensor, "*rows T"]:
    """G_t = r_t + gamma G_{t+1}: `gae` with lambda 1 and without values."""
    return gae(rewards, torch.zeros_like(rewards), gamma, 1.0)[0]


def whiten(values: Float[Tensor, " N"]) -> Float[Tensor, " N"]:
    """(x - mean(x)) / std(x) with the unbiased deviation; zeros if N < 2 or all are equal."""
    if len(values) < 2:
        return torch.zeros_like(values)
    exact = values.double()
    centred, deviation = exact - exact.mean(), exact.std()
    if deviation <= NEGLIGIBLE * exact.abs().max():
        return torch.zeros_like(values)
    return (centred / deviation).to(values.dtype)


def reinforce_pp(
    rewards: Float[Tensor, " B"], penalties: Float[Tensor, " N"], lengths: Sequence[int]
) -> Float[Tensor, " N"]:
    """A_t = R - sum_{i >= t} penalty_i, whitened over the GLOBAL batch of tokens.

    REINFORCE++ (arXiv 2501.03262, eq. 8-10). rewards: those of all episodes of the rollout batch. penalties:
    beta * k1 of each token (eq. 9).
    """
    rewarded = token_rewards(rewards, penalties, lengths)
    returns, _ = episodes_gae(rewarded, torch.zeros_like(rewarded), lengths, 1.0, 1.0)  # eq. 8
    return whiten(returns)  # eq. 10


def reinforce_pp_baseline(rewards: Float[Tensor, "G n"], lengths: Sequence[int]) -> Float[Tensor, " N"]:
    """r - mean of its group, on each token, whitened over the GLOBAL batch of tokens.

    REINFORCE++ with a baseline (arXiv 2501.03262); its KL term is k2 in the loss. lengths: tokens of the G*n
    episodes, group after group.
    """
    sizes = torch.tensor(lengths, device=rewards.device)
    return whiten(group_centred(rewards).flatten().repeat_interleave(sizes))
