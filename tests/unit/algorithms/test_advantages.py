"""Advantages on literal numbers, against brute-force closed forms, and without anything to compare with."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.algorithms.losses.advantages import (
    discounted_returns,
    episodes_gae,
    gae,
    group_centred,
    group_normalised,
    leave_one_out,
    reinforce_pp,
    reinforce_pp_baseline,
    token_rewards,
    whiten,
)


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Means 2 and 0.25, unbiased deviations sqrt(2/3) and 0.5.
REWARDS = torch.tensor([[1.0, 2.0, 3.0, 2.0], [1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
CENTRED = torch.tensor([[-1.0, 0.0, 1.0, 0.0], [0.75, -0.25, -0.25, -0.25]], dtype=torch.float64)


def same(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_group_forms_literally():
    same(group_centred(REWARDS), CENTRED)
    same(group_normalised(REWARDS, scale_by_std=False), CENTRED)
    scale = tensor(math.sqrt(2 / 3) + 1e-4, 0.5 + 1e-4)
    same(group_normalised(REWARDS), CENTRED / scale[:, None])
    same(group_normalised(REWARDS, eps=0.5), CENTRED / (scale[:, None] + 0.5 - 1e-4))


def test_leave_one_out_literally():
    # 1 - (2+3+2)/3, 2 - (1+3+2)/3, …
    same(
        leave_one_out(REWARDS),
        torch.tensor([[-4 / 3, 0.0, 4 / 3, 0.0], [1.0, -1 / 3, -1 / 3, -1 / 3]], dtype=torch.float64),
    )


def test_equal_rewards_teach_nothing():
    rewards = torch.full((2, 3), 0.1, dtype=torch.float32)
    for advantages in (group_normalised(rewards), leave_one_out(rewards), group_centred(rewards)):
        assert float(advantages.abs().max()) < 1e-3
        assert torch.isfinite(advantages).all()


def test_a_group_of_one():
    same(group_normalised(tensor(3.0)[:, None]), tensor(0.0)[:, None])
    with pytest.raises(ValueError, match="at least 2 samples of a prompt, got 1"):
        leave_one_out(tensor(3.0)[:, None])


def test_token_rewards_literally():
    """Episodes of 3, 0 and 1 tokens; the one without tokens loses its reward."""
    got = token_rewards(tensor(1.0, 9.0, -2.0), tensor(0.1, 0.2, 0.3, 0.4), (3, 0, 1))
    same(got, tensor(-0.1, -0.2, 0.7, -2.4))


def test_gae_literally():
    """gamma 0.5, lambda 0.5: delta = (0 + 0.5*2 - 1, 0 + 0.5*4 - 2, 1 - 4) = (0, 0, -3)."""
    advantages, returns = gae(tensor(0.0, 0.0, 1.0), tensor(1.0, 2.0, 4.0), 0.5, 0.5)
    same(advantages, tensor(-3 / 16, -3 / 4, -3.0))
    same(returns, tensor(13 / 16, 5 / 4, 1.0))


def brute_force_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """The exponentially weighted mean of all n-step advantages, written out (Schulman et al., eq. 11-16)."""
    end = len(rewards)

    def n_step(t: int, n: int) -> float:
        last = min(t + n, end)
        bootstrap = gamma**n * values[t + n] if t + n < end else 0.0
        return sum(gamma ** (i - t) * rewards[i] for i in range(t, last)) + bootstrap - values[t]

    def mixed(t: int) -> float:
        steps = (
            end - t
        )  # beyond it all n-step advantages are equal: their weights add up to lambda^(steps - 1)
        shorter = sum((1 - lam) * lam ** (n - 1) * n_step(t, n) for n in range(1, steps))
        return shorter + lam ** (steps - 1) * n_step(t, steps)

    return [mixed(t) for t in range(end)]


episode_numbers = st.lists(st.tuples(st.floats(-3, 3), st.floats(-3, 3)), min_size=1, max_size=7)


@settings(max_examples=60)
@given(
    episodes=st.lists(episode_numbers, min_size=1, max_size=5),
    gamma=st.floats(0.0, 1.0),
    lam=st.floats(0.0, 1.0),
)
def test_gae_of_ragged_episodes_against_brute_force(episodes, gamma, lam):
    rewards = tensor(*(r for episode in episodes for r, _ in episode))
    values = tensor(*(v for episode in episodes for _, v in episode))
    lengths = [len(episode) for episode in episodes]
    want = tensor(
        *(a for e in episodes for a in brute_force_gae([r for r, _ in e], [v for _, v in e], gamma, lam))
    )
    advantages, returns = episodes_gae(rewards, values, lengths, gamma, lam)
    torch.testing.assert_close(advantages, want, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(returns, want + values, rtol=1e-9, atol=1e-9)
    alone = [
        gae(r, v, gamma, lam)[0] for r, v in zip(rewards.split(lengths), values.split(lengths), strict=True)
    ]
    same(torch.cat(alone), advantages)


def test_episodes_without_tokens():
    rewards, values = tensor(1.0, 2.0, 3.0), tensor(0.5, 0.25, 0.0)
    with_gaps = episodes_gae(rewards, values, (0, 2, 0, 1), 0.9, 0.8)
    without = episodes_gae(rewards, values, (2, 1), 0.9, 0.8)
    for a, b in zip(with_gaps, without, strict=True):
        same(a, b)
    assert [len(column) for column in episodes_gae(tensor(), tensor(), (0, 0), 1.0, 1.0)] == [0, 0]
    assert len(gae(tensor(), tensor(), 1.0, 1.0)[0]) == 0


def test_the_limits_of_gae():
    """lambda 1: return minus value; lambda 0: the one-step error."""
    rewards, values = tensor(0.5, -1.0, 2.0), tensor(1.0, 0.25, -0.5)
    same(gae(rewards, values, 0.9, 1.0)[0], discounted_returns(rewards, 0.9) - values)
    same(gae(rewards, values, 0.9, 1.0)[1], discounted_returns(rewards, 0.9))
    same(gae(rewards, values, 0.9, 0.0)[0], tensor(0.5 + 0.9 * 0.25 - 1.0, -1.0 - 0.9 * 0.5 - 0.25, 2.5))


def test_discounted_returns_literally():
    same(discounted_returns(tensor(1.0, 0.0, 4.0), 0.5), tensor(2.0, 2.0, 4.0))
    same(
        discounted_returns(torch.tensor([[1.0, 2.0], [3.0, 0.0]], dtype=torch.float64), 1.0),
        torch.tensor([[3.0, 2.0], [3.0, 0.0]]).double(),
    )


def test_whiten_literally():
    same(whiten(tensor(1.0, 2.0, 3.0)), tensor(-1.0, 0.0, 1.0))
    got = whiten(torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 7 + 3)
    assert got.dtype == torch.float32
    assert float(got.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(got.std()) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.parametrize("values", [[], [5.0], [0.1] * 7, [0.0, 0.0], [1e6 + 0.1] * 100])
def test_whiten_without_a_deviation(values):
    """Rounding of the mean must not be scaled up to deviation 1."""
    got = whiten(tensor(*values))
    same(got, torch.zeros_like(got))


def test_reinforce_pp_literally():
    """Rewards 1 and 0, penalties (0.5, 0.25) and (1): returns 1 - 0.75, 1 - 0.25 and -1; mean 0, deviation
    sqrt(1.625 / 2)."""
    got = reinforce_pp(tensor(1.0, 0.0), tensor(0.5, 0.25, 1.0), (2, 1))
    same(got, tensor(0.25, 0.75, -1.0) / math.sqrt(1.625 / 2))


def test_reinforce_pp_baseline_literally():
    """Group means 0.5 and 2: (0.5, -0.5 | -1, 1), on 2, 1, 1 and 2 tokens; their mean is 0.25 over tokens,
    not over completions."""
    rewards = torch.tensor([[1.0, 0.0], [1.0, 3.0]], dtype=torch.float64)
    tokens = tensor(0.5, 0.5, -0.5, -1.0, 1.0, 1.0)
    same(reinforce_pp_baseline(rewards, (2, 1, 1, 2)), (tokens - 0.25) / tokens.std())


def test_reinforce_pp_normalises_over_the_whole_batch():
    """Scaling each group alone would make the two groups equal."""
    rewards = torch.tensor([[0.0, 1.0], [0.0, 10.0]], dtype=torch.float64)
    got = reinforce_pp_baseline(rewards, (1, 1, 1, 1))
    assert float(got[3] / got[1]) == pytest.approx(10.0)
