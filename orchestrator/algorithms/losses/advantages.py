"""Advantages of completions (of a group of samples of one prompt) and of tokens (of an episode).

    rewards Float[G, n] --group_*, leave_one_out--> Float[G, n]
    rewards Float[B], KL penalties Float[N] --token_rewards--> Float[N] --gae, discounted_returns, whiten--> Float[N]

Ragged token columns are flat, Float[N], episode after episode, with the `lengths` of the episodes (zeros
allowed).
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

NEGLIGIBLE = 1e-8
"""A deviation this small against the largest value is rounding: there is nothing to scale."""


def group_centred(rewards: Tensor) -> Tensor:
    """A_i = r_i - mean(r), Float[G, n] (Dr. GRPO, arXiv 2503.20783)."""
    return rewards - rewards.mean(1, keepdim=True)


def group_normalised(rewards: Tensor, scale_by_std: bool = True, eps: float = 1e-4) -> Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + eps), Float[G, n] (GRPO, arXiv 2402.03300, sec. 4.1.2).

    std is unbiased and eps TRL's; a group of one has deviation 0. Not scaled: Dr. GRPO.
    """
    centred = group_centred(rewards)
    if not scale_by_std or rewards.shape[1] < 2:
        return centred
    return centred / (rewards.std(1, keepdim=True) + eps)


def leave_one_out(rewards: Tensor) -> Tensor:
    """A_i = r_i - mean of the other n - 1 rewards of the group, Float[G, n] (RLOO, arXiv 2402.14740)."""
    n = rewards.shape[1]
    if n < 2:
        raise ValueError(
            f"leave-one-out needs at least 2 samples of a prompt, got {n}: the baseline is the mean of the "
            "others"
        )
    return (n / (n - 1)) * group_centred(rewards)  # r_i - (sum - r_i)/(n - 1)


def token_rewards(rewards: Tensor, penalties: Tensor, lengths: Sequence[int]) -> Tensor:
    """r_t = [t = T] R - penalty_t, Float[N]: an episode's reward Float[B] comes with its last token (Ziegler
    et al., arXiv 1909.08593, eq. 2, written per token).

    penalties: Float[N], the KL coefficient times k1 of each token. An episode without tokens has nowhere to
    put its reward.
    """
    sizes = torch.tensor(lengths, device=penalties.device)
    last, some = sizes.cumsum(0) - 1, sizes > 0
    return (-penalties).index_add(0, last[some], rewards[some].to(penalties.dtype))


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (arXiv 1506.02438, eq. 16) of finished episodes: (advantages,
    returns), Float[..., T] each.

    delta_t = r_t + gamma V_{t+1} - V_t with V_T = 0; A_t = delta_t + gamma lam A_{t+1}; return_t = A_t + V_t.
    Rows padded with zeros at their end are exact: nothing comes from a padded place.
    """
    following = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)
    delta = rewards + gamma * following - values
    advantages, running = torch.empty_like(delta), delta.new_zeros(delta.shape[:-1])
    for t in reversed(range(delta.shape[-1])):
        running = delta[..., t] + gamma * lam * running  # eq. 16
        advantages[..., t] = running
    return advantages, advantages + values


def episodes_gae(
    rewards: Tensor, values: Tensor, lengths: Sequence[int], gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """gae of each episode of flat Float[N] columns: (advantages, returns), Float[N] each."""
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


def discounted_returns(rewards: Tensor, gamma: float) -> Tensor:
    """G_t = r_t + gamma G_{t+1}, Float[..., T]: gae with lambda 1 and no values."""
    return gae(rewards, torch.zeros_like(rewards), gamma, 1.0)[0]


def whiten(values: Tensor) -> Tensor:
    """(x - mean(x)) / std(x), Float[N], with the unbiased deviation; zeros where there is none (N < 2, or
    equal values)."""
    if len(values) < 2:
        return torch.zeros_like(values)
    exact = values.double()
    centred, deviation = exact - exact.mean(), exact.std()
    if deviation <= NEGLIGIBLE * exact.abs().max():
        return torch.zeros_like(values)
    return (centred / deviation).to(values.dtype)


def reinforce_pp(rewards: Tensor, penalties: Tensor, lengths: Sequence[int]) -> Tensor:
    """REINFORCE++ (arXiv 2501.03262, eq. 8-10), Float[N]: A_t = R - sum_{i >= t} penalty_i, normalised over
    the GLOBAL batch of tokens.

    rewards: Float[B], of all episodes of the rollout batch; penalties: Float[N], beta * k1 of each token (eq.
    9).
    """
    rewarded = token_rewards(rewards, penalties, lengths)
    returns, _ = episodes_gae(rewarded, torch.zeros_like(rewarded), lengths, 1.0, 1.0)  # eq. 8
    return whiten(returns)  # eq. 10


def reinforce_pp_baseline(rewards: Tensor, lengths: Sequence[int]) -> Tensor:
    """REINFORCE++ with baseline (arXiv 2501.03262), Float[N]: r - mean of its group, on each token,
    normalised over the GLOBAL batch.

    rewards: Float[G, n]; lengths: of the G*n episodes, group after group. Its KL term is k2 in the loss.
    """
    sizes = torch.tensor(lengths, device=rewards.device)
    return whiten(group_centred(rewards).flatten().repeat_interleave(sizes))
