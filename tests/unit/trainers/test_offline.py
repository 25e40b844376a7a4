"""The offline loop with a real learner: replays, skips, first loss, stopping, evaluations, checkpoints."""

import json
import math
import signal
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.nn.attention import flex_attention

from orchestrator.algorithms.table import build
from orchestrator.core.batches import Cut, PackedBatch
from orchestrator.core.errors import ConfigError, Diverged, Interrupted, OutOfMemory
from orchestrator.core.faults import VARIABLE
from orchestrator.core.reports import Progress
from orchestrator.core.stopping import Stop
from orchestrator.data.micro_batches import cut_step
from orchestrator.models.block_attention import compiled_attention
from orchestrator.observe.metrics import Throughput
from orchestrator.recipe.schema import Evaluation, Model, Source, TinyModel
from orchestrator.trainers.cadence import AfterSteps
from orchestrator.trainers.evaluation import Evaluator, HeldOut
from orchestrator.trainers.offline import OfflinePlan, OfflineTrainer
from orchestrator.trainers.optimizer_step import Clock, Guards
from orchestrator.trainers.ranking import Ranking
from tests.unit.trainers.conftest import WHOLE, MemoryCheckpoints, RecordingReporter, batches, pairs, recipe

LN2 = math.log(2.0)
BY_REWARD = Ranking("implicit reward", 0.1)


def trainer(
    policy,
    *,
    attach=None,
    total=3,
    checkpoints=None,
    cut=WHOLE,
    reporter=None,
    stop=None,
    groups=None,
    held_out=(),
    first_loss_tolerance=1e-5,
    gradient_bytes=0,
    max_skipped_in_a_row=5,
    ranking=BY_REWARD,
    **plan,
):
    cfg = policy.rank.spec.recipe
    attach = attach or policy.with_live_reference
    whole = OfflinePlan(
        **{
            "algorithm": build(cfg.algorithm),
            "total_steps": total,
            "evaluate_every": None,
            "evaluate_at_start": True,
            "save_every": None,
            "reference_sync_every": cfg.algorithm.reference_sync_every,
            "reference_sync_alpha": cfg.algorithm.reference_sync_alpha,
            "guards": Guards(first_loss_tolerance, gradient_bytes, max_skipped_in_a_row),
            **plan,
        }
    )
    evaluator = Evaluator(
        HeldOut(tuple(held_out), ("held", "other")), Evaluation(), policy, attach, str, ranking
    )
    reader = batches(groups or pairs(40))
    return OfflineTrainer(
        whole,
        cut,
        policy,
        attach,
        reader,
        evaluator,
        reporter or RecordingReporter(),
        checkpoints or MemoryCheckpoints(),
        Throughput(),
        stop or Stop(),
    )


def test_steps_are_counted_reported_and_start_at_the_loss_of_the_reference(one_rank):
    reporter, checkpoints = RecordingReporter(), MemoryCheckpoints()
    end = trainer(one_rank(), reporter=reporter, checkpoints=checkpoints).run()
    assert [s.step for s in reporter.steps] == [1, 2, 3]
    assert reporter.losses[0] == pytest.approx(LN2, abs=1e-6)
    assert reporter.losses[2] < LN2
    assert (end.step, end.examples, end.skipped) == (3, 24, 0)
    assert end.tokens == sum(g.tokens for at in (0, 8, 16) for g in batches(pairs(40)).at(at))
    assert checkpoints.saved == [end]
    assert [s.metrics["learning_rate"] for s in reporter.steps] == pytest.approx([5e-3, 4.5e-3, 4e-3])


# ---- out of memory


IN_PLACE = [(0, "no_sync"), (1, "no_sync"), (1, "coalesced"), (2, "coalesced")]


@pytest.mark.parametrize(("stage", "sync"), IN_PLACE)
def test_a_step_that_does_not_fit_is_replayed_with_half_the_micro_batch(one_rank, stage, sync):
    cut = replace(WHOLE, zero_stage=stage, sync=sync)
    calm, tight = RecordingReporter(), RecordingReporter()
    undisturbed = one_rank(cut=cut)
    trainer(undisturbed, reporter=calm, cut=cut).run()
    policy = one_rank(cut=cut, fits=80)
    loop = trainer(policy, reporter=tight, cut=cut)
    end = loop.run()
    assert loop.cut.examples is not None and loop.cut.examples < 8
    assert max(policy.positions) <= 80 < max(undisturbed.positions)
    assert tight.losses == pytest.approx(calm.losses, rel=1e-5)
    assert (end.step, end.examples) == (3, 24)
    assert policy.discarded == len(tight.notes) > 0
    assert "same effective batch" in tight.notes[0]
    for name, weight in undisturbed.weights().items():
        # as vectors: Adam's first steps scale the rounding of a tiny gradient up to a share of a full step
        assert np.linalg.norm(policy.weights()[name] - weight) <= 3e-5 * np.linalg.norm(weight), name


def test_gradients_of_the_micro_batches_before_the_one_that_did_not_fit_are_dropped(one_rank):
    calm, tight = RecordingReporter(), RecordingReporter()
    trainer(one_rank(), reporter=calm, cut=replace(WHOLE, examples=2)).run()
    policy, failed = one_rank(), []

    def third_one_fails(*_):
        # four forwards without gradient come first, and would hide a gradient that was kept
        if not failed and len(policy.positions) == 7:
            failed.append(True)
            raise OutOfMemory("in the middle of a step")

    policy.rank.scoring.register_forward_pre_hook(third_one_fails)
    trainer(policy, reporter=tight, cut=replace(WHOLE, examples=2)).run()
    assert failed and policy.discarded == 1
    assert tight.losses == pytest.approx(calm.losses, rel=1e-5)
    assert [s.metrics["grad_norm"] for s in tight.steps] == pytest.approx(
        [s.metrics["grad_norm"] for s in calm.steps], rel=1e-5
    )


def test_one_example_that_does_not_fit_ends_the_run(one_rank):
    reporter = RecordingReporter()
    with pytest.raises(OutOfMemory):
        trainer(one_rank(fits=4), reporter=reporter).run()
    assert not reporter.steps
    assert [n.split("(")[-1].split(")")[0] for n in reporter.notes] == [
        "4 examples",
        "2 examples",
        "1 examples",
    ]


def test_nothing_is_replayed_if_other_ranks_may_be_stuck(one_rank):
    policy, reporter = one_rank(fits=4), RecordingReporter()

    class Stuck:
        def __getattr__(self, name):
            return getattr(policy, name)

        def forward_backward(self, batch, step):
            try:
                return policy.forward_backward(batch, step)
            except OutOfMemory as error:
                error.in_place = False
                raise

    with pytest.raises(OutOfMemory):
        trainer(Stuck(), reporter=reporter).run()
    assert not reporter.notes and not policy.discarded


# ---- not a number


def not_a_number_at(bad: int, policy):
    """Attaches reference log-probs; those of the batch at cursor 8 * bad are NaN."""
    wanted = {g.id for g in batches(pairs(40)).at(8 * bad)}

    def attach(batch: PackedBatch) -> PackedBatch:
        ready = policy.with_live_reference(batch)
        if {g.id for g in batch.groups} != wanted:
            return ready
        return ready.with_reference(
            tuple(tuple(np.full_like(mb.ref_logprobs, np.nan) for mb in rank) for rank in ready.micro_batches)
        )

    return attach


def without_batch(one_rank, left_out: int):
    """Weights after three steps that never saw that batch."""
    policy, reader = one_rank(), batches(pairs(40))
    for step, number in enumerate(n for n in range(4) if n != left_out):
        policy.forward_backward(policy.with_live_reference(cut_step(reader.at(8 * number), WHOLE)), step)
        policy.optim_step(step)
    return policy.digest()


@pytest.mark.parametrize("bad", [0, 1])
def test_a_loss_that_is_not_a_number_is_skipped_as_if_its_batch_did_not_exist(one_rank, bad):
    policy, reporter = one_rank(), RecordingReporter()
    end = trainer(policy, reporter=reporter, attach=not_a_number_at(bad, policy)).run()
    assert (end.step, end.examples, end.skipped) == (3, 32, 1)
    assert policy.digest() == without_batch(one_rank, bad)
    ids = sorted(g.id for g in batches(pairs(40)).at(8 * bad))
    assert reporter.notes == [f"step {bad + 1}: non-finite loss, no step taken; examples {ids}"]


def test_a_gradient_that_is_not_a_number_is_skipped_as_if_its_batch_did_not_exist(
    one_rank, tmp_path, monkeypatch
):
    fault = {"site": "micro_batch", "action": "nan", "step": 1, "once": str(tmp_path / "done")}
    monkeypatch.setenv(VARIABLE, json.dumps([fault]))
    policy, reporter = one_rank(), RecordingReporter()
    end = trainer(policy, reporter=reporter).run()
    assert (end.step, end.examples, end.skipped) == (3, 32, 1)
    assert policy.digest() == without_batch(one_rank, 1)
    assert len(reporter.notes) == 1 and "step 2: non-finite" in reporter.notes[0]
    assert all(
        math.isfinite(s.metrics["loss"]) and math.isfinite(s.metrics["grad_norm"]) for s in reporter.steps
    )


def test_too_many_in_a_row_end_the_run(one_rank, monkeypatch):
    monkeypatch.setenv(VARIABLE, json.dumps([{"site": "micro_batch", "action": "nan", "step": 1}]))
    reporter = RecordingReporter()
    with pytest.raises(Diverged, match="3 steps in a row") as error:
        trainer(one_rank(), reporter=reporter, max_skipped_in_a_row=3).run()
    assert len(reporter.notes) == 3 and len(reporter.steps) == 1
    assert "step 2" in error.value.why


# ---- first loss


def shifted(policy, by):
    def attach(batch):
        ready = policy.with_live_reference(batch)
        return ready.with_reference(
            tuple(
                tuple(mb.ref_logprobs + by * (mb.sequence % 2) for mb in rank) for rank in ready.micro_batches
            )
        )

    return attach


def test_stale_reference_log_probs_stop_the_run_before_its_first_step(one_rank):
    policy, reporter = one_rank(), RecordingReporter()
    before = policy.digest()
    with pytest.raises(ConfigError, match=r"policy == reference must give 0\.6931472"):
        trainer(policy, reporter=reporter, attach=shifted(policy, 0.05)).run()
    assert policy.digest() == before and not reporter.steps


def test_without_a_tolerance_the_first_loss_is_not_checked(one_rank):
    policy = one_rank()
    assert trainer(policy, attach=shifted(policy, 0.05), first_loss_tolerance=None, total=1).run().step == 1


def test_a_resumed_run_does_not_check_its_first_loss(one_rank):
    policy = one_rank()
    end = trainer(
        policy,
        attach=shifted(policy, 0.05),
        checkpoints=MemoryCheckpoints(Progress(step=2, examples=16)),
        total=3,
    ).run()
    assert (end.step, end.examples) == (3, 24)


# ---- evaluations and checkpoints


def test_evaluation_and_checkpoints_come_when_they_are_due_and_at_the_end(one_rank):
    reporter, checkpoints = RecordingReporter(), MemoryCheckpoints()
    trainer(
        one_rank(),
        reporter=reporter,
        checkpoints=checkpoints,
        total=5,
        evaluate_every=2,
        save_every=3,
        held_out=pairs(4, seed=9),
    ).run()
    assert [e.step for e in reporter.evaluations] == [0, 2, 4, 5]
    assert [p.step for p in checkpoints.saved] == [3, 5]
    assert reporter.evaluations[0].metrics["eval/loss"] == pytest.approx(LN2, abs=1e-6)


def test_what_is_due_at_the_last_step_happens_once(one_rank):
    reporter, checkpoints = RecordingReporter(), MemoryCheckpoints()
    trainer(
        one_rank(),
        reporter=reporter,
        checkpoints=checkpoints,
        total=2,
        evaluate_every=1,
        save_every=1,
        evaluate_at_start=False,
        held_out=pairs(4),
    ).run()
    assert ([e.step for e in reporter.evaluations], [p.step for p in checkpoints.saved]) == ([1, 2], [1, 2])


def test_a_resumed_run_continues_at_its_cursor_without_the_first_evaluation(one_rank):
    reporter, checkpoints = (
        RecordingReporter(),
        MemoryCheckpoints(Progress(step=3, examples=24, tokens=100, skipped=1)),
    )
    end = trainer(one_rank(), reporter=reporter, checkpoints=checkpoints, total=5, held_out=pairs(4)).run()
    assert ([s.step for s in reporter.steps], [e.step for e in reporter.evaluations]) == ([4, 5], [5])
    assert (end.step, end.examples, end.skipped) == (5, 40, 1)


def test_a_finished_run_does_nothing_more(one_rank):
    policy, checkpoints = one_rank(), MemoryCheckpoints(Progress(step=3, examples=24))
    assert trainer(policy, checkpoints=checkpoints).run() == checkpoints.start
    assert not policy.positions and not checkpoints.saved


def test_without_held_out_examples_no_evaluation_is_reported(one_rank):
    reporter = RecordingReporter()
    trainer(one_rank(), reporter=reporter, total=1).run()
    assert not reporter.evaluations


class Signals(RecordingReporter):
    """A reporter that sends a signal at a step, or when an evaluation is reported."""

    def __init__(self, stop, *, step=None, evaluation=None):
        super().__init__()
        self.stop, self.at_step, self.at_evaluation = stop, step, evaluation

    def step(self, report):
        super().step(report)
        if report.step == self.at_step:
            self.stop.handle(signal.SIGTERM)
            self.stop.handle(signal.SIGTERM)  # as `timeout` does

    def evaluation(self, report):
        if report.step == self.at_evaluation:
            self.stop.handle(signal.SIGHUP)
        super().evaluation(report)


def test_a_stop_ends_the_run_after_the_step_with_a_checkpoint(one_rank):
    stop, checkpoints = Stop(), MemoryCheckpoints()
    with pytest.raises(Interrupted, match="after step 2 of 5") as error:
        trainer(one_rank(), reporter=Signals(stop, step=2), checkpoints=checkpoints, total=5, stop=stop).run()
    assert [p.step for p in checkpoints.saved] == [2]
    assert error.value.exit_code == 75


def test_a_stop_in_an_evaluation_ends_it_and_the_next_attempt_repeats_it(one_rank):
    """Also at the last step."""
    for at, total in ((2, 5), (4, 4)):
        stop, checkpoints = Stop(), MemoryCheckpoints()
        with pytest.raises(Interrupted, match=f"after step {at} of {total}; a checkpoint was written"):
            trainer(
                one_rank(),
                reporter=Signals(stop, evaluation=at),
                checkpoints=checkpoints,
                total=total,
                stop=stop,
                evaluate_every=2,
                held_out=pairs(4, seed=9),
            ).run()
        assert [p.step for p in checkpoints.saved] == [at]
        for recorded, expected in ((False, [at]), (True, [])):
            reporter, again = RecordingReporter(), MemoryCheckpoints(checkpoints.saved[0])
            trainer(
                one_rank(),
                reporter=reporter,
                checkpoints=again,
                total=total,
                evaluate_every=2,
                held_out=pairs(4, seed=9),
                evaluated=recorded,
            ).run()
            assert [e.step for e in reporter.evaluations] == expected + ([4, 5] if total == 5 else [])


def test_a_stop_at_the_last_step_leaves_the_evaluation_to_the_next_attempt(one_rank):
    stop, checkpoints = Stop(), MemoryCheckpoints()
    with pytest.raises(Interrupted, match="after step 2 of 2"):
        trainer(
            one_rank(),
            reporter=Signals(stop, step=2),
            checkpoints=checkpoints,
            total=2,
            stop=stop,
            held_out=pairs(4),
        ).run()
    assert [p.step for p in checkpoints.saved] == [2]


def test_a_stop_before_the_first_step_has_nothing_to_save(one_rank):
    stop, checkpoints = Stop(), MemoryCheckpoints()
    with pytest.raises(Interrupted, match="nothing to save yet"):
        trainer(
            one_rank(),
            reporter=Signals(stop, evaluation=0),
            checkpoints=checkpoints,
            stop=stop,
            held_out=pairs(4),
        ).run()
    assert not checkpoints.saved


def test_checkpoints_by_time_count_from_the_last_one():
    """Two seconds a step, and one for writing."""
    now, checkpoints = [0.0], MemoryCheckpoints()

    class Slow(MemoryCheckpoints):
        def save(self, progress):
            now[0] += 1.0
            return checkpoints.save(progress)

    plan = SimpleNamespace(
        total_steps=9,
        evaluate_every=None,
        evaluate_at_start=False,
        save_every=None,
        save_after_s=4.0,
        evaluated=True,
    )
    after = AfterSteps(plan, lambda step: None, Slow(), Stop(), clock=lambda: now[0])
    after.begin(Progress())
    for step in range(1, 10):
        now[0] += 2.0
        after.step(Progress(step=step))
    assert [p.step for p in checkpoints.saved] == [2, 4, 6, 8, 9]


def test_the_reference_follows_the_policy_every_n_steps(one_rank):
    cfg = recipe(reference_sync_every=2, reference_sync_alpha=1.0)
    policy, batch = one_rank(cfg), cut_step(pairs(8), Cut(1, 4, None, "padded", 0, "no_sync"))
    gaps = []

    def gap():
        values = policy.token_logprobs(batch), policy.token_logprobs(batch, reference=True)
        return max(float(np.abs(a - b).max()) for a, b in zip(values[0][0], values[1][0], strict=True))

    class Look(RecordingReporter):
        def step(self, report):
            gaps.append(gap())

    trainer(policy, reporter=Look(), total=4).run()
    assert gaps[0] > 1e-3 and gaps[2] > 1e-3
    assert gaps[1] == gaps[3] == 0.0


def test_an_unexpected_number_of_reduced_bytes_is_noted_once(one_rank):
    reporter = RecordingReporter()
    trainer(one_rank(), reporter=reporter, gradient_bytes=1000).run()
    assert len(reporter.notes) == 1 and reporter.notes[0].startswith("warning: the first step reduced")


def test_a_run_on_single_rows_is_the_run_on_short_ones_and_compiles_its_attention_twice(
    one_rank, monkeypatch
):
    """A GPU's cut of ragged pairs: several micro-batches in a step, reference passes and evaluations.

    On a CPU Dynamo's graph runs uncompiled (torch refuses FlexAttention's backward there: patched). That
    proves masks, padding and the number of compilations, not the kernel.
    """
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *tensors: None)
    wide = recipe().model_copy(
        update={"model": Model(tiny=TinyModel(hidden_size=64, layers=2, heads=4, kv_heads=2))}
    )
    torch._dynamo.reset()
    compiled_attention.cache_clear()
    curves = []
    for cut in (
        replace(WHOLE, examples=3),
        replace(WHOLE, examples=3, one_row=True),
        replace(WHOLE, examples=2, layout="packed", one_row=True),
    ):
        policy, reporter = one_rank(wide, cut), RecordingReporter()
        trainer(policy, cut=cut, reporter=reporter, held_out=pairs(5, seed=1), evaluate_every=2).run()
        curves.append((reporter.losses, [e.metrics["eval/loss"] for e in reporter.evaluations]))
    assert compiled_attention().compilations == 2
    for losses, evaluations in curves[1:]:
        assert losses == pytest.approx(curves[0][0], abs=1e-5)
        assert evaluations == pytest.approx(curves[0][1], abs=1e-5)
    assert abs(curves[0][0][-1] - curves[0][0][0]) > 1e-3  # the curve has to move


def two_sources(name: str, **algorithm):
    cfg = recipe(name=name, **algorithm)
    paths = [Source(path="a.jsonl"), Source(path="b.jsonl")]  # pyright: ignore[reportCallIssue]
    return cfg.model_copy(update={"data": cfg.data.model_copy(update={"train": paths, "eval": paths})})


@pytest.mark.parametrize(
    "cut", [Cut(1, 8, None, "padded", 0, "no_sync"), Cut(1, 3, None, "prefix_shared", 0, "no_sync")], ids=str
)
@pytest.mark.parametrize("loss", ["sigmoid", "aot", {"sigmoid": 1.0, "sft": 0.5}], ids=str)
def test_metrics_of_each_source_add_up_to_those_of_all_in_any_cut(one_rank, cut, loss):
    """8 pairs in a step, some of each source; the expected numbers are plain weighted sums."""
    groups = [replace(g, source=i % 3 == 0) for i, g in enumerate(pairs(40))]
    reporter = RecordingReporter()
    trainer(
        one_rank(two_sources("dpo", loss=loss), cut),
        reporter=reporter,
        groups=groups,
        held_out=groups[:6],
        cut=cut,
        sources=("a", "b"),
    ).run()
    reader = batches(groups)
    for step in reporter.steps:
        share = np.mean([g.source for g in reader.at(8 * (step.step - 1))])
        names = [
            "rewards/margins",
            *(["loss"] if loss == "sigmoid" else []),
            *(["rewards/accuracies"] if step.step > 1 else []),
        ]
        for name in names:
            by = [step.metrics[f"{name}/{source}"] for source in ("a", "b")]
            assert (1 - share) * by[0] + share * by[1] == pytest.approx(
                step.metrics[name], rel=1e-5, abs=1e-7
            ), name
        assert ("loss/a" in step.metrics) == (loss == "sigmoid"), (
            "a sorted or token-mean loss has no meaning per pair"
        )
        assert not [name for name in step.metrics if "source" in name]


def test_an_sft_loss_of_each_source_is_a_mean_over_its_tokens(one_rank):
    groups = [replace(g, source=i % 2, branches=g.branches[:1]) for i, g in enumerate(pairs(40))]
    reporter, policy = RecordingReporter(), one_rank(two_sources("sft"))
    trainer(policy, reporter=reporter, groups=groups, sources=("a", "b"), attach=lambda batch: batch).run()
    first = batches(groups).at(0)
    tokens = [sum(g.scored_tokens for g in first if g.source == source) for source in (0, 1)]
    metrics = reporter.steps[0].metrics
    assert (tokens[0] * metrics["loss/a"] + tokens[1] * metrics["loss/b"]) / sum(tokens) == pytest.approx(
        metrics["loss"], rel=1e-5
    )


def test_the_accuracy_is_nan_at_the_first_step_and_in_the_evaluation_before_it(one_rank):
    reporter = RecordingReporter()
    trainer(
        one_rank(),
        reporter=reporter,
        held_out=pairs(6),
        ranking=Ranking("implicit reward", 0.1, starts_at_reference=True),
    ).run()
    assert [bool(np.isnan(s.metrics["rewards/accuracies"])) for s in reporter.steps] == [True, False, False]
    before, after = reporter.evaluations
    for name in ("eval/rewards/accuracies", "eval/preference_accuracy"):
        assert np.isnan(before.metrics[name]) and 0.0 <= after.metrics[name] <= 1.0
    assert before.samples == () and after.samples


def test_a_phase_that_fails_counts_too() -> None:
    clock = Clock()
    with pytest.raises(OutOfMemory), clock.phase("forward_backward"):
        raise OutOfMemory("no room")
    with clock.phase("forward_backward"):
        pass
    assert [name for name, _, _ in clock.spans] == ["forward_backward"] * 2
    seconds = sum(end - start for _, start, end in clock.spans)
    assert clock.phases["forward_backward"] == pytest.approx(seconds)
