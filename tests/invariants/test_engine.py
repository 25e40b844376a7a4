"""Every ZeRO stage with every legal sync policy keeps the accumulation contract, on two real DeepSpeed ranks
without Ray.

All work is done once (engine_ranks.py), without a compiler on the PATH. The tests check its results.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from orchestrator.algorithms.losses.interface import TokenScores
from orchestrator.algorithms.table import build
from orchestrator.core.batches import MicroBatch
from orchestrator.data.micro_batches import cut_step, loss_units
from orchestrator.learner.torch_baseline import PlainTrainer
from orchestrator.models.forward import MicroBatchTensors, ScoringModel, run_forward
from orchestrator.models.load import load
from orchestrator.plan.memory import model_sizes, traffic
from tests.invariants.engine_ranks import (
    BETA1,
    BF16,
    CLIP,
    FP32,
    HOLDS_BACK,
    LOOKED_AT,
    MANY_PAIRS,
    MOVES,
    STEPS,
    WORLD,
    Everything,
    Policy,
    cut,
    on_ranks,
    recipe,
    work,
)

pytestmark = pytest.mark.timeout(600)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Everything]:
    folder = tmp_path_factory.mktemp("engine")
    (folder / "ops").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", str(folder / "nothing"))
        patch.setenv("TORCH_EXTENSIONS_DIR", str(folder / "ops"))
        patch.delenv("CXX", raising=False)
        patch.delenv("CC", raising=False)
        results = on_ranks(work, WORLD, folder, folder, timeout=500.0)
    assert not list((folder / "ops").iterdir()), "something was compiled"
    return results


@dataclass(frozen=True, slots=True)
class Plain:
    """Step 0 as one batch in plain torch."""

    loss: float
    norm: float
    """Norm of the whole gradient, summed in double."""
    gradient: dict[str, np.ndarray]
    """By parameter name."""


@pytest.fixture(scope="module")
def plain() -> Plain:
    cfg = recipe(clip=None)
    trainer = PlainTrainer(cfg, build(cfg.algorithm), 10)
    step = trainer.step(STEPS[0], loss_units(STEPS[0]), 0)
    gradient = {f"model.{n}": p.grad.numpy() for n, p in trainer.trainable.items() if p.grad is not None}
    norm = norm_of(gradient)
    # torch's own norm of large fp32 tensors is not more precise
    assert step.grad_norm == pytest.approx(norm, rel=1e-4)
    return Plain(step.loss, norm, gradient)


def norm_of(gradient: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in gradient.values())))


def policies(cases: list[Policy]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("policy", cases, ids=lambda p: f"zero{p[0]}-{p[1]}-{p[2]}")


def test_no_compiler_is_needed(ranks):
    assert ranks[0].compilers == (None,) * 6


@policies(LOOKED_AT)
def test_ranks_agree_to_the_bit(ranks, policy):
    assert ranks[0].results[policy].after == ranks[1].results[policy].after
    assert len(set(ranks[0].results[policy].after)) == 3


@policies(LOOKED_AT)
def test_a_non_finite_gradient_on_one_rank_is_refused_by_all_and_leaves_no_trace(ranks, policy):
    for results in (rank.results[policy] for rank in ranks):
        assert not results.refused.applied
        assert np.isnan(results.refused.grad_norm)
        assert results.after_refused == results.after[0]
        assert results.good_after_refused == results.after[1]


@policies(LOOKED_AT)
def test_discarded_gradients_leave_no_trace(ranks, policy):
    for results in (rank.results[policy] for rank in ranks):
        assert results.after_discard == results.after_probe == results.after[1]
        assert results.good_after_discard == results.after[2]


@policies(LOOKED_AT)
def test_a_filler_changes_nothing(ranks, policy):
    for results in (rank.results[policy] for rank in ranks):
        assert results.with_fillers == results.plain


@policies(FP32)
def test_loss_and_gradient_norm_are_those_of_one_plain_batch(ranks, plain, policy):
    by_rank = [rank.results[policy] for rank in ranks]
    assert sum(results.loss for results in by_rank) == pytest.approx(plain.loss, rel=1e-6)
    for results in by_rank:
        assert results.steps[0].grad_norm == pytest.approx(plain.norm, rel=1e-6)
        assert results.unclipped.grad_norm == pytest.approx(plain.norm, rel=1e-6)
    assert plain.norm > 2 * CLIP


@policies(FP32)
@pytest.mark.parametrize("clip", [CLIP, None])
def test_the_clipped_and_the_whole_gradient_reach_adam(ranks, plain, policy, clip):
    results = ranks[0].results[policy]
    moment = results.first_moment if clip else results.unclipped_moment
    reached = {name: value / (1 - BETA1) for name, value in moment.items()}
    norm = clip or plain.norm
    assert reached.keys() == plain.gradient.keys()
    assert norm_of(reached) == pytest.approx(norm, rel=1e-5)  # the clip factor has 1e-6 added to the norm
    for name, value in plain.gradient.items():
        np.testing.assert_allclose(
            reached[name], value * norm / plain.norm, rtol=0, atol=1e-6 * norm, err_msg=name
        )


@policies(LOOKED_AT)
def test_steps_use_the_learning_rate_of_the_schedule(ranks, policy):
    steps = ranks[0].results[policy].steps
    assert [s.learning_rate for s in steps] == pytest.approx([0.0, 5e-3, 1e-2])
    assert all(s.applied for s in steps)


@policies(LOOKED_AT)
def test_collectives_carry_the_predicted_bytes(ranks, policy):
    """The counts are exact to the byte, except for ZeRO-3's three norm weights of 64 values, which are too
    small for the counter. In its first step DeepSpeed also gathers what it later keeps whole."""
    cfg, how = recipe(policy[2]), cut(policy)
    predicted = traffic(
        cfg, model_sizes(cfg, build(cfg.algorithm)), how, len(cut_step(STEPS[0], how).micro_batches[0])
    )
    skipped = 3 * 64 * (2 if policy[2] == "bf16" else 4) if policy[0] == 3 else 0
    for steps in (rank.results[policy].steps for rank in ranks):
        assert [s.reduced_bytes for s in steps] == [predicted.reduced] * 3
        assert [s.gathered_bytes for s in steps[1:]] == [predicted.gathered - skipped] * 2
        assert policy[0] == 3 or steps[0].gathered_bytes == predicted.gathered
    assert skipped < 1e-3 * predicted.gathered or not skipped


@pytest.mark.parametrize(("origin", "stage"), MOVES)
def test_a_state_moves_between_stages(ranks, origin, stage):
    for moved in (rank.moved[origin, stage] for rank in ranks):
        assert moved.loaded == moved.saved
        assert moved.gap <= 1e-6
        assert origin != stage or moved.resumed == moved.undisturbed


@policies(BF16)
def test_bf16_resumes_to_the_bit(ranks, policy):
    for resumed in (rank.bf16[policy] for rank in ranks):
        assert resumed.loaded == resumed.saved
        assert resumed.resumed == resumed.undisturbed
        assert resumed.resumed != resumed.saved


@pytest.mark.parametrize("at", [0, 1, 2])
@policies(HOLDS_BACK)
def test_a_step_that_did_not_fit_is_replayed_without_a_trace(ranks, policy, at):
    for rank in ranks:
        assert rank.replayed[policy, at] == rank.results[policy].after[0]


def test_a_module_with_low_precision_master_weights_is_refused(ranks):
    assert all("bfloat16 master weights, not fp32" in rank.low_master for rank in ranks)


@policies(BF16)
def test_bf16_gradients_accumulate_in_fp32(ranks, bf16_baselines, policy):
    ours = distance(ranks[0].gradients[policy], bf16_baselines.exact)
    summed_low = distance(bf16_baselines.summed_in_bf16, bf16_baselines.exact)
    summed_high = distance(bf16_baselines.summed_in_fp32, bf16_baselines.exact)
    numbers = (
        f"error of 64 bf16 micro-batches a rank: ours {ours:.5f}, summed in fp32 {summed_high:.5f}, "
        f"summed in bf16 {summed_low:.5f}"
    )
    assert ours < 0.8 * summed_low, numbers
    assert ours == pytest.approx(summed_high, rel=0.05), numbers


def distance(gradient: dict[str, np.ndarray], exact: dict[str, np.ndarray]) -> float:
    """Norm of the difference over the norm of `exact`."""
    gap = sum(float(np.square(gradient[n] - v, dtype=np.float64).sum()) for n, v in exact.items())
    return float(np.sqrt(gap / sum(float(np.square(v, dtype=np.float64).sum()) for v in exact.values())))


@dataclass(frozen=True, slots=True)
class Baselines:
    """Gradients of MANY_PAIRS in plain torch, by parameter name."""

    exact: dict[str, np.ndarray]
    """In fp32 throughout."""
    summed_in_fp32: dict[str, np.ndarray]
    """bf16 gradients of micro-batches, summed in fp32."""
    summed_in_bf16: dict[str, np.ndarray]
    """bf16 gradients of micro-batches, summed in bf16 on each rank."""


@pytest.fixture(scope="module")
def bf16_baselines() -> Baselines:
    """All use the same rounded weights, and the learners' micro-batches of each rank."""
    micro = cut_step(MANY_PAIRS, cut(BF16[0], examples=1)).micro_batches
    low, exact = module(), module().float()
    sums: dict[str, torch.Tensor] = {n: torch.zeros(p.shape) for n, p in low.named_parameters()}
    halves = []
    for rank in micro:
        low_sums = {n: torch.zeros_like(p) for n, p in low.named_parameters()}
        for mb in rank:
            add_gradient(exact, mb)
            add_gradient(low, mb)
            for name, parameter in low.named_parameters():
                assert parameter.grad is not None
                low_sums[name] += parameter.grad
                sums[name] += parameter.grad.float()
                parameter.grad = None
        halves.append(low_sums)
    return Baselines(
        exact={n: p.grad.numpy() for n, p in exact.named_parameters() if p.grad is not None},
        summed_in_fp32={n: s.numpy() for n, s in sums.items()},
        summed_in_bf16={n: sum(h[n].float() for h in halves).numpy() for n in sums},  # pyright: ignore
    )


def module() -> ScoringModel:
    return ScoringModel(load(recipe().model, seed=0, head="lm").model, head="lm").bfloat16().train()


def add_gradient(model: ScoringModel, mb: MicroBatch) -> None:
    result = run_forward(model, MicroBatchTensors.of(mb, torch.device("cpu")))
    scores = TokenScores(result.values, torch.from_numpy(mb.sequence), len(mb), mb.branches)
    build(recipe().algorithm).objective(scores, loss_units(MANY_PAIRS)).total.backward()
