"""Every DPO loss against TRL's DPOTrainer on the same token log-probs, through the recipe's own path."""

import math

import pytest
import torch

from orchestrator.algorithms.losses.interface import LossSum
from orchestrator.algorithms.losses.preference_mix import PAIR_LOSSES, REFERENCE_FREE
from orchestrator.algorithms.table import AlgorithmSpec, build
from orchestrator.recipe.schema import AlgorithmConfig
from tests.parity.oracle import Batch, dpo, random_batch, sequence_batch

CHOSEN, REJECTED = (4, 1, 9, 3, 6, 2), (2, 5, 3, 3, 12, 1)
SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}
TRL_LOSSES = [name for name in PAIR_LOSSES if name not in REFERENCE_FREE and name != "sft"]
METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


def ours(batch: Batch, cfg: AlgorithmConfig) -> LossSum:
    return build(cfg).objective(batch.scores(), batch.units)


def assert_equal(batch: Batch, cfg: AlgorithmConfig, losses: dict[str, float]) -> None:
    """Loss within 1e-6 relative, its gradient, and each metric that TRL logs."""
    batch.policy.requires_grad_()
    want, logged = dpo(
        batch,
        losses,
        beta=cfg.beta,
        label_smoothing=cfg.label_smoothing,
        f_divergence=cfg.f_divergence,
        f_alpha_divergence_coef=cfg.f_alpha,
        ld_alpha=cfg.ld_alpha,
        use_weighting=cfg.wpo,
        discopop_tau=cfg.discopop_tau,
    )
    got = ours(batch, cfg)
    assert got.total.item() == pytest.approx(want.item(), rel=1e-6)
    (want_gradient,) = torch.autograd.grad(want, batch.policy)
    (gradient,) = torch.autograd.grad(got.total, batch.policy)
    torch.testing.assert_close(gradient, want_gradient * batch.mask, rtol=1e-5, atol=1e-7)
    for name in METRICS:
        total, count = got.means[name]
        assert float(total) / count == pytest.approx(logged[name], rel=1e-6), name


def test_ties_count_one_half_where_trl_counts_them_as_wrong():
    """Half of a batch is at its reference: only there do the accuracies differ, by half of the ties."""
    batch = random_batch(CHOSEN, REJECTED)
    pairs, at_reference = len(CHOSEN), batch.policy.clone()
    at_reference[: pairs // 2], at_reference[pairs : pairs + pairs // 2] = (
        batch.reference[: pairs // 2],
        batch.reference[pairs : pairs + pairs // 2],
    )
    tied = Batch(at_reference, batch.reference, batch.log_sum_sq, batch.mask)
    _, logged = dpo(tied, {"sigmoid": 1.0})
    total, count = ours(tied, AlgorithmConfig(name="dpo")).means["rewards/accuracies"]
    assert float(total) / count == pytest.approx(
        logged["rewards/accuracies"] + 0.5 * (pairs // 2) / pairs, rel=1e-6
    )
    ties, _ = ours(tied, AlgorithmConfig(name="dpo")).means["rewards/ties"]
    assert float(ties) == pairs // 2


@pytest.mark.parametrize("beta", [0.1, 0.7])
@pytest.mark.parametrize("name", TRL_LOSSES)
def test_each_loss_equals_trl(name, beta):
    smoothing = 0.15 if name in SMOOTHED else 0.0
    cfg = AlgorithmConfig(name="dpo", loss=name, beta=beta, label_smoothing=smoothing)
    assert_equal(random_batch(CHOSEN, REJECTED), cfg, {name: 1.0})


@pytest.mark.parametrize("name", ["aot", "aot_unpaired", "robust"])
def test_smoothed_losses_equal_trl_without_smoothing(name):
    assert_equal(random_batch(CHOSEN, REJECTED, seed=3), AlgorithmConfig(name="dpo", loss=name), {name: 1.0})


@pytest.mark.parametrize("eps", [1e-3, 0.3])
def test_exo_pair_at_small_and_large_smoothing(eps):
    assert_equal(
        random_batch(CHOSEN, REJECTED),
        AlgorithmConfig(name="dpo", loss="exo_pair", label_smoothing=eps),
        {"exo_pair": 1.0},
    )


@pytest.mark.parametrize("tau", [0.05, 1.0])
def test_discopop_temperature(tau):
    assert_equal(
        random_batch(CHOSEN, REJECTED),
        AlgorithmConfig(name="dpo", loss="discopop", discopop_tau=tau),
        {"discopop": 1.0},
    )


@pytest.mark.parametrize(
    "mix",
    [
        {"sigmoid": 0.8, "bco_pair": 0.2, "sft": 1.0},
        {"sft": 0.3, "ipo": 1.0},
        {"aot": 0.5, "apo_zero": 0.25, "sft": 0.25},
    ],
)
def test_weighted_mixes_equal_trl(mix):
    assert_equal(random_batch(CHOSEN, REJECTED), AlgorithmConfig(name="dpo", loss=mix), mix)


@pytest.mark.parametrize(
    "name", ["sigmoid", "hinge", "ipo", "sigmoid_norm", "exo_pair", "discopop", "apo_zero"]
)
@pytest.mark.parametrize(
    ("divergence", "alpha"),
    [("reverse_kl", 0.5), ("forward_kl", 0.5), ("js", 0.5), ("alpha", 0.5), ("alpha", 2.0), ("alpha", 1.0)],
)
def test_f_divergences_equal_trl(divergence, alpha, name):
    # TRL's alpha divergence knows no fp64.
    dtype = torch.float32 if divergence == "alpha" else torch.float64
    smoothing = 0.1 if name == "exo_pair" else 0.0
    cfg = AlgorithmConfig(
        name="dpo", loss=name, f_divergence=divergence, f_alpha=alpha, label_smoothing=smoothing
    )
    assert_equal(random_batch(CHOSEN, REJECTED, dtype=dtype), cfg, {name: 1.0})


@pytest.mark.parametrize("mix", [{"sigmoid": 1.0}, {"ipo": 1.0}, {"sigmoid": 1.0, "sft": 0.5}, {"aot": 1.0}])
@pytest.mark.parametrize("ld_alpha", [0.0, 0.4, 1.0])
def test_ld_dpo_equals_trl(mix, ld_alpha):
    assert_equal(
        random_batch(CHOSEN, REJECTED), AlgorithmConfig(name="dpo", loss=mix, ld_alpha=ld_alpha), mix
    )


@pytest.mark.parametrize("mix", [{"sigmoid": 1.0}, {"ipo": 1.0}, {"sigmoid": 0.6, "nca_pair": 0.4}])
def test_wpo_equals_trl(mix):
    assert_equal(random_batch(CHOSEN, REJECTED), AlgorithmConfig(name="dpo", loss=mix, wpo=True), mix)


def test_everything_at_once_equals_trl():
    mix = {"sigmoid_norm": 0.7, "robust": 0.3}
    cfg = AlgorithmConfig(
        name="dpo", loss=mix, beta=0.3, label_smoothing=0.2, f_divergence="js", ld_alpha=0.5, wpo=True
    )
    assert_equal(random_batch(CHOSEN, REJECTED), cfg, mix)


def test_fp32_inputs_equal_trl():
    assert_equal(
        random_batch(CHOSEN, REJECTED, dtype=torch.float32), AlgorithmConfig(name="dpo"), {"sigmoid": 1.0}
    )


POLICY = (-20.0, -35.0, -12.5, -50.0, -22.0, -30.0, -18.0, -49.0)
REFERENCE = (-21.0, -33.0, -14.0, -51.0, -21.5, -31.0, -15.0, -47.0)
LENGTHS = (10, 17, 6, 25, 11, 14, 9, 24)
RECORDED = [
    # (loss, label smoothing, f-divergence, TRL 1.16.0's value at beta 0.1)
    ("sigmoid", 0.0, "reverse_kl", 0.6307291),
    ("hinge", 0.0, "reverse_kl", 0.8500001),
    ("ipo", 0.0, "reverse_kl", 23.4454842),
    ("exo_pair", 1e-3, "reverse_kl", 2.5179968),
    ("nca_pair", 0.0, "reverse_kl", 1.3548772),
    ("robust", 0.1, "reverse_kl", 0.6119792),
    ("bco_pair", 0.0, "reverse_kl", 1.3183100),
    ("sppo_hard", 0.0, "reverse_kl", 40.6250076),
    ("aot", 0.1, "reverse_kl", 0.6407498),
    ("aot_unpaired", 0.1, "reverse_kl", 0.6370422),
    ("apo_zero", 0.0, "reverse_kl", 0.9626628),
    ("apo_down", 0.0, "reverse_kl", 0.9723713),
    ("discopop", 0.0, "reverse_kl", 0.7707214),
    ("sigmoid_norm", 0.0, "reverse_kl", 0.6849880),
    ("sigmoid", 0.0, "forward_kl", 0.5667045),
    ("sigmoid", 0.0, "js", 0.6540115),
    ("sigmoid", 0.0, "alpha", 0.6071939),
]


@pytest.mark.parametrize(("name", "smoothing", "divergence", "value"), RECORDED)
def test_recorded_values_of_trl(name, smoothing, divergence, value):
    """TRL ran these in fp32, so they hold to 1e-6 relative."""
    batch = sequence_batch(POLICY, REFERENCE, LENGTHS)
    cfg = AlgorithmConfig(name="dpo", loss=name, label_smoothing=smoothing, f_divergence=divergence)
    assert float(ours(batch, cfg).total) == pytest.approx(value, rel=1e-6)


def test_recorded_metrics_and_sft_term_of_trl():
    batch = sequence_batch(POLICY, REFERENCE, LENGTHS)
    both, alone = (
        ours(batch, AlgorithmConfig(name="dpo", loss=loss))
        for loss in ({"sigmoid": 1.0, "sft": 1.0}, "sigmoid")
    )
    assert float(both.total - alone.total) == pytest.approx(2.0258620, rel=1e-6)
    accuracy, margin = alone.means["rewards/accuracies"], alone.means["rewards/margins"]
    assert float(accuracy[0]) / accuracy[1] == pytest.approx(0.75)
    assert float(margin[0]) / margin[1] == pytest.approx(0.15)


@pytest.mark.parametrize("eps", [0.0, 0.1, 0.4])
def test_cdpo_against_the_closed_form(eps):
    """-(1-eps) log sigmoid(beta d) - eps log sigmoid(-beta d): TRL's sigmoid ignores label smoothing."""
    batch = sequence_batch(POLICY, REFERENCE, LENGTHS)
    deltas = [(POLICY[i] - REFERENCE[i]) - (POLICY[4 + i] - REFERENCE[4 + i]) for i in range(4)]
    want = (
        sum((1 - eps) * math.log1p(math.exp(-0.1 * d)) + eps * math.log1p(math.exp(0.1 * d)) for d in deltas)
        / 4
    )
    assert float(ours(batch, AlgorithmConfig(name="dpo", label_smoothing=eps)).total) == pytest.approx(
        want, rel=1e-12
    )


def test_ipo_on_sums_against_the_closed_form():
    """(d - 1/(2 beta))^2 with d = 1.5, -3, 4.5, 3 and 1/(2 beta) = 5."""
    cfg = AlgorithmConfig(name="dpo", loss="ipo", ipo_length_average=False)
    want = ((1.5 - 5) ** 2 + (-3 - 5) ** 2 + (4.5 - 5) ** 2 + (3 - 5) ** 2) / 4
    assert float(ours(sequence_batch(POLICY, REFERENCE, LENGTHS), cfg).total) == pytest.approx(
        want, rel=1e-12
    )


@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize("name", TRL_LOSSES)
def test_loss_at_reference_is_the_loss_if_policy_equals_reference(name, beta):
    algorithm: AlgorithmSpec = build(AlgorithmConfig(name="dpo", loss=name, beta=beta, label_smoothing=0.1))
    batch = random_batch(CHOSEN, REJECTED)
    same = Batch(batch.policy, batch.policy, batch.log_sum_sq, batch.mask)
    assert float(algorithm.objective(same.scores(), same.units).total) == pytest.approx(
        algorithm.loss_at_reference, rel=1e-12
    )
