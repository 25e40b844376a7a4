"""KL estimators on literal numbers and as estimators; the adaptive coefficient."""

import math

import pytest
import torch

from orchestrator.algorithms.losses.kl import ESTIMATORS, adapt, k1, k2, k3

LOGPS = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64)
REFERENCE = torch.tensor([-1.0, -1.0, -2.5], dtype=torch.float64)
# log r = 0, 1, -2
LITERAL = {"k1": [0.0, -1.0, 2.0], "k2": [0.0, 0.5, 2.0], "k3": [0.0, math.e - 2.0, math.exp(-2.0) + 1.0]}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_literally(name):
    want = torch.tensor(LITERAL[name], dtype=torch.float64)
    torch.testing.assert_close(ESTIMATORS[name](LOGPS, REFERENCE), want, rtol=1e-12, atol=1e-12)


def two_distributions() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 7, generator=draw, dtype=torch.float64)
    policy, reference = torch.log_softmax(logits, 1)
    return policy, reference


def test_k1_and_k3_have_the_divergence_as_their_expectation():
    policy, reference = two_distributions()
    divergence = float((policy.exp() * (policy - reference)).sum())
    assert divergence > 0.1
    for estimator in (k1, k3):
        assert float((policy.exp() * estimator(policy, reference)).sum()) == pytest.approx(
            divergence, rel=1e-12
        )


def test_on_policy_k2_has_the_gradient_of_the_divergence_and_k1_has_none():
    """Why k1 belongs into the reward: E[grad log pi] = 0."""
    draw = torch.Generator().manual_seed(1)
    logits = torch.randn(7, generator=draw, dtype=torch.float64).requires_grad_()
    _, reference = two_distributions()
    policy = torch.log_softmax(logits, 0)
    held = policy.detach().exp()
    (want,) = torch.autograd.grad((policy.exp() * (policy - reference)).sum(), logits, retain_graph=True)
    (of_k2,) = torch.autograd.grad((held * k2(policy, reference)).sum(), logits, retain_graph=True)
    (of_k1,) = torch.autograd.grad((held * k1(policy, reference)).sum(), logits)
    assert float(want.abs().max()) > 0.01
    torch.testing.assert_close(of_k2, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(of_k1, torch.zeros_like(of_k1), rtol=0, atol=1e-12)


def test_k3_is_accurate_for_policies_that_hardly_differ():
    """(r - 1) - log r ~ (log r)^2 / 2 has to survive fp32: exp(x) - 1 - x would be 0 or noise."""
    logps = torch.full((1,), -1.0)
    moved = logps + 2.0**-12
    assert float(k3(logps, moved)) == pytest.approx(2.0**-25, rel=1e-3)


@pytest.mark.parametrize(
    ("observed", "want"),
    [
        (0.1, 0.5),  # on target
        (0.11, 0.5 * (1 + 0.1 * 64 / 1000)),  # e = 0.1
        (0.3, 0.5 * (1 + 0.2 * 64 / 1000)),  # e = 2, kept within 0.2
        (0.0, 0.5 * (1 - 0.2 * 64 / 1000)),  # e = -1, kept within 0.2
    ],
)
def test_adapt_literally(observed, want):
    assert adapt(0.5, observed, target=0.1, horizon=1000.0, rollouts=64) == pytest.approx(want, rel=1e-12)


def test_adapt_changes_a_coefficient_by_at_most_e_to_the_fifth_per_horizon():
    coefficient = 1.0
    for _ in range(100):
        coefficient = adapt(coefficient, observed=9.0, target=0.1, horizon=6400.0, rollouts=64)
    assert coefficient == pytest.approx(math.exp(0.2), rel=1e-3)


def test_adapt_never_turns_a_coefficient_negative():
    """Without a bound a rollout batch of 10 horizons would give 1 - 0.2 * 10 < 0, which rewards distance from
    the reference."""
    assert adapt(1.0, observed=0.0, target=0.1, horizon=10.0, rollouts=100) == pytest.approx(0.8)
