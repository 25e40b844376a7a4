"""No cut of an effective batch changes its loss or gradient: sums over global counts, coefficients of coupled
losses."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from orchestrator.algorithms.losses.interface import TokenScores
from orchestrator.algorithms.losses.preference_mix import COUPLED, PAIR_LOSSES
from orchestrator.algorithms.losses.whole_batch import coefficients, linear
from orchestrator.algorithms.table import AlgorithmSpec, build
from orchestrator.core.batches import LossUnits
from orchestrator.recipe.schema import AlgorithmConfig

ALONE = [
    *(
        AlgorithmConfig(name="dpo", loss=name, label_smoothing=0.1)
        for name in PAIR_LOSSES
        if name not in (*COUPLED, "sft")
    ),
    AlgorithmConfig(name="dpo", loss={"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0}),
    AlgorithmConfig(name="dpo", loss="ipo", f_divergence="js", ld_alpha=0.3),
    AlgorithmConfig(name="dpo", wpo=True),
    AlgorithmConfig(name="simpo"),
    AlgorithmConfig(name="cpo"),
    AlgorithmConfig(name="orpo"),
    AlgorithmConfig(name="sft"),
    AlgorithmConfig(name="reward", reward_centring=0.1),
]
TOGETHER = [
    AlgorithmConfig(name="dpo", loss="aot"),
    AlgorithmConfig(name="dpo", loss="aot_unpaired", label_smoothing=0.1),
    AlgorithmConfig(name="dpo", loss={"aot": 0.5, "apo_zero": 0.3, "sft": 0.2}, ld_alpha=0.5),
    AlgorithmConfig(name="kto", kto_desirable_weight=1.4),
]


def label_of(cfg: AlgorithmConfig) -> str:
    return cfg.name if cfg.loss is None else str(cfg.loss)


def part(whole: TokenScores, examples: list[int], logps: Tensor) -> TokenScores:
    """The micro-batch of these examples, in this order."""
    pieces, sequence = [], []
    for place, example in enumerate(examples):
        for k in range(whole.branches):
            at = (whole.sequence == example * whole.branches + k).nonzero()[:, 0]
            pieces.append(at)
            sequence.append(torch.full((len(at),), place * whole.branches + k))
    index = torch.cat(pieces)

    def rows(values: Tensor | None) -> Tensor | None:
        return None if values is None else values[torch.tensor(examples)]

    return TokenScores(
        logps[index],
        torch.cat(sequence),
        len(examples),
        whole.branches,
        None if whole.ref_logps is None else whole.ref_logps[index],
        rows(whole.label),
        rows(whole.margin),
        None if whole.wpo is None else whole.wpo[index],
        rows(whole.rewards),
    )


@st.composite
def cut_batches(draw):
    """A whole batch, its counts, and a partition of its examples into micro-batches in any order."""
    n, branches = draw(st.integers(1, 6)), 2
    lengths = draw(st.lists(st.integers(1, 4), min_size=n * branches, max_size=n * branches))
    order = draw(st.permutations(range(n)))
    stops = sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=3))})
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    sequence = torch.cat([torch.full((size,), k) for k, size in enumerate(lengths)])
    logps, noise, wpo = (torch.randn(len(sequence), generator=seed, dtype=torch.float64) for _ in range(3))
    logps = -0.05 - logps.abs()
    label = torch.randint(2, (n,), generator=seed).double()
    rewards = torch.randn(n, branches, generator=seed, dtype=torch.float64)
    whole = TokenScores(logps, sequence, n, branches, logps + 0.3 * noise, label, label * 0.2, wpo, rewards)
    units = LossUnits(n, tuple(sum(lengths[k::branches]) for k in range(branches)))
    return whole, units, [list(order[a:b]) for a, b in pairwise(stops)]


@pytest.mark.parametrize("cfg", ALONE, ids=label_of)
@settings(max_examples=15)
@given(cut=cut_batches())
def test_sum_over_any_partition_is_the_whole(cfg, cut):
    whole, units, micro_batches = cut
    objective = build(cfg).objective
    full = objective(whole, units)
    parts = [objective(part(whole, examples, whole.logps), units) for examples in micro_batches]
    assert float(sum(p.total for p in parts)) == pytest.approx(float(full.total), rel=1e-11, abs=1e-12)
    for name, (total, count) in full.means.items():
        assert float(sum(p.means[name][0] for p in parts)) == pytest.approx(
            float(total), rel=1e-10, abs=1e-10
        ), name
        assert sum(p.means[name][1] for p in parts) == count, name


def whole_gradient(algorithm: AlgorithmSpec, whole: TokenScores, units: LossUnits) -> tuple[Tensor, Tensor]:
    logps = whole.logps.clone().requires_grad_()
    everything = list(range(whole.examples))
    loss = algorithm.objective(part(whole, everything, logps), units).total
    return loss.detach(), torch.autograd.grad(loss, logps)[0]


@pytest.mark.parametrize("cfg", TOGETHER, ids=label_of)
@settings(max_examples=30)
@given(cut=cut_batches())
def test_coupled_losses_have_the_whole_batches_gradient_over_any_partition(cfg, cut):
    whole, units, micro_batches = cut
    algorithm = build(cfg)
    assert algorithm.couples_batch
    want_loss, want = whole_gradient(algorithm, whole, units)
    loss, weights = coefficients(algorithm.objective, whole, units)
    assert float(loss.total) == pytest.approx(float(want_loss), rel=1e-12)
    assert not loss.total.requires_grad
    logps = whole.logps.clone().requires_grad_()
    for examples in micro_batches:
        index = part(whole, examples, torch.arange(len(logps)).double()).logps.long()
        linear(logps[index], weights[index]).backward()
    torch.testing.assert_close(logps.grad, want, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("cfg", TOGETHER, ids=label_of)
def test_coupled_losses_differ_when_cut_naively(cfg):
    """The reason for two passes: the sum over the micro-batches is another loss."""
    draw = torch.Generator().manual_seed(0)
    sequence = torch.arange(16)
    logps, reference = (-torch.rand(16, generator=draw, dtype=torch.float64) * 20 for _ in range(2))
    whole = TokenScores(logps, sequence, 8, 2, reference, torch.tensor([1.0, 0.0] * 4))
    units = LossUnits(8, (8, 8))
    objective = build(cfg).objective
    full = objective(whole, units).total
    cut = sum(
        objective(part(whole, examples, logps), units).total for examples in ([0, 1], [2, 3], [4, 5], [6, 7])
    )
    assert abs(float(cut - full)) > 1e-3


def test_a_coupled_loss_seen_through_a_model():
    """theta -> log-probs is not linear; the gradient over micro-batches still equals the whole batch's."""
    draw = torch.Generator().manual_seed(1)
    features = torch.randn(12, 3, generator=draw, dtype=torch.float64)
    reference = -torch.rand(12, generator=draw, dtype=torch.float64)
    whole = TokenScores(torch.zeros(12), torch.arange(12), 6, 2, reference)
    units = LossUnits(6, (6, 6))
    objective = build(AlgorithmConfig(name="dpo", loss="aot", beta=1.0)).objective
    theta = torch.randn(3, generator=draw, dtype=torch.float64).requires_grad_()

    def scored(index: Tensor) -> Tensor:
        return torch.nn.functional.logsigmoid((features[index] @ theta).sin())

    everything = torch.arange(12)
    full = TokenScores(scored(everything), whole.sequence, 6, 2, reference)
    (want,) = torch.autograd.grad(objective(full, units).total, theta)
    _, weights = coefficients(
        objective, TokenScores(scored(everything).detach(), whole.sequence, 6, 2, reference), units
    )
    for index in everything.split(4):
        linear(scored(index), weights[index]).backward()
    torch.testing.assert_close(theta.grad, want, rtol=1e-12, atol=1e-14)
