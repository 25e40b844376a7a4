"""Losses that couple the batch: two passes over any cut have the gradient of one large batch in torch."""

import numpy as np
import pytest

from orchestrator.algorithms.table import build
from orchestrator.core.batches import Cut
from orchestrator.data.micro_batches import cut_step, loss_units
from orchestrator.learner.torch_baseline import PlainTrainer
from orchestrator.trainers.two_pass import whole_scores, with_coefficients
from tests.unit.trainers.conftest import pairs, recipe

CASES = [
    {"name": "dpo", "loss": "aot"},
    {"name": "dpo", "loss": "aot_unpaired"},
    {"name": "dpo", "loss": {"aot": 0.5, "apo_zero": 0.3, "sft": 0.2}},
    {"name": "kto"},
]


def cut(layout="prefix_shared", examples=8):
    return Cut(1, examples, None, layout, 0, "no_sync")


def step(policy, groups, how, number):
    """One optimizer step in two passes; (loss, means, gradient norm)."""
    batch = policy.with_live_reference(cut_step(groups, how))
    batch, whole = with_coefficients(batch, policy, policy.rank.algorithm, number)
    report = whole.merged_into(policy.forward_backward(batch, number))
    return report.loss, report.means, policy.optim_step(number).grad_norm


@pytest.mark.parametrize("algorithm", CASES, ids=lambda a: str(a.get("loss", a["name"])))
@pytest.mark.parametrize(("layout", "examples"), [("prefix_shared", 8), ("packed", 3), ("padded", 1)])
def test_two_passes_over_any_cut_learn_like_one_plain_batch(one_rank, algorithm, layout, examples):
    cfg = recipe(**algorithm)
    policy, plain = one_rank(cfg), PlainTrainer(cfg, build(cfg.algorithm), 10)
    for number in range(3):
        groups = pairs(8, number, labelled=algorithm["name"] == "kto")
        expected = plain.step(groups, loss_units(groups), number)
        loss, means, norm = step(policy, groups, cut(layout, examples), number)
        assert loss == pytest.approx(expected.loss, rel=1e-5)
        assert norm == pytest.approx(expected.grad_norm, rel=1e-4)
        assert means
    for name, weight in plain.weights().items():
        np.testing.assert_allclose(policy.weights()[f"model.{name}"], weight, atol=5e-5)


def test_a_loss_per_micro_batch_would_be_another_one(one_rank):
    """The control: micro-batches of one example have nothing to sort, which is another loss."""
    policy, groups = one_rank(recipe(loss="aot_unpaired", beta=5.0)), pairs(8, 50)
    for number in range(3):
        step(policy, pairs(8, number), cut(), number)
    objective, units = policy.rank.algorithm.objective, loss_units(groups)

    def loss(part):
        batch = policy.with_live_reference(cut_step(part, cut()))
        return float(objective(whole_scores(batch, policy.token_logprobs(batch)), units).total)

    assert abs(sum(loss([g]) for g in groups) - loss(groups)) > 1e-2


def test_a_micro_batch_without_coefficients_is_refused(one_rank):
    policy = one_rank(recipe(loss="aot"))
    with pytest.raises(AssertionError, match="coefficients of pass 1"):
        policy.forward_backward(policy.with_live_reference(cut_step(pairs(4), cut())), 0)


def test_fillers_are_left_out_and_get_no_coefficient(one_rank):
    policy = one_rank(recipe(loss="aot"))
    batch = cut_step(pairs(3), Cut(2, 1, None, "padded", 0, "no_sync"))
    logprobs = tuple(policy.rank.token_logprobs(rank) for rank in batch.micro_batches)
    batch = batch.with_reference(logprobs)

    class TwoRanks:
        def token_logprobs(self, _, *, step):
            return logprobs

    (filler,) = [mb for rank in batch.micro_batches for mb in rank if not mb.weight]
    assert whole_scores(batch, logprobs).examples == 3
    ready, _ = with_coefficients(batch, TwoRanks(), policy.rank.algorithm, 0)  # pyright: ignore
    for mb in (mb for rank in ready.micro_batches for mb in rank):
        assert mb.coefficients.any() == bool(mb.weight)
        assert len(mb.coefficients) == len(mb.targets)
    assert len(filler.targets)
