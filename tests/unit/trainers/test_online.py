"""The online loop with a real learner, a scripted generator and a scripted scorer: cursors, versions,
batches, rewards."""

from collections import deque
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
from orchestrator.recipe.schema import ONLINE, AlgorithmConfig, Evaluation, Kl, Rollouts
from orchestrator.trainers.online import OnlinePlan, OnlineTrainer, TrainedRoles
from orchestrator.trainers.online_evaluation import RolloutEvaluator
from orchestrator.trainers.optimizer_step import Guards, OptimizerStepper
from tests.unit.trainers.conftest import WHOLE, Kept, OneRank, Said, recipe

SAMPLES, PROMPTS = 4, 3


@dataclass
class Scripted:
    """roles.Generator, Scorer and WeightBridge: completions are random tokens, rewards come from a function
    of the draw.

    age: versions that rollouts claim to be older than they are asked for; asked: (draws, version) of each
    start.
    """

    rewards: Callable[[int], Sequence[float]]
    age: int = 0
    dropped: set[int] = field(default_factory=set)
    asked: list[tuple[list[int], int]] = field(default_factory=list)
    published: list[int] = field(default_factory=list)

    def start(self, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling, version: int) -> Any:
        self.asked.append(([draw for draw, _ in prompts], version))
        groups = tuple(
            RolloutGroup(p, draw, tuple(self._rollout(draw, k, version) for k in range(sampling.samples)))
            for draw, p in prompts
        )
        return type("Done", (), {"result": lambda _: groups})()

    def _rollout(self, draw: int, sample: int, version: int) -> Rollout:
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
        kept = [g for g in groups if g.draw not in self.dropped]
        found = (np.array(self.rewards(g.draw), np.float32) for g in kept)
        scored = tuple(
            RewardedGroup(g, rewards, {"made": rewards}) for g, rewards in zip(kept, found, strict=True)
        )
        return BatchRewards(scored, tuple(f"draw {g.draw}: no" for g in groups if g.draw in self.dropped))

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
    said: Said | None = None,
    kept: Kept | None = None,
    **changes: Any,
):
    """(end, policy) of a loop over six prompts. changes: of the plan, and the algorithm's `name`, a `stepper`
    class."""
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
            "alarm": 1e9,
            "normalise_rewards": False,
            "critic_warmup": 0,
            "evaluate_every": None,
            "evaluate_at_start": False,
            "save_every": None,
            **changes,
        }
    )
    prompts = [Prompt(i, f"rows:{i}", 0, np.arange(1, 3 + i), f"p{i}", {"answer": "a"}) for i in range(6)]
    said = said or Said()
    attach = policy.with_live_reference if name == "online_dpo" else lambda batch: batch
    trainer = OnlineTrainer(
        plan=plan,
        learning=TrainedRoles(stepper(plan.algorithm, policy, WHOLE, attach, said, Guards())),
        prompts=Batches(prompts, Order([6], [1.0], 0), PROMPTS, "carry"),
        generator=script,
        scorer=script,
        weights=script,
        evaluator=RolloutEvaluator((), Evaluation(), plan.sampling, script, script),
        report=said,
        checkpoints=kept or Kept(),
        timeline=Timeline(tmp_path / "trace.json"),
        stop=Stop(),
    )
    return trainer.run(), policy


def test_versions_cursors_and_reports(one_rank, tmp_path):
    script, said, kept = Scripted(uneven), Said(), Kept()
    end, _ = run(one_rank, tmp_path, script, said=said, kept=kept)
    assert script.asked == [([0, 1, 2], 0), ([3, 4, 5], 1)]
    assert script.published == [0, 1, 2]
    assert (end.step, end.examples, end.optimizer_steps, end.skipped) == (2, 6, 2, 0)
    assert kept.saved == [end]
    assert [s.step for s in said.steps] == [1, 2] and all(s.metrics["reward/mean"] == 0.5 for s in said.steps)
    assert len(said.steps[0].samples) == PROMPTS * SAMPLES
    assert said.steps[0].metrics["completions/clipped_ratio"] == 0.25


def test_one_ahead_starts_the_next_batch_before_it_learns(one_rank, tmp_path):
    script, said = Scripted(uneven), Said()
    run(one_rank, tmp_path, script, said=said, max_staleness=1, total_steps=3)
    assert [version for _, version in script.asked] == [0, 0, 1]
    assert [s.metrics["policy/staleness"] for s in said.steps] == [0.0, 1.0, 1.0]


def test_a_resume_samples_what_was_in_flight_again(one_rank, tmp_path):
    script = Scripted(uneven)
    run(
        one_rank,
        tmp_path,
        script,
        kept=Kept(start=Progress(step=1, examples=3, optimizer_steps=1)),
        max_staleness=1,
        total_steps=3,
    )
    assert script.asked[0] == ([3, 4, 5], 1), "the consumed cursor, not what had been started"


def test_a_rollout_that_is_too_old_ends_the_run(one_rank, tmp_path):
    with pytest.raises(OrchestratorError, match="version -1 reached the learner at version 0"):
        run(one_rank, tmp_path, Scripted(uneven, age=1))


def test_several_passes_and_mini_batches_count_optimizer_steps(one_rank, tmp_path):
    said = Said()
    end, _ = run(one_rank, tmp_path, Scripted(uneven), said=said, epochs=2, mini_batch=2, optimizer_steps=4)
    assert end.optimizer_steps == 2 * 2 * 2
    assert said.steps[0].metrics["policy/ratio_max"] > 1.0, "the second pass is off the policy that sampled"


def test_a_dropped_group_is_named_and_the_rest_is_learned_from(one_rank, tmp_path):
    said = Said()
    end, _ = run(one_rank, tmp_path, Scripted(uneven, dropped={1}), said=said)
    assert said.steps[0].metrics["reward/dropped_groups"] == 1.0 and len(said.steps[0].samples) == 2 * SAMPLES
    assert end.examples == 6 and "draw 1: no" in said.notes[0]


def test_dynamic_sampling_replaces_groups_without_signal_and_consumes_what_it_drew(one_rank, tmp_path):
    script = Scripted(lambda draw: uneven(draw) if draw % 3 else [1.0] * SAMPLES)
    end, _ = run(one_rank, tmp_path, script, name="dapo", total_steps=1)
    assert [draws for draws, _ in script.asked] == [[0, 1, 2], [3, 4, 5]], (
        "two of the first three teach, so three more are drawn"
    )
    assert end.examples == 6


@pytest.mark.parametrize("teaching", [1, 2])
def test_a_starving_step_is_filled_up_to_its_effective_batch(one_rank, tmp_path, teaching):
    """One or two groups of nine teach: the step is still one of three groups, with the same normaliser, and
    says what it learned from."""
    said, whole, script = (
        Said(),
        Said(),
        Scripted(lambda draw: uneven(draw) if draw < teaching else [1.0] * SAMPLES),
    )
    end, _ = run(one_rank, tmp_path, script, name="dapo", total_steps=1, said=said)
    assert len(script.asked) == 3 and end.optimizer_steps == 1
    metrics = said.steps[0].metrics
    assert (
        metrics["reward/groups_wanted"],
        metrics["reward/groups_learned"],
        metrics["reward/groups_with_signal"],
    ) == (3, 3, teaching)
    assert any(f"found {teaching} of the 3 groups" in note and "fill it up" in note for note in said.notes)
    run(
        one_rank,
        tmp_path,
        Scripted(script.rewards),
        name="grpo",
        algorithm={"normaliser": "token"},
        total_steps=1,
        said=whole,
    )
    assert metrics["grad_norm"] == pytest.approx(whole.steps[0].metrics["grad_norm"], rel=1e-5), (
        "as the same groups without dynamic sampling"
    )


def test_without_any_signal_no_step_is_taken(one_rank, tmp_path):
    said, script = Said(), Scripted(lambda draw: [1.0] * SAMPLES)
    end, _ = run(one_rank, tmp_path, script, name="dapo", total_steps=1, said=said)
    assert len(script.asked) == 3 and end.step == 1 and end.examples == 9
    assert end.optimizer_steps == 0 and "loss" not in said.steps[0].metrics, (
        "AdamW's moments and weight decay would move the weights all the same"
    )
    assert (
        said.steps[0].metrics["reward/no_signal_ratio"] == 1.0
        and said.steps[0].metrics["reward/groups_learned"] == 0.0
    )
    assert any("no optimizer step is taken" in note for note in said.notes)


def test_running_rewards_follow_numpy(one_rank, tmp_path):
    end, _ = run(
        one_rank,
        tmp_path,
        Scripted(lambda draw: [draw + 0.5 * k for k in range(SAMPLES)]),
        normalise_rewards=True,
    )
    seen = np.array([draw + 0.5 * k for draw in range(6) for k in range(SAMPLES)])
    assert (end.reward_count, end.reward_mean) == (24, pytest.approx(seen.mean()))
    assert end.reward_m2 == pytest.approx(((seen - seen.mean()) ** 2).sum())


def test_online_dpo_learns_from_the_best_and_the_worst(one_rank, tmp_path):
    said = Said()
    script = Scripted(lambda draw: [1.0, 0.0, 3.0, 2.0] if draw % 2 else [1.0] * SAMPLES)
    run(one_rank, tmp_path, script, name="online_dpo", said=said, total_steps=1)
    assert said.losses[0] == pytest.approx(np.log(2.0), abs=1e-5)
    assert np.isnan(said.steps[0].metrics["rewards/accuracies"]), (
        "policy == reference: whatever the rounding of the one pair, nothing is known"
    )


def test_the_alarm_names_a_gap(one_rank, tmp_path):
    said = Said()
    run(one_rank, tmp_path, Scripted(uneven), said=said, alarm=1e-6, total_steps=1)
    assert any("nat per token from the learner's" in note for note in said.notes)


def test_truncated_completions_can_be_left_out(one_rank, tmp_path):
    plain, masked = Said(), Said()
    run(one_rank, tmp_path, Scripted(uneven), said=plain, total_steps=1)
    run(one_rank, tmp_path, Scripted(uneven), said=masked, total_steps=1, mask_truncated=True)
    assert plain.losses != masked.losses
    assert masked.steps[0].metrics["completions/clipped_ratio"] == 0.25


def test_where_all_completions_are_masked_nothing_is_said_of_tokens(one_rank, tmp_path):
    """No tokens, no means: a metric that nobody knows is left out, never nan."""
    said = Said()

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
        said=said,
        kl=kl,
        algorithm={"kl": kl},
        total_steps=1,
        mask_truncated=True,
    )
    found = said.steps[0].metrics
    assert (
        end.step == 1
        and found["completions/clipped_ratio"] == 1.0
        and found["loss"] == found["grad_norm"] == 0.0
    )
    assert "kl" not in found and "policy/entropy" not in found
    assert all(np.isfinite(value) for value in found.values())


def test_mini_batches_are_every_group_once_a_pass(one_rank, tmp_path):
    taken: deque[tuple[int, ...]] = deque()

    class Watching(OptimizerStepper):
        def step(
            self,
            groups: Sequence[SequenceGroup],
            step: int,
            clock: Any,
            *,
            kl_coefficient: float | None = None,
        ) -> Any:
            taken.append(tuple(g.id for g in groups))
            return super().step(groups, step, clock, kl_coefficient=kl_coefficient)

    run(
        one_rank,
        tmp_path,
        Scripted(uneven),
        stepper=Watching,
        epochs=2,
        mini_batch=2,
        optimizer_steps=4,
        total_steps=1,
    )
    first, second = [*taken[0], *taken[1]], [*taken[2], *taken[3]]
    assert sorted(first) == sorted(second) == [0, 1, 2]


@pytest.mark.parametrize("name", [name for name in ONLINE if name not in ("ppo", "online_dpo")])
def test_every_policy_gradient_takes_its_steps(one_rank, tmp_path, name):
    said = Said()
    kl = Kl(coefficient=0.01)
    end, _ = run(
        one_rank,
        tmp_path,
        Scripted(uneven),
        name=name,
        algorithm={"kl": kl, "entropy_bonus": 0.01},
        kl=kl,
        said=said,
    )
    assert end.optimizer_steps == 2
    first, second = (s.metrics for s in said.steps)
    assert first["kl"] == pytest.approx(0.0, abs=1e-6) and second["kl"] > 0.0
    assert all(np.isfinite(m["grad_norm"]) and m["grad_norm"] > 0.0 for m in (first, second))


def test_algorithm_names_need_their_samples():
    assert build(AlgorithmConfig(name="grpo"), Rollouts(samples=5)).branches == 5
