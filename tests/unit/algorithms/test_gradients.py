"""Gradient of every loss with respect to token log-probs, against central finite differences in fp64."""

import pytest
import torch

from orchestrator.algorithms.losses.interface import TokenScores
from orchestrator.algorithms.losses.preference_mix import PAIR_LOSSES
from orchestrator.algorithms.table import build
from orchestrator.core.batches import LossUnits
from orchestrator.recipe.schema import AlgorithmConfig

LENGTHS = ((3, 1), (2, 4), (1, 2), (4, 2))
UNITS = LossUnits(5, (12, 9))


def scores(seed: int = 0) -> TokenScores:
    """Four pairs; the effective batch of UNITS is larger, as for a micro-batch of it."""
    draw = torch.Generator().manual_seed(seed)
    sequence = torch.cat([torch.full((n,), k) for k, n in enumerate(n for pair in LENGTHS for n in pair)])
    logps = -3.0 * torch.rand(len(sequence), generator=draw, dtype=torch.float64) - 0.05
    reference = logps + 0.5 * torch.randn(len(sequence), generator=draw, dtype=torch.float64)
    wpo = torch.randn(len(sequence), generator=draw, dtype=torch.float64)
    return TokenScores(
        logps, sequence, 4, 2, ref_logps=reference, label=torch.tensor([1.0, 0.0, 0.0, 1.0]), wpo=wpo
    )


def central_differences(value, at: torch.Tensor, step: float = 1e-5) -> torch.Tensor:
    slopes = torch.zeros_like(at)
    for i in range(len(at)):
        for sign in (1.0, -1.0):
            moved = at.clone()
            moved[i] += sign * step
            slopes[i] += sign * value(moved) / (2.0 * step)
    return slopes


def assert_gradient(cfg: AlgorithmConfig, given: TokenScores, units: LossUnits = UNITS) -> None:
    objective = build(cfg).objective

    def total(logps: torch.Tensor) -> torch.Tensor:
        return objective(
            TokenScores(logps, given.sequence, 4, 2, given.ref_logps, given.label, given.margin, given.wpo),
            units,
        ).total

    logps = given.logps.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(logps), logps)
    want = central_differences(total, given.logps)
    assert float(want.abs().max()) > 1e-6, "a flat loss would pass by accident"
    torch.testing.assert_close(gradient, want, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("smoothing", [0.0, 0.15])
@pytest.mark.parametrize("name", [name for name in PAIR_LOSSES if name != "sft"])
def test_pair_losses(name, smoothing):
    if name == "exo_pair" and smoothing == 0.0:
        smoothing = 1e-3
    assert_gradient(AlgorithmConfig(name="dpo", loss=name, beta=0.4, label_smoothing=smoothing), scores())


@pytest.mark.parametrize(
    "options",
    [
        {"loss": {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}},
        {"f_divergence": "forward_kl"},
        {"f_divergence": "js"},
        {"f_divergence": "alpha", "f_alpha": 0.5},
        {"f_divergence": "alpha", "f_alpha": 2.0},
        {"ld_alpha": 0.3},
        {"wpo": True},
        {"loss": "ipo", "ipo_length_average": False},
    ],
)
def test_variants_of_dpo(options):
    assert_gradient(AlgorithmConfig(name="dpo", beta=0.4, **options), scores(1))


@pytest.mark.parametrize("name", ["simpo", "cpo", "orpo", "sft"])
def test_other_algorithms(name):
    assert_gradient(AlgorithmConfig(name=name, beta=0.4), scores(2))


@pytest.mark.parametrize("shift", [-1.0, 1.0])
def test_kto_holds_its_kl_term_fixed(shift):
    """shift puts the KL estimate at its clamp or above; either way branch 1 gets no gradient."""
    given = scores(3)
    mismatched = given.sequence % 2 == 1
    reference = torch.where(mismatched, given.logps - shift, given.ref_logps)
    given = TokenScores(given.logps, given.sequence, 4, 2, ref_logps=reference, label=given.label)
    objective = build(AlgorithmConfig(name="kto", beta=0.4, kto_undesirable_weight=0.6)).objective
    logps = given.logps.clone().requires_grad_()
    loss = objective(TokenScores(logps, given.sequence, 4, 2, given.ref_logps, given.label), UNITS)
    (gradient,) = torch.autograd.grad(loss.total, logps)
    assert (float(loss.means["kl"][0]) > 0) == (shift > 0)
    assert gradient[mismatched].abs().max() == 0.0

    def total(values: torch.Tensor) -> torch.Tensor:
        held = torch.where(mismatched, given.logps, values)
        return objective(TokenScores(held, given.sequence, 4, 2, given.ref_logps, given.label), UNITS).total

    torch.testing.assert_close(gradient, central_differences(total, given.logps), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("centring", [0.0, 0.1])
def test_reward_loss(centring):
    draw = torch.Generator().manual_seed(0)
    margin = torch.rand(4, generator=draw, dtype=torch.float64)
    rewards = torch.randn(8, generator=draw, dtype=torch.float64)
    objective = build(AlgorithmConfig(name="reward", reward_centring=centring)).objective
    empty, nowhere = torch.zeros(0), torch.zeros(0, dtype=torch.long)

    def total(values: torch.Tensor) -> torch.Tensor:
        return objective(
            TokenScores(empty, nowhere, 4, 2, margin=margin, rewards=values.view(4, 2)), UNITS
        ).total

    at = rewards.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(total(at), at)
    torch.testing.assert_close(gradient, central_differences(total, rewards), rtol=1e-6, atol=1e-9)


def test_wpo_weights_carry_no_gradient():
    """The gradient is the weight times that of the plain loss."""
    given = scores(4)
    single = TokenScores(given.logps[:4], given.sequence[:4], 1, 2, given.ref_logps[:4], wpo=given.wpo[:4])
    gradients = []
    for wpo in (False, True):
        logps, terms = single.logps.clone().requires_grad_(), single.wpo.clone().requires_grad_()
        moved = TokenScores(logps, single.sequence, 1, 2, single.ref_logps, wpo=terms)
        total = build(AlgorithmConfig(name="dpo", wpo=wpo)).objective(moved, LossUnits(1, (3, 1))).total
        gradient, through_weight = torch.autograd.grad(total, (logps, terms), allow_unused=True)
        assert through_weight is None
        gradients.append(gradient)
    weight = torch.exp(single.wpo[:3].mean()) * torch.exp(single.wpo[3])
    torch.testing.assert_close(gradients[1], weight * gradients[0])
