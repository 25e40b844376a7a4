"""Equations of the preference family on literal numbers."""

import math

import pytest
import torch

from orchestrator.algorithms.losses import preference
from orchestrator.algorithms.losses.preference import Pairs, PreferenceParams, f_divergence_link


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x))


# Two pairs with log-ratios (1, 0.5) and (-2, 2), lengths (4, 2) and (5, 8).
PAIRS = Pairs(
    chosen=tensor(-3.0, -8.0),
    rejected=tensor(-2.5, -4.0),
    ref_chosen=tensor(-4.0, -6.0),
    ref_rejected=tensor(-3.0, -6.0),
    score_chosen=tensor(1.0, -2.0),
    score_rejected=tensor(0.5, 2.0),
    tokens_chosen=tensor(4.0, 5.0),
    tokens_rejected=tensor(2.0, 8.0),
)
PARAMS = PreferenceParams(beta=0.5, label_smoothing=0.2, simpo_gamma=0.3, discopop_tau=0.1)
LITERAL = {
    "sigmoid": [0.8 * -math.log(sigmoid(x)) - 0.2 * math.log(sigmoid(-x)) for x in (0.25, -2.0)],
    "robust": [(-0.8 * math.log(sigmoid(x)) + 0.2 * math.log(sigmoid(-x))) / 0.6 for x in (0.25, -2.0)],
    "hinge": [0.75, 3.0],
    "ipo": [(1 / 4 - 0.5 / 2 - 1.0) ** 2, (-2 / 5 - 2 / 8 - 1.0) ** 2],
    "exo_pair": [
        sigmoid(x) * (math.log(sigmoid(x)) - math.log(0.8))
        + sigmoid(-x) * (math.log(sigmoid(-x)) - math.log(0.2))
        for x in (0.25, -2.0)
    ],
    "nca_pair": [
        -math.log(sigmoid(c)) - 0.5 * math.log(sigmoid(-c)) - 0.5 * math.log(sigmoid(-r))
        for c, r in ((0.5, 0.25), (-1.0, 1.0))
    ],
    "bco_pair": [-math.log(sigmoid(c)) - math.log(sigmoid(-r)) for c, r in ((0.5, 0.25), (-1.0, 1.0))],
    "sppo_hard": [0.0 + 1.5**2, 3.0**2 + 3.0**2],
    # log pi differences -0.5, -4 against the reference's -1, 0, each sorted: 4 - 1 below, -0.5 - 0 above.
    "aot": [
        0.8 * -math.log(sigmoid(x)) - 0.2 * math.log(sigmoid(-x)) for x in (0.5 * (-4 + 1), 0.5 * (-0.5 - 0))
    ],
    # Log-ratios of chosen -2, 1 against rejected 0.5, 2.
    "aot_unpaired": [
        0.8 * -math.log(sigmoid(x)) - 0.2 * math.log(sigmoid(-x)) for x in (0.5 * -2.5, 0.5 * -1.0)
    ],
    "apo_zero": [1 - sigmoid(0.5) + sigmoid(0.25), 1 - sigmoid(-1.0) + sigmoid(1.0)],
    "apo_down": [sigmoid(0.5) + 1 - sigmoid(0.25), sigmoid(-1.0) + 1 - sigmoid(-2.0)],
    "discopop": [
        -math.log(sigmoid(x)) * (1 - sigmoid(x / 0.1)) + math.exp(-x) * sigmoid(x / 0.1) for x in (0.25, -2.0)
    ],
    "sigmoid_norm": [-math.log(sigmoid(0.5 * x)) for x in (1 / 4 - 0.5 / 2, -2 / 5 - 2 / 8)],
    "simpo": [
        0.8 * -math.log(sigmoid(x)) - 0.2 * math.log(sigmoid(-x))
        for x in (0.5 * (-3 / 4 + 2.5 / 2) - 0.3, 0.5 * (-8 / 5 + 4 / 8) - 0.3)
    ],
    "cpo": [0.8 * -math.log(sigmoid(x)) - 0.2 * math.log(sigmoid(-x)) for x in (-0.25, -2.0)],
}


@pytest.mark.parametrize("name", LITERAL)
def test_losses_literally(name):
    got = getattr(preference, name)(PAIRS, PARAMS)
    torch.testing.assert_close(got, tensor(*LITERAL[name]), rtol=1e-12, atol=1e-12)


def test_orpo_literally():
    odds = [math.exp(m) / (1 - math.exp(m)) for m in (-3 / 4, -2.5 / 2, -8 / 5, -4 / 8)]
    want = [-0.5 * math.log(sigmoid(math.log(c / r))) for c, r in ((odds[0], odds[1]), (odds[2], odds[3]))]
    torch.testing.assert_close(preference.orpo(PAIRS, PARAMS), tensor(*want), rtol=1e-12, atol=1e-12)


def test_kto_literally():
    got = preference.kto_losses(
        tensor(1.0, -2.0), tensor(1.0, 0.0), torch.tensor(0.5, dtype=torch.float64), 0.5, 1.2, 0.8
    )
    torch.testing.assert_close(
        got, tensor(1.2 * (1 - sigmoid(0.25)), 0.8 * (1 - sigmoid(1.25))), rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize(
    ("name", "alpha", "want"),
    [
        ("reverse_kl", 0.5, lambda t: math.log(t)),
        ("forward_kl", 0.5, lambda t: 1 - 1 / t),
        ("js", 0.5, lambda t: math.log(2 * t / (1 + t))),
        ("alpha", 0.5, lambda t: (t**-0.5 - 1) / -0.5),
        ("alpha", 3.0, lambda t: (t**2 - 1) / 2),
        ("alpha", 1.0, lambda t: math.log(t)),
    ],
)
def test_f_divergence_links_literally(name, alpha, want):
    ratios = (-1.5, 0.0, 0.7, 2.0)
    got = f_divergence_link(tensor(*ratios), name, alpha)
    torch.testing.assert_close(got, tensor(*(want(math.exp(h)) for h in ratios)), rtol=1e-12, atol=1e-12)


def test_alpha_link_stays_finite_far_from_the_reference():
    link = f_divergence_link(torch.tensor([500.0, -500.0]), "alpha", 2.0)
    assert bool(torch.isfinite(link).all())


@pytest.mark.parametrize("mean", [-1e-9, -1e-4, -0.5, -50.0, -200.0])
def test_orpo_is_finite_and_smooth_at_the_ends(mean):
    """Token probabilities near 1 and near 0, in fp32."""
    chosen, rejected = (torch.tensor([v], requires_grad=True) for v in (mean, -1.0))
    one = torch.ones(1)
    loss = preference.orpo(Pairs(chosen, rejected, one, one, one, one, one, one), PreferenceParams()).sum()
    loss.backward()
    assert bool(torch.isfinite(loss)) and bool(
        torch.isfinite(chosen.grad).all() and torch.isfinite(rejected.grad).all()
    )


# DiscoPOP's exponential grows without bound on a far worse pair: that is its equation.
FAR = [
    (name, far)
    for name in (*LITERAL, "orpo")
    for far in (-2000.0, 2000.0)
    if (name, far) != ("discopop", -2000.0)
]


@pytest.mark.parametrize(("name", "far"), FAR)
def test_losses_have_finite_gradients_far_from_the_reference(name, far):
    """fp32, the chosen answer `far` nats from its reference."""
    reference = torch.tensor([-2500.0])
    chosen = torch.tensor([-2500.0 + far], requires_grad=True)
    rejected = torch.tensor([-500.0])
    pairs = Pairs(
        chosen,
        rejected,
        reference,
        rejected,
        chosen - reference,
        0.0 * rejected,
        torch.tensor([50.0]),
        torch.tensor([40.0]),
    )
    loss = getattr(preference, name)(pairs, PreferenceParams(label_smoothing=0.1)).sum()
    loss.backward()
    assert bool(torch.isfinite(loss)) and bool(torch.isfinite(chosen.grad).all())
