"""The policy-gradient family against TRL 1.16's own GRPOTrainer and RLOOTrainer: losses, gradients, metrics,
advantages."""

from dataclasses import replace

import pytest
import torch

from orchestrator.algorithms.losses import advantages
from orchestrator.algorithms.losses.interface import LossSum
from orchestrator.algorithms.losses.kl import k1, k2, k3
from orchestrator.algorithms.losses.policy import PolicyGradient, correction_weights
from orchestrator.algorithms.table import build, kl_notes
from orchestrator.recipe.schema import AlgorithmConfig
from orchestrator.recipe.schema import Rollouts as Rollouts_
from tests.parity.policy_oracle import (
    Rollouts,
    grpo,
    grpo_advantages,
    importance_sampling_ratio,
    random_rollouts,
    rloo,
    rloo_advantages,
)

LENGTHS = (5, 1, 9, 3, 12, 2, 7, 4)


def mean(loss: LossSum, name: str) -> float:
    total, count = loss.means[name]
    return float(total) / count


def assert_same(rollouts: Rollouts, got: torch.Tensor, want: torch.Tensor, rtol: float = 1e-9) -> None:
    """Values and gradients through log-probs and entropies."""
    assert got.item() == pytest.approx(want.item(), rel=rtol)
    at = (rollouts.logps, rollouts.entropy)
    ours, theirs = (torch.autograd.grad(loss, at, allow_unused=True) for loss in (got, want))
    assert float(theirs[0].abs().max()) > 1e-4, "a flat loss would pass by accident"
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


def assert_clip_fractions(loss: LossSum, logged: dict[str, float]) -> None:
    for ours, theirs in (("", "region_mean"), ("_low", "low_mean"), ("_high", "high_mean")):
        want = logged[f"clip_ratio/{theirs}"]
        assert 0.0 < want < 1.0
        assert mean(loss, f"policy/clip_fraction{ours}") == pytest.approx(want, rel=1e-6)


#         what of GRPOConfig() is changed      ours
FORMS = {
    "grpo": ({"loss_type": "grpo"}, PolicyGradient(normaliser="sequence")),
    "dr_grpo": (
        {"loss_type": "dr_grpo", "max_completion_length": 16},
        PolicyGradient(normaliser="constant", constant=16.0),
    ),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, PolicyGradient(normaliser="token", clip_high=0.28)),
    # TRL's bnpo averages over the tokens of a micro-batch: our token normaliser where one micro-batch is the
    # effective batch.
    "bnpo": (
        {"loss_type": "bnpo", "epsilon": 0.1},
        PolicyGradient(normaliser="token", clip_low=0.1, clip_high=0.1),
    ),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.25},
        PolicyGradient("cispo", normaliser="token", clip_high=1.25),
    ),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 0.03, "epsilon_high": 0.04},
        PolicyGradient("clip", "sequence", "sequence", 1.0, 0.03, 0.04),
    ),
    "delta": ({"loss_type": "grpo", "delta": 1.4}, PolicyGradient(normaliser="sequence", dual=1.4)),
}


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_loss_and_gradient_equal_trl(name, tools):
    options, objective = FORMS[name]
    rollouts = random_rollouts(*LENGTHS, drift=0.4, tools=tools).tracked()
    want, logged = grpo(rollouts, **options)
    got = objective(rollouts.scores(), rollouts.units)
    assert_same(rollouts, got.total, want)
    assert mean(got, "policy/entropy") == pytest.approx(logged["entropy"], rel=1e-6)
    if name == "cispo":
        assert logged["cispo_clip_ratio"] > 0
        assert mean(got, "policy/clip_fraction") == pytest.approx(logged["cispo_clip_ratio"], rel=1e-6)
    elif name != "gspo":  # there TRL counts sequences and we their tokens
        assert_clip_fractions(got, logged)


def test_delta_changes_the_loss():
    rollouts = random_rollouts(*LENGTHS, drift=0.4)
    assert (
        float((grpo(rollouts, loss_type="grpo", delta=1.4)[0] - grpo(rollouts, loss_type="grpo")[0]).abs())
        > 1e-3
    )


FAMILY = ["grpo", "dr_grpo", "dapo", "cispo", "gspo"]


@pytest.mark.parametrize("corrected", [None, False], ids=["default", "off"])
@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("name", FAMILY)
def test_kl_term_equals_trl(name, on_policy, corrected):
    """beta times k3, normalised like the policy's loss: times the ratio with its gradient, which is TRL's
    default, and without it."""
    options, objective = FORMS[name]
    flag = {} if corrected is None else {"use_bias_correction_kl": corrected}
    rollouts = random_rollouts(*LENGTHS, drift=0.4, seed=1).tracked()
    want, logged = grpo(
        rollouts, beta=0.3, correction=("token_truncate", 1.2), on_policy=on_policy, **options, **flag
    )
    ours = replace(objective, kl_coefficient=0.3, correction="token", cap=1.2, kl_ratio=corrected is None)
    scores = rollouts.scores()
    scores = replace(scores, experience=replace(scores.experience, old_logps=None)) if on_policy else scores
    if on_policy:  # the correction of TRL's oracle looks at the old log-probs, ours at the policy's own
        want, logged = grpo(rollouts, beta=0.3, on_policy=True, **options, **flag)
        ours = replace(ours, correction="none")
    got = ours(scores, rollouts.units)
    assert_same(rollouts, got.total, want, rtol=1e-12)
    if not corrected:  # TRL logs the term as it is in the loss, we the divergence
        assert corrected is None or mean(got, "kl") == pytest.approx(logged["kl"], rel=1e-6)
    steered = replace(ours, kl_coefficient=7.0)(scores, replace(rollouts.units, kl_coefficient=0.3))
    assert steered.total.item() == got.total.item()


@pytest.mark.parametrize("name", FAMILY)
def test_the_two_kl_terms_differ_in_their_gradient_alone_on_policy(name):
    """A comparison of losses cannot show it: on policy the ratio is 1."""
    options, _ = FORMS[name]
    rollouts = random_rollouts(*LENGTHS, drift=0.0, seed=1).tracked()
    losses = [
        grpo(rollouts, beta=0.3, on_policy=True, **options, **flag)[0]
        for flag in ({}, {"use_bias_correction_kl": False})
    ]
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-12)
    one, other = (torch.autograd.grad(loss, rollouts.logps)[0] for loss in losses)
    assert float((one - other).norm() / one.norm()) > 0.03


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "cispo"])
def test_a_recipe_of_the_family_has_trls_kl_term(name):
    """By default: algorithm.kl.ratio is left alone, and TRL's configuration is what coming-from.md maps it
    to."""
    mapped = {
        "grpo": {"loss_type": "grpo"},
        "dr_grpo": {"loss_type": "dr_grpo", "max_completion_length": 16},
        "dapo": {"loss_type": "dapo", "epsilon_high": 0.28},
        "gspo": {
            "loss_type": "grpo",
            "importance_sampling_level": "sequence",
            "epsilon": 3e-4,
            "epsilon_high": 4e-4,
        },
        "cispo": {"loss_type": "cispo", "epsilon_high": 5.0},
    }
    rollouts = random_rollouts(*LENGTHS, drift=0.4, seed=1).tracked()
    want, _ = grpo(rollouts, beta=0.3, **mapped[name])
    cfg = AlgorithmConfig.model_validate(
        {"name": name, "kl": {"coefficient": 0.3}, "correction": {"kind": "none"}}
    )
    objective = build(cfg, Rollouts_.model_validate({"max_new_tokens": 16})).objective
    assert_same(rollouts, objective(rollouts.scores(), rollouts.units).total, want, rtol=1e-12)


def test_k1_in_the_loss_has_the_divergences_gradient_with_the_ratio_and_none_without():
    """In expectation over the policy's own tokens, computed exactly over a vocabulary of five."""
    z = torch.tensor([0.3, -1.0, 0.7, 0.1, -0.4], dtype=torch.float64, requires_grad=True)
    ref = torch.log_softmax(torch.tensor([1.0, 0.0, -0.5, 0.2, 0.4], dtype=torch.float64), 0)
    logps = torch.log_softmax(z, 0)
    p, old = logps.exp().detach(), logps.detach()
    (exact,) = torch.autograd.grad((logps.exp() * (logps - ref)).sum(), z, retain_graph=True)
    for estimator, ratio, right in (
        (k1, True, True),
        (k3, True, True),
        (k2, False, True),
        (k1, False, False),
        (k3, False, False),
    ):
        term = estimator(logps, ref) * ((logps - old).exp() if ratio else 1.0)
        (gradient,) = torch.autograd.grad((p * term).sum(), z, retain_graph=True)
        assert torch.allclose(gradient, exact, rtol=1e-12, atol=1e-14) is right, (estimator.__name__, ratio)
        if estimator is k1 and not ratio:
            assert float(gradient.abs().max()) < 1e-15
    noted = {"name": "ppo", "kl": {"coefficient": 0.3, "estimator": "k1"}}
    assert "no gradient in expectation" in kl_notes(build(AlgorithmConfig.model_validate(noted)))[0]
    for calm in (
        {"name": "grpo"},
        {"name": "ppo"},
        {"name": "grpo", "kl": noted["kl"]},
        {"name": "ppo", "kl": {**noted["kl"], "place": "reward"}},
    ):
        assert not kl_notes(build(AlgorithmConfig.model_validate(calm)))


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "cispo", "gspo"])
def test_entropy_bonus_equals_trl(name):
    """A mean over tokens, whatever the normaliser of the policy's loss."""
    options, objective = FORMS[name]
    rollouts = random_rollouts(*LENGTHS, drift=0.4, tools=True, seed=2).tracked()
    want, _ = grpo(rollouts, entropy_coef=0.2, **options)
    assert_same(
        rollouts, replace(objective, entropy_bonus=0.2)(rollouts.scores(), rollouts.units).total, want
    )


#            TRL's mode        ours         cap
CORRECTIONS = [
    ("token_truncate", "token", 1.2),
    ("sequence_mask", "sequence", 1.5),
    ("token_mask", "decoupled", 1.2),
]


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "cispo", "gspo"])
@pytest.mark.parametrize(("mode", "kind", "cap"), CORRECTIONS)
def test_importance_sampling_correction_equals_trl(mode, kind, cap, name):
    options, objective = FORMS[name]
    rollouts = random_rollouts(*LENGTHS, drift=0.4, gap=0.4, tools=True, seed=3).tracked()
    ratio = importance_sampling_ratio(rollouts, mode, cap).expand_as(rollouts.mask)[rollouts.mask]
    held = ratio == (cap if kind == "token" else 0.0)
    assert 0 < int(held.sum()) < len(held), "the cap must be felt, but not everywhere"
    scores = rollouts.scores()
    torch.testing.assert_close(
        correction_weights(scores, rollouts.old[rollouts.mask], rollouts.sampled[rollouts.mask], kind, cap),
        ratio,
    )
    want, _ = grpo(rollouts, correction=(mode, cap), **options)
    got = replace(objective, correction=kind, cap=cap)(scores, rollouts.units)
    assert_same(rollouts, got.total, want)
    assert mean(got, "policy/correction_weight") == pytest.approx(ratio.mean().item(), rel=1e-9)


@pytest.mark.parametrize("name", FORMS)
def test_without_old_logprobs_the_policy_is_its_own_old_one(name):
    options, objective = FORMS[name]
    rollouts = random_rollouts(*LENGTHS, drift=0.4).tracked()
    want, _ = grpo(rollouts, on_policy=True, **options)
    scores = rollouts.scores()
    got = objective(replace(scores, experience=replace(scores.experience, old_logps=None)), rollouts.units)
    assert_same(rollouts, got.total, want)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "cispo"])
def test_a_masked_completion_counts_as_a_sequence_but_loses_nothing(name):
    """mask_truncated_completions: TRL keeps the row with an empty mask."""
    options, objective = FORMS[name]
    rollouts = random_rollouts(5, 0, 9, 3, 0, 2, drift=0.4).tracked()
    want, _ = grpo(rollouts, **options)
    assert_same(rollouts, objective(rollouts.scores(), rollouts.units).total, want)


def test_rloo_equals_trl():
    """Ratios of whole completions, clipped; the mean over sequences of a loss that is equal on all tokens of
    one."""
    rollouts = random_rollouts(*LENGTHS, drift=0.25).tracked()
    want, logged = rloo(rollouts, epsilon_high=0.25)
    got = PolicyGradient("clip", "trajectory", "sequence", clip_low=0.2, clip_high=0.25)(
        rollouts.scores(), rollouts.units
    )
    assert logged["clip_ratio/low_mean"] > 0 and 0 < logged["clip_ratio/high_mean"] < 1
    assert_same(rollouts, got.total, want)


def test_rloo_on_policy_has_the_gradient_of_plain_reinforce():
    """Before the first update the clipped form and -A log pi of the completion agree, as the paper says."""
    rollouts = random_rollouts(*LENGTHS, drift=0.0).tracked()
    want, _ = rloo(rollouts)
    got = PolicyGradient("reinforce", normaliser="constant", constant=1.0)(
        rollouts.scores(), rollouts.units
    ).total
    ours, theirs = (torch.autograd.grad(loss, rollouts.logps)[0] for loss in (got, want))
    assert float(theirs.abs().max()) > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


REWARDS = torch.tensor(
    [[1.0, 0.0, 0.25, 1.0], [0.5, 0.5, 0.5, 0.5], [-3.0, 2.0, 0.1, 0.0]], dtype=torch.float64
)


@pytest.mark.parametrize(("scale", "scaled"), [("group", True), ("none", False)])
def test_group_advantages_equal_trl(scale, scaled):
    """Up to TRL's fp32 n/(n - 1)."""
    torch.testing.assert_close(
        advantages.group_normalised(REWARDS, scaled), grpo_advantages(REWARDS, scale), rtol=1e-7, atol=1e-9
    )


def test_leave_one_out_equals_trl():
    torch.testing.assert_close(
        advantages.leave_one_out(REWARDS), rloo_advantages(REWARDS), rtol=1e-12, atol=1e-12
    )
