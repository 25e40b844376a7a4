"""The policy-gradient family against TRL 1.16's own GRPOTrainer and RLOOTrainer: losses, gradients, metrics, advantages."""

from dataclasses import replace

import pytest
import torch

from orchestrator.objectives import advantages
from orchestrator.objectives.policy import PolicyGradient, correction_weights
from orchestrator.objectives.scores import LossSum
from tests.parity.policy_oracle import Rollouts, grpo, grpo_advantages, importance_sampling_ratio, random_rollouts, rloo, rloo_advantages

LENGTHS = (5, 1, 9, 3, 12, 2, 7, 4)


def mean(loss: LossSum, name: str) -> float:
    total, count = loss.means[name]
    return float(total) / count


def assert_same(rollouts: Rollouts, got: torch.Tensor, want: torch.Tensor) -> None:
    """Values and gradients through log-probs and entropies."""
    assert got.item() == pytest.approx(want.item(), rel=1e-9)
    at = (rollouts.logps, rollouts.entropy)
    ours, theirs = (torch.autograd.grad(loss, at, allow_unused=True) for loss in (got, want))
    assert float(theirs[0].abs().max()) > 1e-4, "a flat loss would pass by accident"
    for a, b in zip(ours, theirs, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def assert_clip_fractions(loss: LossSum, logged: dict[str, float]) -> None:
    for ours, theirs in (("", "region_mean"), ("_low", "low_mean"), ("_high", "high_mean")):
        want = logged[f"clip_ratio/{theirs}"]
        assert 0.0 < want < 1.0
        assert mean(loss, f"policy/clip_fraction{ours}") == pytest.approx(want, rel=1e-6)


#         TRL's loss_type with its options      ours
FORMS = {
    "grpo": ("grpo", {}, PolicyGradient(normaliser="sequence")),
    "dr_grpo": ("dr_grpo", {"max_completion_length": 16}, PolicyGradient(normaliser="constant", constant=16.0)),
    "dapo": ("dapo", {"high": 0.28}, PolicyGradient(normaliser="token", clip_high=0.28)),
    # TRL's bnpo averages over the tokens of a micro-batch: our token normaliser where one micro-batch is the effective batch.
    "bnpo": ("bnpo", {"low": 0.1}, PolicyGradient(normaliser="token", clip_low=0.1)),
    "cispo": ("cispo", {"high": 1.25}, PolicyGradient("cispo", normaliser="token", clip_high=1.25)),
    "gspo": ("grpo", {"level": "sequence", "low": 0.03, "high": 0.04}, PolicyGradient("clip", "sequence", "sequence", 1.0, 0.03, 0.04)),
    "delta": ("grpo", {"delta": 1.4}, PolicyGradient(normaliser="sequence", dual=1.4)),
}


@pytest.mark.parametrize("tools", [False, True])
@pytest.mark.parametrize("name", FORMS)
def test_loss_and_gradient_equal_trl(name, tools):
    loss_type, options, objective = FORMS[name]
    rollouts = random_rollouts(*LENGTHS, drift=0.4, tools=tools).tracked()
    want, logged = grpo(rollouts, loss_type, **options)
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
    assert float((grpo(rollouts, "grpo", delta=1.4)[0] - grpo(rollouts, "grpo")[0]).abs()) > 1e-3


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "cispo", "gspo"])
def test_kl_term_equals_trl(name):
    """beta times k3, uncorrected and normalised like the policy's loss."""
    loss_type, options, objective = FORMS[name]
    rollouts = random_rollouts(*LENGTHS, drift=0.4, seed=1).tracked()
    want, logged = grpo(rollouts, loss_type, beta=0.3, correction=("token_truncate", 1.2), **options)
    corrected = replace(objective, kl_coefficient=0.3, correction="token", cap=1.2)
    got = corrected(rollouts.scores(), rollouts.units)
    assert_same(rollouts, got.total, want)
    assert mean(got, "kl") == pytest.approx(logged["kl"], rel=1e-6)
    steered = replace(corrected, kl_coefficient=7.0)(rollouts.scores(), replace(rollouts.units, kl_coefficient=0.3))
    assert steered.total.item() == got.total.item()


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "cispo", "gspo"])
def test_entropy_bonus_equals_trl(name):
    """A mean over tokens, whatever divides the policy's loss."""
    loss_type, options, objective = FORMS[name]
    rollouts = random_rollouts(*LENGTHS, drift=0.4, tools=True, seed=2).tracked()
    want, _ = grpo(rollouts, loss_type, entropy_coef=0.2, **options)
    assert_same(rollouts, replace(objective, entropy_bonus=0.2)(rollouts.scores(), rollouts.units).total, want)


#            TRL's mode        ours         cap
CORRECTIONS = [("token_truncate", "token", 1.2), ("sequence_mask", "sequence", 1.5), ("token_mask", "decoupled", 1.2)]


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "cispo", "gspo"])
@pytest.mark.parametrize(("mode", "kind", "cap"), CORRECTIONS)
def test_importance_sampling_correction_equals_trl(mode, kind, cap, name):
    loss_type, options, objective = FORMS[name]
    rollouts = random_rollouts(*LENGTHS, drift=0.4, gap=0.4, tools=True, seed=3).tracked()
    ratio = importance_sampling_ratio(rollouts, mode, cap).expand_as(rollouts.mask)[rollouts.mask]
    held = ratio == (cap if kind == "token" else 0.0)
    assert 0 < int(held.sum()) < len(held), "the cap must be felt, but not everywhere"
    scores = rollouts.scores()
    torch.testing.assert_close(correction_weights(scores, rollouts.old[rollouts.mask], rollouts.sampled[rollouts.mask], kind, cap), ratio)
    want, _ = grpo(rollouts, loss_type, correction=(mode, cap), **options)
    got = replace(objective, correction=kind, cap=cap)(scores, rollouts.units)
    assert_same(rollouts, got.total, want)
    assert mean(got, "policy/correction_weight") == pytest.approx(ratio.mean().item(), rel=1e-9)


@pytest.mark.parametrize("name", FORMS)
def test_without_old_logprobs_the_policy_is_its_own_old_one(name):
    loss_type, options, objective = FORMS[name]
    rollouts = random_rollouts(*LENGTHS, drift=0.4).tracked()
    want, _ = grpo(rollouts, loss_type, on_policy=True, **options)
    scores = rollouts.scores()
    got = objective(replace(scores, experience=replace(scores.experience, old_logps=None)), rollouts.units)
    assert_same(rollouts, got.total, want)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "cispo"])
def test_a_masked_completion_counts_as_a_sequence_but_loses_nothing(name):
    """mask_truncated_completions: TRL keeps the row with an empty mask."""
    loss_type, options, objective = FORMS[name]
    rollouts = random_rollouts(5, 0, 9, 3, 0, 2, drift=0.4).tracked()
    want, _ = grpo(rollouts, loss_type, **options)
    assert_same(rollouts, objective(rollouts.scores(), rollouts.units).total, want)


def test_rloo_equals_trl():
    """Ratios of whole completions, clipped; the mean over sequences of a loss that is equal on all tokens of one."""
    rollouts = random_rollouts(*LENGTHS, drift=0.25).tracked()
    want, logged = rloo(rollouts, low=0.2, high=0.25)
    got = PolicyGradient("clip", "trajectory", "sequence", clip_low=0.2, clip_high=0.25)(rollouts.scores(), rollouts.units)
    assert logged["clip_ratio/low_mean"] > 0 and 0 < logged["clip_ratio/high_mean"] < 1
    assert_same(rollouts, got.total, want)


def test_rloo_on_policy_has_the_gradient_of_plain_reinforce():
    """Before the first update the clipped form and -A log pi of the completion agree, as the paper says."""
    rollouts = random_rollouts(*LENGTHS, drift=0.0).tracked()
    want, _ = rloo(rollouts, low=0.2, high=0.2)
    got = PolicyGradient("reinforce", normaliser="constant", constant=1.0)(rollouts.scores(), rollouts.units).total
    ours, theirs = (torch.autograd.grad(loss, rollouts.logps)[0] for loss in (got, want))
    assert float(theirs.abs().max()) > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


REWARDS = torch.tensor([[1.0, 0.0, 0.25, 1.0], [0.5, 0.5, 0.5, 0.5], [-3.0, 2.0, 0.1, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(("scale", "scaled"), [("group", True), ("none", False)])
def test_group_advantages_equal_trl(scale, scaled):
    """Up to TRL's fp32 n/(n - 1)."""
    torch.testing.assert_close(advantages.group_normalised(REWARDS, scaled), grpo_advantages(REWARDS, scale), rtol=1e-7, atol=1e-9)


def test_leave_one_out_equals_trl():
    torch.testing.assert_close(advantages.leave_one_out(REWARDS), rloo_advantages(REWARDS), rtol=1e-12, atol=1e-12)
