"""The online loop with a real learner, scripted generator and scorer: cursors, versions, batches, rewards."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from orchestrator.algorithms.table import build
from orchestrator.core.batches import SequenceGroup
from orchestrator.core.errors import OrchestratorError
from orchestrator.core.reports import Progress
from orchestrator.core.rollouts import (
    BatchRewards,
    Prompt,
    RewardedGroup,
    Rollout,
    RolloutGroup,
    Sampling,
    Span,
    WeightsDelivered,
)
from orchestrator.core.stopping import Stop
from orchestrator.data.order import Batches, Order
from orchestrator.observe.timeline import Timeline
from orchestrator.recipe.schema import ONLINE, AlgorithmConfig, Correction, Evaluation, Kl, Rollouts
from orchestrator.trainers.online import OnlinePlan, OnlineTrainer, TrainedRoles
from orchestrator.trainers.online_evaluation import RolloutEvaluator
from orchestrator.trainers.optimizer_step import Guards, OptimizerStepper
from tests.unit.trainers.conftest import WHOLE, MemoryCheckpoints, OneRank, RecordingReporter, recipe

SAMPLES, PROMPTS = 4, 3


@dataclass
class Scripted:
    """roles.Generator, Scorer and WeightSync. Completions are random tokens."""

    rewards: Callable[[int], Sequence[float]]
    """Rewards of a draw's samples."""
    age: int = 0
    """Versions by which rollouts are older than requested."""
    dropped: set[int] = field(default_factory=set)
    """Draws without a reward."""
    asked: list[tuple[list[int], int]] = field(default_factory=list)
    """(draws, version) of each start."""
    published: list[int] = field(default_factory=list)

    def start(self, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling, version: int) -> Any:
        self.asked.append(([draw for draw, _ in prompts], version))
        groups = tuple(
            RolloutGroup(p, draw, tuple(self.rollout(draw, k, version) for k in range(sampling.samples)))
            for draw, p in prompts
        )
        return type("Done", (), {"result": lambda _: groups})()

    def rollout(self, draw: int, sample: int, version: int) -> Rollout:
        draw_from = np.random.default_rng([abs(draw), sample])
        ids = draw_from.integers(0, 256, int(draw_from.integers(2, 7)))
        scored = np.ones(len(ids), np.bool_)
        return Rollout(
            sample,
            version - self.age,
            ids,
            scored,
            np.full(len(ids), -5.5, np.float32),
            "length" if sample == 0 else "stop",
            "text",
        )

    def score(self, groups: Sequence[RolloutGroup]) -> BatchRewards:
        remaining = [g for g in groups if g.draw not in self.dropped]
        rewards = [np.array(self.rewards(g.draw), np.float32) for g in remaining]
        rewarded = tuple(
            RewardedGroup(g, values, {"made": values}) for g, values in zip(remaining, rewards, strict=True)
        )
        return BatchRewards(rewarded, tuple(f"draw {g.draw}: no" for g in groups if g.draw in self.dropped))

    def spans(self) -> list[Span]:
        return []

    def publish(self, version: int) -> WeightsDelivered:
        self.published.append(version)
        return WeightsDelivered(version, 0, 0.0, 0, "none")


def uneven(draw: int) -> list[float]:
    return [float((draw + k) % 2) for k in range(SAMPLES)]


def run(
    one_rank: Callable[..., OneRank],
    tmp_path: Path,
    script: Scripted,
    *,
    reporter: RecordingReporter | None = None,
    checkpoints: MemoryCheckpoints | None = None,
    **changes: Any,
):
    """(progress, policy) after a loop over six prompts.

    changes: fields of the plan, or the algorithm's `name` and keys, or a `stepper` class.
    """
    name, stepper = changes.pop("name", "grpo"), changes.pop("stepper", OptimizerStepper)
    cfg = recipe(name=name, **changes.pop("algorithm", {})).model_copy(
        update={"rollouts": Rollouts(samples=SAMPLES, prompts=PROMPTS)}
    )
    policy = one_rank(cfg)
    plan = OnlinePlan(
        **{
            "algorithm": build(cfg.algorithm, cfg.rollouts),
            "seed": 0,
            "total_steps": 2,
            "mini_batch": PROMPTS,
            "epochs": 1,
            "optimizer_steps": 1,
            "sampling": Sampling(SAMPLES, 8),
            "dropout": False,
            "max_staleness": 0,
            "max_resampled": 2,
            "mask_truncated": False,
            "kl": Kl(),
            "gap_warning": 1e9,
            "normalise_rewards": False,
            "critic_warmup": 0,
            "evaluate_every": None,
            "evaluate_at_start": False,
            "save_every": None,
            **changes,
        }
    )
    prompts = [Prompt(i, f"rows:{i}", 0, np.arange(1, 3 + i), f"p{i}", {"answer": "a"}) for i in range(6)]
    reporter = reporter or RecordingReporter()
    attach = policy.with_live_reference if name == "online_dpo" else lambda batch: batch
    trainer = OnlineTrainer(
        plan=plan,
        learning=TrainedRoles(stepper(plan.algorithm, policy, WHOLE, attach, reporter, Guards())),
        prompts=Batches(prompts, Order([6], [1.0], 0), PROMPTS, "carry"),
        generator=script,
        scorer=script,
        weights=script,
        evaluator=RolloutEvaluator((), Evaluation(), plan.sampling, script, script),
        report=reporter,
        checkpoints=checkpoints or MemoryCheckpoints(),
        timeline=Timeline(tmp_path / "trace.json"),
        stop=Stop(),
    )
    return trainer.run(), policy


def watching(steps: list[tuple[SequenceGroup, ...]]) -> type[OptimizerStepper]:
    """A stepper class that adds the groups of each step to `steps`."""

    class Watching(OptimizerStepper):
        def step(
            self,
            groups: Sequence[SequenceGroup],
            step: int,
            clock: Any,
            *,
            kl_coefficient: float | None = None,
        ) -> Any:
            steps.append(tuple(groups))
            return super().step(groups, step, clock, kl_coefficient=kl_coefficient)

    return Watching


def test_versions_cursors_and_reports(one_rank, tmp_path):
    script, reporter, checkpoints = Scripted(uneven), RecordingReporter(), MemoryCheckpoints()
    end, _ = run(one_rank, tmp_path, script, reporter=reporter, checkpoints=checkpoints)
    assert script.asked == [([0, 1, 2], 0), ([3, 4, 5], 1)]
    assert script.published == [0, 1, 2]
    assert (end.step, end.examples, end.optimizer_steps, end.skipped) == (2, 6, 2, 0)
    assert checkpoints.saved == [end]
    assert [s.step for s in reporter.steps] == [1, 2] and all(
        s.metrics["reward/mean"] == 0.5 for s in reporter.steps
    )
    assert len(reporter.steps[0].samples) == PROMPTS * SAMPLES
    assert reporter.steps[0].metrics["completions/clipped_ratio"] == 0.25


def test_one_ahead_starts_the_next_batch_before_it_learns(one_rank, tmp_path):
    script, reporter = Scripted(uneven), RecordingReporter()
    run(one_rank, tmp_path, script, reporter=reporter, max_staleness=1, total_steps=3)
    assert [version for _, version in script.asked] == [0, 0, 1]
    assert [s.metrics["policy/staleness"] for s in reporter.steps] == [0.0, 1.0, 1.0]


def test_a_resume_samples_what_was_in_flight_again(one_rank, tmp_path):
    script = Scripted(uneven)
    run(
        one_rank,
        tmp_path,
        script,
        checkpoints=MemoryCheckpoints(start=Progress(step=1, examples=3, optimizer_steps=1)),
        max_staleness=1,
        total_steps=3,
    )
    assert script.asked[0] == ([3, 4, 5], 1), "from the cursor of consumed prompts, not of started ones"


def test_a_rollout_that_is_too_old_ends_the_run(one_rank, tmp_path):
    with pytest.raises(OrchestratorError, match="version -1 reached the learner at version 0"):
        run(one_rank, tmp_path, Scripted(uneven, age=1))


def test_several_passes_and_mini_batches_count_optimizer_steps(one_rank, tmp_path):
    reporter = RecordingReporter()
    end, _ = run(
        one_rank, tmp_path, Scripted(uneven), reporter=reporter, epochs=2, mini_batch=2, optimizer_steps=4
    )
    assert end.optimizer_steps == 2 * 2 * 2
    assert reporter.steps[0].metrics["policy/ratio_max"] > 1.0, "the policy has changed in the second pass"


def test_a_dropped_group_is_named_and_the_rest_is_learned_from(one_rank, tmp_path):
    reporter = RecordingReporter()
    end, _ = run(one_rank, tmp_path, Scripted(uneven, dropped={1}), reporter=reporter)
    assert (
        reporter.steps[0].metrics["reward/dropped_groups"] == 1.0
        and len(reporter.steps[0].samples) == 2 * SAMPLES
    )
    assert end.examples == 6 and "draw 1: no" in reporter.notes[0]


def test_dynamic_sampling_replaces_groups_without_signal_and_consumes_what_it_drew(one_rank, tmp_path):
    script = Scripted(lambda draw: uneven(draw) if draw % 3 else [1.0] * SAMPLES)
    end, _ = run(one_rank, tmp_path, script, name="dapo", total_steps=1)
    assert [draws for draws, _ in script.asked] == [[0, 1, 2], [3, 4, 5]], (
        "two of the first three groups have a signal, so three more are drawn"
    )
    assert end.examples == 6


@pytest.mark.parametrize("teaching", [1, 2])
def test_a_starving_step_is_filled_up_to_its_effective_batch(one_rank, tmp_path, teaching):
    """One or two groups of nine teach: the step still has three groups and the same normaliser, and reports
    how many taught."""
    reporter, static = RecordingReporter(), RecordingReporter()
    script = Scripted(lambda draw: uneven(draw) if draw < teaching else [1.0] * SAMPLES)
    end, _ = run(one_rank, tmp_path, script, name="dapo", total_steps=1, reporter=reporter)
    assert len(script.asked) == 3 and end.optimizer_steps == 1
    metrics = reporter.steps[0].metrics
    assert (
        metrics["reward/groups_wanted"],
        metrics["reward/groups_learned"],
        metrics["reward/groups_with_signal"],
    ) == (3, 3, teaching)
    assert any(f"{teaching} of 3 groups" in note and "max_resampled" in note for note in reporter.notes)
    run(
        one_rank,
        tmp_path,
        Scripted(script.rewards),
        name="grpo",
        algorithm={"normaliser": "token"},
        total_steps=1,
        reporter=static,
    )
    assert metrics["grad_norm"] == pytest.approx(static.steps[0].metrics["grad_norm"], rel=1e-5), (
        "the same groups without dynamic sampling"
    )


def test_without_any_signal_no_step_is_taken(one_rank, tmp_path):
    reporter, script = RecordingReporter(), Scripted(lambda draw: [1.0] * SAMPLES)
    end, _ = run(one_rank, tmp_path, script, name="dapo", total_steps=1, reporter=reporter)
    assert len(script.asked) == 3 and end.step == 1 and end.examples == 9
    assert end.optimizer_steps == 0 and "loss" not in reporter.steps[0].metrics, (
        "a step would move the weights by AdamW's moments and weight decay"
    )
    assert (
        reporter.steps[0].metrics["reward/no_signal_ratio"] == 1.0
        and reporter.steps[0].metrics["reward/groups_learned"] == 0.0
    )
    assert any("no optimizer step is taken" in note for note in reporter.notes)


def test_running_rewards_follow_numpy(one_rank, tmp_path):
    end, _ = run(
        one_rank,
        tmp_path,
        Scripted(lambda draw: [draw + 0.5 * k for k in range(SAMPLES)]),
        normalise_rewards=True,
    )
    rewards = np.array([draw + 0.5 * k for draw in range(6) for k in range(SAMPLES)])
    assert (end.reward_count, end.reward_mean) == (24, pytest.approx(rewards.mean()))
    assert end.reward_m2 == pytest.approx(((rewards - rewards.mean()) ** 2).sum())


def test_online_dpo_learns_from_the_best_and_the_worst(one_rank, tmp_path):
    reporter, steps = RecordingReporter(), []
    script = Scripted(lambda draw: [1.0, 0.0, 3.0, 2.0] if draw % 2 else [1.0] * SAMPLES)
    run(
        one_rank,
        tmp_path,
        script,
        name="online_dpo",
        reporter=reporter,
        stepper=watching(steps),
        total_steps=1,
    )
    assert reporter.losses[0] == pytest.approx(np.log(2.0), abs=1e-5)
    assert np.isnan(reporter.steps[0].metrics["rewards/accuracies"]), (
        "policy == reference: the one pair is a tie, whatever its rounding"
    )
    ((pair,),) = steps
    assert [branch.ids.tolist() for branch in pair.branches] == [
        script.rollout(1, sample, 0).ids.tolist() for sample in (2, 1)
    ], "of draw 1: the sample of reward 3, then that of reward 0"


def test_a_gap_above_the_alarm_is_noted(one_rank, tmp_path):
    reporter = RecordingReporter()
    run(one_rank, tmp_path, Scripted(uneven), reporter=reporter, gap_warning=1e-6, total_steps=1)
    gap = reporter.steps[0].metrics["policy/train_rollout_gap"]
    assert gap > 1e-6 and any(f"{gap:.3f} nat" in note for note in reporter.notes)


def test_truncated_completions_can_be_left_out(one_rank, tmp_path):
    """On policy a sequence's loss is -A / 12. A group's rewards are two zeros and two ones: its advantages
    are -a and a and add up to 0. Sample 0 of each group is truncated, with the rewards 0, 1, 0."""
    plain, masked = RecordingReporter(), RecordingReporter()
    uncorrected: Any = {"algorithm": {"correction": Correction(kind="none")}, "total_steps": 1}
    run(one_rank, tmp_path, Scripted(uneven), reporter=plain, **uncorrected)
    run(one_rank, tmp_path, Scripted(uneven), reporter=masked, mask_truncated=True, **uncorrected)
    a = 0.5 / (np.sqrt(1.0 / 3.0) + 1e-4)
    assert plain.losses[0] == pytest.approx(0.0, abs=1e-6)
    assert masked.losses[0] == pytest.approx((-a + a - a) / (PROMPTS * SAMPLES), rel=1e-5)
    assert masked.steps[0].metrics["completions/clipped_ratio"] == 0.25


def test_if_all_completions_are_masked_no_metric_of_tokens_is_reported(one_rank, tmp_path):
    """No tokens, no means: an unknown metric is left out, never nan."""
    reporter = RecordingReporter()

    class Cut(Scripted):
        def start(self, prompts: Any, sampling: Any, version: int) -> Any:
            pending = super().start(prompts, sampling, version)
            groups = tuple(
                replace(g, rollouts=tuple(replace(r, finish="length") for r in g.rollouts))
                for g in pending.result()
            )
            return SimpleNamespace(result=lambda: groups)

    kl = Kl(coefficient=0.1)
    end, _ = run(
        one_rank,
        tmp_path,
        Cut(uneven),
        reporter=reporter,
        kl=kl,
        algorithm={"kl": kl},
        total_steps=1,
        mask_truncated=True,
    )
    metrics = reporter.steps[0].metrics
    assert end.step == 1 and metrics["completions/clipped_ratio"] == 1.0
    assert metrics["loss"] == metrics["grad_norm"] == 0.0
    assert "kl" not in metrics and "policy/entropy" not in metrics
    assert all(np.isfinite(value) for value in metrics.values())


def test_mini_batches_are_every_group_once_a_pass(one_rank, tmp_path):
    steps: list[tuple[SequenceGroup, ...]] = []
    run(
        one_rank,
        tmp_path,
        Scripted(uneven),
        stepper=watching(steps),
        epochs=2,
        mini_batch=2,
        optimizer_steps=4,
        total_steps=1,
    )
    first, second = [*steps[0], *steps[1]], [*steps[2], *steps[3]]
    assert sorted(g.id for g in first) == sorted(g.id for g in second) == [0, 1, 2]


@pytest.mark.parametrize("name", [name for name in ONLINE if name not in ("ppo", "online_dpo")])
def test_every_policy_gradient_takes_its_steps(one_rank, tmp_path, name):
    reporter = RecordingReporter()
    kl = Kl(coefficient=0.01)
    end, _ = run(
        one_rank,
        tmp_path,
        Scripted(uneven),
        name=name,
        algorithm={"kl": kl, "entropy_bonus": 0.01},
        kl=kl,
        reporter=reporter,
    )
    assert end.optimizer_steps == 2
    first, second = (s.metrics for s in reporter.steps)
    assert first["kl"] == pytest.approx(0.0, abs=1e-6) and second["kl"] > 0.0
    assert all(np.isfinite(m["grad_norm"]) and m["grad_norm"] > 0.0 for m in (first, second))


def test_the_samples_of_a_prompt_are_branches_and_each_counts_in_the_batch():
    grpo, online_dpo = (
        build(AlgorithmConfig(name=name), Rollouts(samples=5)) for name in ("grpo", "online_dpo")
    )
    assert (grpo.branches, grpo.group_examples) == (5, 5)
    assert (online_dpo.branches, online_dpo.group_examples) == (2, 1), "a pair of the best and the worst"
