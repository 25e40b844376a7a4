"""Policy losses: literal numbers, finite differences, any cut of the effective batch, edge cases."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.algorithms.losses.interface import ExperienceTensors, LossSum, TokenScores
from orchestrator.algorithms.losses.policy import (
    PolicyGradient,
    clipped,
    clipped_weight,
    correction_weights,
    log_ratio,
    reinforce,
    shares,
)
from orchestrator.core.batches import LossUnits
from orchestrator.core.errors import OrchestratorError


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def same(got: Tensor, want: Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def mean(loss: LossSum, name: str) -> float:
    total, count = loss.means[name]
    return float(total) / count


# Sequences of 2, 0 and 1 tokens with ratios (2, 1/2) and 1; drawn at (1/2, 4) and 1 times the old
# probability.
LN2 = math.log(2.0)
THREE = TokenScores(
    tensor(-1.0, -2.0, -3.0),
    torch.tensor([0, 0, 2]),
    3,
    1,
    entropy=tensor(1.0, 2.0, 4.0),
    experience=ExperienceTensors(
        advantages=tensor(1.0, 1.0, -2.0),
        sampled_logps=tensor(-1.0 - 2 * LN2, -2.0 + 3 * LN2, -3.0),
        old_logps=tensor(-1.0 - LN2, -2.0 + LN2, -3.0),
        ref_logps=tensor(-1.0, -2.0 - LN2, -3.0 + LN2),
    ),
)
UNITS = LossUnits(4, (10,))


def test_log_ratio_literally():
    old = THREE.experience.old_logps
    same(log_ratio(THREE, old, "token"), tensor(LN2, -LN2, 0.0))
    same(log_ratio(THREE, old - tensor(0.0, 1.0, 0.5), "sequence"), tensor(0.5, 0.5, 0.5))
    same(log_ratio(THREE, old - tensor(0.0, 1.0, 0.5), "trajectory"), tensor(1.0, 1.0, 0.5))


def test_clipped_literally():
    ratio = tensor(0.5, 0.5, 1.0, 1.5, 1.5, 4.0, 4.0)
    signs = tensor(1.0, -1.0, 1.0, 1.0, -1.0, 1.0, -1.0)
    same(clipped(ratio, 2.0 * signs, 0.2, 0.3, None), tensor(-1.0, 1.6, -2.0, -2.6, 3.0, -2.6, 8.0))
    same(clipped(ratio, 2.0 * signs, 0.2, 0.3, 3.0), tensor(-1.0, 1.6, -2.0, -2.6, 3.0, -2.6, 6.0))


def test_clipped_weight_and_reinforce_literally():
    ratio, advantages = tensor(0.5, 4.0, 4.0), tensor(1.0, 1.0, -1.0)
    logps = tensor(-1.0, -2.0, -3.0).requires_grad_()
    loss = clipped_weight(ratio, advantages, logps, 3.0)
    same(loss, tensor(0.5, 6.0, -9.0))
    (slope,) = torch.autograd.grad(loss.sum(), logps)
    same(slope, tensor(-0.5, -3.0, 3.0))  # no gradient through the weight, and none dropped
    same(reinforce(advantages, logps), tensor(1.0, 2.0, -3.0))


def test_correction_weights_literally():
    """w = 2, 1/4 | 1; products 1/2 | 1."""
    experience = THREE.experience

    def weights(kind, cap: float) -> Tensor:
        return correction_weights(THREE, experience.old_logps, experience.sampled_logps, kind, cap)

    same(weights("none", 1.5), tensor(1.0, 1.0, 1.0))
    same(weights("token", 1.5), tensor(1.5, 0.25, 1.0))
    same(weights("decoupled", 1.5), tensor(0.0, 0.25, 1.0))
    same(weights("decoupled", 2.5), tensor(2.0, 0.25, 1.0))
    same(weights("sequence", 1.5), tensor(0.5, 0.5, 1.0))
    same(weights("sequence", 0.75), tensor(0.5, 0.5, 0.0))


@pytest.mark.parametrize("sampled", [-math.inf, math.nan])
def test_a_sequence_without_a_finite_weight_is_left_out(sampled):
    experience = THREE.experience
    broken = experience.sampled_logps.clone()
    broken[0] = sampled
    same(correction_weights(THREE, experience.old_logps, broken, "sequence", 2.0), tensor(0.0, 0.0, 1.0))


def test_shares_literally():
    """10 tokens and 4 sequences in the effective batch, of which this is a part."""
    same(shares(THREE, UNITS, "token", 1.0), tensor(0.1, 0.1, 0.1))
    same(shares(THREE, UNITS, "sequence", 1.0), tensor(1 / 8, 1 / 8, 1 / 4))
    same(shares(THREE, UNITS, "constant", 5.0), tensor(1 / 20, 1 / 20, 1 / 20))


# Token losses at clip 0.2: -min(2, 1.2), -min(0.5, 0.8), 2; GSPO's ratio is 1.
LITERAL = {
    "token": (PolicyGradient(), (-1.2 - 0.5 + 2.0) / 10),
    "sequence": (PolicyGradient(normaliser="sequence"), (-1.7 / 2 + 2.0) / 4),
    "constant": (PolicyGradient(normaliser="constant", constant=5.0), 0.3 / 20),
    "gspo": (PolicyGradient(level="sequence", normaliser="sequence"), (-1.0 + 2.0) / 4),
    "cispo": (PolicyGradient("cispo", clip_high=1.5), (1.5 * 1.0 + 0.5 * 2.0 - 2.0 * 3.0) / 10),
    "reinforce": (PolicyGradient("reinforce"), (1.0 + 2.0 - 6.0) / 10),
    "correction": (PolicyGradient(correction="token", cap=1.5), (-1.2 * 1.5 - 0.5 * 0.25 + 2.0) / 10),
    "k1": (PolicyGradient(kl_coefficient=2.0, kl_estimator="k1"), (0.3 + 2.0 * (0.0 + LN2 - LN2)) / 10),
    "k2": (PolicyGradient(kl_coefficient=2.0, kl_estimator="k2"), (0.3 + 2.0 * LN2**2) / 10),
    "k3": (PolicyGradient(kl_coefficient=2.0), (0.3 + 2.0 * ((LN2 - 0.5) + (1.0 - LN2))) / 10),
    "entropy": (
        PolicyGradient(normaliser="sequence", entropy_bonus=0.5),
        (-1.7 / 2 + 2.0) / 4 - 0.5 * 7.0 / 10,
    ),
}


@pytest.mark.parametrize("name", LITERAL)
def test_the_loss_literally(name):
    objective, want = LITERAL[name]
    assert objective(THREE, UNITS).total.item() == pytest.approx(want, rel=1e-12)


def test_metrics_literally():
    loss = PolicyGradient(correction="token", cap=1.5, clip_high=0.5)(THREE, UNITS)
    want = {
        "kl": 0.5 / 3,  # (LN2 - 1/2) + (1 - LN2)
        "policy/entropy": 7 / 3,
        "policy/clip_fraction": 1 / 3,  # ratio 2 upwards; 1/2 at a positive advantage is not held
        "policy/clip_fraction_low": 0.0,
        "policy/clip_fraction_high": 1 / 3,
        "policy/approx_kl": ((2 - 1 - LN2) + (0.5 - 1 + LN2)) / 3,
        "policy/train_rollout_gap": 3 * LN2 / 3,
        "policy/correction_weight": 2.75 / 3,
    }
    assert {name: mean(loss, name) for name in loss.means} == pytest.approx(want)
    assert {name: float(value) for name, value in loss.maxima.items()} == pytest.approx(
        {"policy/ratio_max": 2.0, "policy/train_rollout_gap_max": 2 * LN2}
    )
    assert not any(total.requires_grad for total, _ in loss.means.values())


def test_approx_kl_is_of_the_old_policy_which_drew_the_tokens():
    """One token at twice its old probability: (r - 1) - log r at r = new/old = 2, not at 1/2."""
    experience = ExperienceTensors(advantages=tensor(1.0), sampled_logps=tensor(-2.0), old_logps=tensor(-2.0))
    scores = TokenScores(tensor(-2.0 + LN2), torch.tensor([0]), 1, 1, experience=experience)
    assert mean(PolicyGradient()(scores, LossUnits(1, (1,))), "policy/approx_kl") == pytest.approx(1.0 - LN2)


def test_the_units_coefficient_overrides_the_recipes():
    objective = PolicyGradient(kl_coefficient=2.0)
    off = objective(THREE, replace(UNITS, kl_coefficient=0.0))
    assert off.total.item() == pytest.approx(0.03)
    steered = objective(THREE, replace(UNITS, kl_coefficient=0.5))
    assert steered.total.item() == pytest.approx((0.3 + 0.5 * 0.5) / 10)


def random_scores(lengths: list[int], branches: int, seed: int) -> TokenScores:
    draw = torch.Generator().manual_seed(seed)
    sequence = torch.cat([torch.full((size,), k) for k, size in enumerate(lengths)])

    def noise() -> Tensor:
        return torch.randn(len(sequence), generator=draw, dtype=torch.float64)

    logps = -0.05 - 2.0 * torch.rand(len(sequence), generator=draw, dtype=torch.float64)
    old = logps + 0.3 * noise()
    experience = ExperienceTensors(
        advantages=noise(), sampled_logps=old + 0.3 * noise(), old_logps=old, ref_logps=logps + 0.3 * noise()
    )
    return TokenScores(
        logps, sequence, len(lengths) // branches, branches, entropy=noise().abs(), experience=experience
    )


ALL = {
    "ppo": PolicyGradient(),
    "grpo": PolicyGradient(normaliser="sequence", kl_coefficient=0.1, correction="token", cap=1.2),
    "dr_grpo": PolicyGradient(normaliser="constant", constant=7.0, correction="sequence", cap=1.2),
    "dapo": PolicyGradient(clip_high=0.28, entropy_bonus=0.1, correction="decoupled", cap=1.2),
    "gspo": PolicyGradient(level="sequence", normaliser="sequence", clip_low=0.05, clip_high=0.06),
    "cispo": PolicyGradient("cispo", clip_high=1.2, kl_coefficient=0.2, kl_estimator="k2"),
    "cispo of a sequence": PolicyGradient(
        "cispo", "sequence", clip_high=1.1, kl_coefficient=0.2, kl_estimator="k1"
    ),
    "rloo": PolicyGradient(level="trajectory", normaliser="sequence"),
    "reinforce": PolicyGradient("reinforce", normaliser="constant"),
    "dual": PolicyGradient(dual=1.3, normaliser="sequence"),
}


def moved(given: TokenScores, logps: Tensor, entropy: Tensor) -> TokenScores:
    return replace(given, logps=logps, entropy=entropy)


def held(objective: PolicyGradient, given: TokenScores) -> tuple[PolicyGradient, TokenScores]:
    """An objective whose plain derivative is the gradient wanted: old log-probs are numbers, and so is
    CISPO's weight, which makes it REINFORCE with weighted advantages."""
    experience = given.experience
    old = given.logps if experience.old_logps is None else experience.old_logps
    fixed = replace(experience, old_logps=old)
    if objective.form == "cispo":
        weight = log_ratio(given, old, objective.level).exp().clamp(max=objective.clip_high)
        objective, fixed = (
            replace(objective, form="reinforce"),
            replace(fixed, advantages=experience.advantages * weight),
        )
    return objective, replace(given, experience=fixed)


@pytest.mark.parametrize("on_policy", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_gradient_against_finite_differences(name, on_policy):
    objective, given, units = ALL[name], random_scores([3, 1, 4, 2, 5, 0], 2, seed=3), LossUnits(5, (12, 9))
    if on_policy:
        given = replace(given, experience=replace(given.experience, old_logps=None))
    logps, entropy = given.logps.clone().requires_grad_(), given.entropy.clone().requires_grad_()
    total = objective(replace(given, logps=logps, entropy=entropy), units).total
    got, through_entropy = torch.autograd.grad(total, (logps, entropy), allow_unused=True)
    plain, fixed = held(objective, given)
    want = torch.zeros_like(given.logps)
    for i in range(len(want)):
        for sign in (1.0, -1.0):
            at = given.logps.clone()
            at[i] += sign * 1e-6
            want[i] += sign * plain(replace(fixed, logps=at), units).total / 2e-6
    assert float(want.abs().max()) > 1e-3, "a flat loss would pass by accident"
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)
    if objective.entropy_bonus:
        same(through_entropy, torch.full_like(entropy, -objective.entropy_bonus / units.tokens))
    else:
        assert through_entropy is None


def part(whole: TokenScores, examples: list[int], logps: Tensor) -> TokenScores:
    """The micro-batch of these examples, in this order."""
    places = [(place, example, k) for place, example in enumerate(examples) for k in range(whole.branches)]
    at = [(whole.sequence == example * whole.branches + k).nonzero()[:, 0] for _, example, k in places]
    index = torch.cat([torch.zeros(0, dtype=torch.long), *at])
    sequence = [
        torch.full((len(i),), place * whole.branches + k) for i, (place, _, k) in zip(at, places, strict=True)
    ]
    experience = whole.experience
    assert (
        experience is not None
        and experience.old_logps is not None
        and experience.ref_logps is not None
        and whole.entropy is not None
    )
    cut = ExperienceTensors(
        advantages=experience.advantages[index],
        sampled_logps=experience.sampled_logps[index],
        old_logps=experience.old_logps[index],
        ref_logps=experience.ref_logps[index],
    )
    scored = torch.cat([torch.zeros(0, dtype=torch.long), *sequence])
    return TokenScores(
        logps[index], scored, len(examples), whole.branches, entropy=whole.entropy[index], experience=cut
    )


@st.composite
def cut_batches(draw):
    """A whole batch with its counts, and a partition of its examples into micro-batches (empty ones too) in
    any order."""
    n, branches = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    lengths = draw(st.lists(st.integers(0, 4), min_size=n * branches, max_size=n * branches))
    order = draw(st.permutations(range(n)))
    stops = sorted([0, n, *draw(st.lists(st.integers(0, n), max_size=3))])
    units = LossUnits(n, tuple(sum(lengths[k::branches]) for k in range(branches)))
    return (
        random_scores(lengths, branches, draw(st.integers(0, 2**20))),
        units,
        [list(order[a:b]) for a, b in pairwise(stops)],
    )


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=25)
@given(cut=cut_batches())
def test_sum_over_any_partition_is_the_whole(name, cut):
    whole, units, micro_batches = cut
    objective = ALL[name]
    logps = [whole.logps.clone().requires_grad_() for _ in range(2)]
    full = objective(part(whole, list(range(whole.examples)), logps[0]), units)
    parts = [objective(part(whole, examples, logps[1]), units) for examples in micro_batches]
    assert sum(p.total.item() for p in parts) == pytest.approx(full.total.item(), rel=1e-11, abs=1e-12)
    for name_, (total, count) in full.means.items():
        assert float(sum(p.means[name_][0] for p in parts)) == pytest.approx(
            float(total), rel=1e-10, abs=1e-10
        ), name_
        assert sum(p.means[name_][1] for p in parts) == count, name_
    for name_, value in full.maxima.items():
        assert max(float(p.maxima[name_]) for p in parts) == pytest.approx(float(value), rel=1e-11), name_
    full.total.backward()
    for p in parts:
        p.total.backward()
    torch.testing.assert_close(logps[1].grad, logps[0].grad, rtol=1e-11, atol=1e-13)


def test_nothing_scored_is_a_loss_of_zero():
    """A micro-batch, or a whole effective batch, of masked completions."""
    nothing = part(random_scores([0, 0], 1, seed=0), [0, 1], torch.zeros(0, dtype=torch.float64))
    for objective in ALL.values():
        loss = objective(nothing, LossUnits(2, (0,)))
        assert loss.total.item() == 0.0
        assert {float(value) for value in loss.maxima.values()} == {0.0}


@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_a_ratio_beyond_fp32_has_a_finite_gradient(advantage):
    """exp(100) overflows fp32: clipped away for a positive advantage, where 0 * inf would be NaN."""
    experience = ExperienceTensors(
        advantages=torch.tensor([advantage]),
        sampled_logps=torch.tensor([-101.0]),
        old_logps=torch.tensor([-101.0]),
    )
    logps = torch.tensor([-1.0], requires_grad=True)
    loss = PolicyGradient()(
        TokenScores(logps, torch.tensor([0]), 1, 1, experience=experience), LossUnits(1, (1,))
    )
    loss.total.backward()
    assert torch.isfinite(loss.total) and torch.isfinite(logps.grad).all()


def test_a_missing_column_is_named():
    bare = replace(THREE, entropy=None, experience=replace(THREE.experience, ref_logps=None))
    with pytest.raises(OrchestratorError, match="reference log-probs"):
        PolicyGradient(kl_coefficient=0.1)(bare, UNITS)
    with pytest.raises(OrchestratorError, match="entropy at each token"):
        PolicyGradient(entropy_bonus=0.1)(bare, UNITS)
    with pytest.raises(OrchestratorError, match="needs experience"):
        PolicyGradient()(replace(THREE, experience=None), UNITS)
    assert "kl" not in PolicyGradient()(bare, UNITS).means
