"""The critic's loss: literal numbers, its gradient, any cut of the batch, explained variance."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.algorithms.losses.interface import ExperienceTensors, LossSum, TokenScores
from orchestrator.algorithms.losses.value import ValueLoss, explained_variance, value_losses
from orchestrator.core.batches import LossUnits


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


VALUES, OLD, RETURNS = tensor(1.0, 0.0, 2.0, 0.1), tensor(0.0, 0.1, 0.0, 0.0), tensor(2.0, 1.0, 0.0, 0.0)


def scores(values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor) -> TokenScores:
    nothing = torch.zeros_like(returns)
    experience = ExperienceTensors(advantages=nothing, sampled_logps=nothing, values=old, returns=returns)
    return TokenScores(
        nothing, torch.zeros(len(values), dtype=torch.long), 1, 1, values=values, experience=experience
    )


def mean(loss: LossSum, name: str) -> float:
    total, count = loss.means[name]
    return float(total) / count


def test_literally():
    """Clipped at 0.2: 0.2, 0, 0.2, 0.1. The larger error counts: 1.8 (not 1), 1, 2 (not 0.2), 0.1."""
    same = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(value_losses(VALUES, OLD, RETURNS, 0.2), tensor(1.62, 0.5, 2.0, 0.005), **same)
    torch.testing.assert_close(value_losses(VALUES, OLD, RETURNS, None), tensor(0.5, 0.5, 2.0, 0.005), **same)


def test_divided_by_the_global_count():
    loss = ValueLoss(0.2)(scores(VALUES, OLD, RETURNS), LossUnits(3, (10,)))
    assert loss.total.item() == pytest.approx((1.62 + 0.5 + 2.0 + 0.005) / 10)
    want = {
        "loss": 4.125 / 4,
        "mean": 3.1 / 4,
        "clip_fraction": 1 / 4,
        "error_sq": 6.01 / 4,
        "return": 3 / 4,
        "return_sq": 5 / 4,
    }
    for name, value in want.items():
        assert mean(loss, f"value/{name}") == pytest.approx(value), name


def test_explained_variance_from_the_sums():
    loss = ValueLoss(None)(scores(VALUES, OLD, RETURNS), LossUnits(1, (4,)))
    got = explained_variance(*(mean(loss, f"value/{name}") for name in ("error_sq", "return", "return_sq")))
    assert got == pytest.approx(1.0 - float((VALUES - RETURNS).square().mean() / RETURNS.var(correction=0)))
    assert explained_variance(0.0, 0.75, 1.25) == 1.0
    assert math.isnan(explained_variance(0.1, 0.5, 0.25))


@pytest.mark.parametrize("clip", [None, 0.2])
def test_gradient(clip):
    """Against finite differences. A value beyond its clip gets no gradient if the clipped error is larger."""
    objective, units = ValueLoss(clip), LossUnits(2, (7,))
    at = VALUES.clone().requires_grad_()
    (got,) = torch.autograd.grad(objective(scores(at, OLD, RETURNS), units).total, at)
    want = torch.zeros(4, dtype=torch.float64)
    for i in range(4):
        for sign in (1.0, -1.0):
            moved = VALUES.clone()
            moved[i] += sign * 1e-5
            want[i] += sign * objective(scores(moved, OLD, RETURNS), units).total / 2e-5
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-9)
    assert (float(got[0]) == 0.0) == (clip is not None)
    assert float(got[1]) < 0 < float(got[2])


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, 9), max_size=4), seed=st.integers(0, 2**20))
def test_sum_over_any_partition_is_the_whole(cuts, seed):
    draw = torch.Generator().manual_seed(seed)
    columns = [torch.randn(9, generator=draw, dtype=torch.float64) for _ in range(3)]
    objective, units = ValueLoss(0.2), LossUnits(1, (9,))
    whole = objective(scores(*columns), units)
    stops = [0, *sorted(cuts), 9]
    parts = [objective(scores(*(c[a:b] for c in columns)), units) for a, b in pairwise(stops)]
    assert float(sum(p.total for p in parts)) == pytest.approx(float(whole.total), rel=1e-12)
    for name, (total, count) in whole.means.items():
        assert float(sum(p.means[name][0] for p in parts)) == pytest.approx(
            float(total), rel=1e-12, abs=1e-12
        ), name
        assert sum(p.means[name][1] for p in parts) == count, name
