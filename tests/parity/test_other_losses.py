"""CPO, SimPO, ORPO, KTO, reward models and cross-entropy against TRL's trainers and torch."""

import math

import pytest
import torch

from orchestrator.algorithms.losses.interface import LossSum, TokenScores
from orchestrator.algorithms.table import build
from orchestrator.core.batches import LossUnits
from orchestrator.recipe.schema import AlgorithmConfig
from tests.parity.oracle import LogitsBatch, cpo, kto, orpo, random_batch, random_logits, reward

CHOSEN, REJECTED = (4, 1, 9, 3, 6, 2), (2, 5, 3, 3, 12, 1)


def mean(loss: LossSum, name: str) -> float:
    total, count = loss.means[name]
    return float(total) / count


def ours(batch: LogitsBatch, cfg: AlgorithmConfig) -> LossSum:
    flat = batch.batch()
    return build(cfg).objective(flat.scores(), flat.units)


def assert_gradients_equal(batch: LogitsBatch, got: torch.Tensor, want: torch.Tensor, rtol: float) -> None:
    (a,), (b,) = torch.autograd.grad(got, batch.logits), torch.autograd.grad(want, batch.logits)
    torch.testing.assert_close(a, b, rtol=rtol, atol=rtol * float(b.abs().max()))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize(
    ("loss", "alpha"),
    [("cpo", 0.0), ({"cpo": 1.0, "sft": 1.0}, 1.0), ({"cpo": 1.0, "sft": 0.3}, 0.3), (None, 1.0)],
)
def test_cpo_equals_trl(loss, alpha, smoothing):
    batch = random_logits(CHOSEN, REJECTED, prompt=3)
    batch.logits.requires_grad_()
    want, logged = cpo(
        batch, loss_type="sigmoid", beta=0.2, label_smoothing=smoothing, simpo_gamma=0.0, cpo_alpha=alpha
    )
    got = ours(batch, AlgorithmConfig(name="cpo", loss=loss, beta=0.2, label_smoothing=smoothing))
    assert got.total.item() == pytest.approx(want.item(), rel=1e-6)
    assert_gradients_equal(batch, got.total, want, 1e-6)
    for name in (
        "rewards/chosen",
        "rewards/rejected",
        "rewards/accuracies",
        "rewards/margins",
        "logps/chosen",
        "logps/rejected",
    ):
        assert mean(got, name) == pytest.approx(logged[name], rel=1e-6), name
    if alpha:
        assert mean(got, "nll_loss") == pytest.approx(logged["nll_loss"], rel=1e-6)


@pytest.mark.parametrize(("beta", "gamma", "smoothing"), [(2.0, 0.5, 0.0), (2.5, 1.4, 0.1), (0.1, 0.0, 0.0)])
def test_simpo_equals_trl(beta, gamma, smoothing):
    batch = random_logits(CHOSEN, REJECTED, prompt=3)
    batch.logits.requires_grad_()
    want, logged = cpo(
        batch, loss_type="simpo", beta=beta, label_smoothing=smoothing, simpo_gamma=gamma, cpo_alpha=0.0
    )
    got = ours(batch, AlgorithmConfig(name="simpo", beta=beta, simpo_gamma=gamma, label_smoothing=smoothing))
    assert got.total.item() == pytest.approx(want.item(), rel=1e-6)
    assert_gradients_equal(batch, got.total, want, 1e-6)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"):
        assert mean(got, name) == pytest.approx(logged[name], rel=1e-6), name


def test_orpo_equals_trl():
    """With one prompt token, which nothing predicts, TRL's NLL term (prompt and answer) is ours (answer)."""
    batch = random_logits(CHOSEN, REJECTED, prompt=1, dtype=torch.float32)
    batch.logits.requires_grad_()
    want, logged = orpo(batch, beta=0.3)
    got = ours(batch, AlgorithmConfig(name="orpo", beta=0.3))
    assert got.total.item() == pytest.approx(want.item(), rel=1e-6)
    assert_gradients_equal(batch, got.total, want, 1e-5)
    for name in ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "nll_loss"):
        assert mean(got, name) == pytest.approx(logged[name], rel=2e-6), name


def test_orpo_against_the_closed_form():
    """-beta log sigmoid(log odds(p_c) - log odds(p_r)) with p the geometric mean of token probabilities."""
    logps = torch.tensor([-0.2, -0.4, -1e-6, -3.0, -2.0, -40.0], dtype=torch.float64)
    scores = TokenScores(logps, torch.tensor([0, 0, 2, 1, 1, 3]), 2, 2)
    want = 0.0
    for c, r in ((-0.3, -2.5), (-1e-6, -40.0)):
        log_odds = (c - math.log(-math.expm1(c))) - (r - math.log(-math.expm1(r)))
        want += 0.5 * math.log1p(math.exp(-log_odds))
    got = build(AlgorithmConfig(name="orpo", loss="orpo", beta=0.5)).objective(scores, LossUnits(2, (3, 3)))
    assert got.total.item() == pytest.approx(want / 2, rel=1e-9)


@pytest.mark.parametrize("shift", [-0.3, 0.8])
@pytest.mark.parametrize("labels", [(1, 0, 1, 1, 0, 0), (1, 1, 1, 1, 1, 1), (0, 0, 0, 0, 0, 0)])
def test_kto_equals_trl(labels, shift):
    """shift moves the KL estimate below 0 (clamped) and above."""
    batch = random_batch(CHOSEN, REJECTED, seed=5)
    batch.policy[6:] += shift * batch.mask[6:]
    batch.policy.requires_grad_()
    label = torch.tensor(labels, dtype=torch.float64)
    want, logged = kto(batch, label, beta=0.2, desirable=1.3, undesirable=0.7)
    cfg = AlgorithmConfig(name="kto", beta=0.2, kto_desirable_weight=1.3, kto_undesirable_weight=0.7)
    got = build(cfg).objective(batch.scores(label), batch.units)
    assert got.total.item() == pytest.approx(want.item(), rel=1e-6)
    assert (logged["kl"] == 0.0) == (shift < 0)
    (a,), (b,) = torch.autograd.grad(got.total, batch.policy), torch.autograd.grad(want, batch.policy)
    torch.testing.assert_close(a, b * batch.mask, rtol=1e-6, atol=1e-12)
    for name in sorted(
        {"kl", "rewards/chosen", "rewards/rejected", "logps/chosen", "logps/rejected"} & set(logged)
    ):
        assert mean(got, name) == pytest.approx(logged[name], rel=1e-6), name


@pytest.mark.parametrize("with_margin", [False, True])
@pytest.mark.parametrize("centring", [0.0, 0.01])
def test_reward_loss_equals_trl(with_margin, centring):
    draw = torch.Generator().manual_seed(1)
    chosen, rejected, margins = (torch.randn(6, generator=draw, dtype=torch.float64) for _ in range(3))
    margin = margins.abs() if with_margin else None
    want, logged = reward(chosen, rejected, margin, centring or None)
    scores = TokenScores(
        torch.zeros(0),
        torch.zeros(0, dtype=torch.long),
        6,
        2,
        margin=margin,
        rewards=torch.stack([chosen, rejected], 1),
    )
    got = build(AlgorithmConfig(name="reward", reward_centring=centring)).objective(
        scores, LossUnits(6, (1, 1))
    )
    assert got.total.item() == pytest.approx(want.item(), rel=1e-6)
    assert mean(got, "rewards/accuracies") == pytest.approx(logged["accuracy"], rel=1e-6)
    assert mean(got, "rewards/margins") == pytest.approx(logged["margin"], rel=1e-6)


def test_reward_loss_against_the_closed_form():
    """Rewards (2, 1) margin 0.5 and (0, 3) margin 0, centring 0.1: log(1+e^-0.5) + 0.9, log(1+e^3) + 0.9."""
    rewards = torch.tensor([[2.0, 1.0], [0.0, 3.0]], dtype=torch.float64)
    scores = TokenScores(
        torch.zeros(0),
        torch.zeros(0, dtype=torch.long),
        2,
        2,
        margin=torch.tensor([0.5, 0.0]),
        rewards=rewards,
    )
    got = build(AlgorithmConfig(name="reward", reward_centring=0.1)).objective(scores, LossUnits(2, (1, 1)))
    want = (math.log1p(math.exp(-0.5)) + 0.9 + math.log1p(math.exp(3.0)) + 0.9) / 2
    assert got.total.item() == pytest.approx(want, rel=1e-12)


def test_sft_equals_torch_cross_entropy():
    batch = random_logits((5, 2, 7), (1, 1, 1), prompt=3)
    logits, ids, completion = batch.logits[:3], batch.ids[:3], batch.completion[:3]
    labels = ids.masked_fill(~completion, -100)[:, 1:]
    want = torch.nn.functional.cross_entropy(logits[:, :-1].reshape(-1, 11), labels.reshape(-1))
    logps = torch.log_softmax(logits[:, :-1], -1).gather(2, ids[:, 1:, None])[..., 0]
    flat = logps[completion[:, 1:]]
    scores = TokenScores(flat, torch.tensor([0] * 5 + [1] * 2 + [2] * 7), 3, 1)
    got = build(AlgorithmConfig(name="sft")).objective(scores, LossUnits(3, (14,)))
    assert got.total.item() == pytest.approx(float(want), rel=1e-12)
    assert mean(got, "nll_loss") == pytest.approx(float(want), rel=1e-12)
