"""Online runs on real Ray workers: what they learn, what they write, and what must not change them."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from orchestrator.algorithms.table import build
from orchestrator.cluster.learner_group import LearnerGroup
from orchestrator.cluster.rollout_pool import RolloutPool
from orchestrator.cluster.weight_sync import ObjectStoreSync
from orchestrator.core.batches import Cut
from orchestrator.core.rollouts import RewardedGroup, RolloutGroup, Sampling
from orchestrator.data.micro_batches import cut_step
from orchestrator.data.packing import by_branch
from orchestrator.learner.rank_learner import LearnerSpec
from orchestrator.recipe.loading import load
from orchestrator.recipe.schema import Recipe
from orchestrator.run.inputs import read_prompts
from orchestrator.trainers.experience import sequences
from tests.running import REPOSITORY, Shared, every_line, exported, exported_hash, metrics, shared_ray

pytestmark = pytest.mark.timeout(600)

GSM8K = REPOSITORY / "tests" / "data" / "gsm8k" / "train.jsonl"
SMALL = (
    *(
        "run.max_steps=3",
        "rollouts.prompts=8",
        "batch.effective=64",
        "learners.workers=1",
        "rollouts.workers=1",
    ),
    *("tracking.wandb=off", "evaluation.every=null", "data.eval=null"),
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with shared_ray(tmp_path_factory.mktemp("online")) as shared:
        yield shared


@pytest.fixture(scope="module")
def sft(shared: Shared) -> Path:
    """The SFT policy that all online runs start from: right about a third of the time."""
    outcome, _ = shared.train(
        "tiny/sft",
        "sft",
        "tracking.wandb=off",
        "learners.workers=1",
        "evaluation.every=null",
        "data.eval=null",
    )
    return outcome.export


def total_rewards(folder: Path) -> list[float]:
    return [line["reward/mean"] for line in metrics(folder)]


# ---- learning


@pytest.mark.parametrize(
    "recipe",
    ["grpo", *(pytest.param(name, marks=pytest.mark.slow) for name in ("rloo", "ppo", "online_dpo"))],
)
def test_the_tiny_recipes_raise_the_reward_on_held_out_prompts(
    shared: Shared, sft: Path, recipe: str
) -> None:
    outcome, _ = shared.train_last(f"tiny/{recipe}", sft, recipe, "tracking.wandb=off")
    assert 0.2 < outcome.before["eval/reward/mean"] < 0.6
    assert outcome.after["eval/reward/mean"] >= (
        0.9 if recipe != "online_dpo" else outcome.before["eval/reward/mean"] + 0.3
    )
    rewards = total_rewards(outcome.folder)
    assert np.mean(rewards[-5:]) > np.mean(rewards[:5]) + 0.2


def test_a_run_folder_holds_every_rollout_and_the_timeline(shared: Shared, sft: Path) -> None:
    outcome, console = shared.train_last("tiny/grpo", sft, "folder", *SMALL, "rollouts.workers=2")
    assert "step 3/3" in console
    rollouts = [s for s in every_line(outcome.folder / "samples.jsonl") if s["kind"] == "rollout"]
    assert len(rollouts) == 3 * 8 * 8
    first = rollouts[0]
    assert (
        first["version"] == 0
        and first["finish"] in ("stop", "length")
        and set(first["scores"]) == {"reward", "exact"}
    )
    assert len(first["tokens"]["ids"]) == len(first["tokens"]["scored"]) and len(
        first["tokens"]["logprobs"]
    ) == sum(first["tokens"]["scored"])
    assert [line["policy/staleness"] for line in metrics(outcome.folder)] == [0.0] * 3
    wanted = {
        "reward/mean",
        "reward/std",
        "reward/exact",
        "policy/entropy",
        "policy/clip_fraction",
        "policy/ratio_max",
        "policy/train_rollout_gap",
    }
    wanted |= {
        "completions/mean_length",
        "completions/clipped_ratio",
        "completions/empty_ratio",
        "weights/mb",
        "weights/seconds",
    }
    wanted |= {
        f"time/{n}" for n in ("generate", "score", "learn", "publish", "idle/learners", "idle/rollouts")
    }
    assert wanted <= metrics(outcome.folder)[0].keys()
    events = json.loads((outcome.folder / "trace.json").read_text())["traceEvents"]
    assert {e["name"] for e in events} >= {"generate", "score", "forward_backward", "publish", "rollouts"}
    assert {e["tid"] for e in events} >= {"rollout-0", "rollout-1"}
    assert [p.name for p in sorted((outcome.folder / "logs").glob("rollout-*.log"))] == [
        "rollout-0.log",
        "rollout-1.log",
    ]


OTHERS = ("dr_grpo", "gspo", "cispo", "reinforce_pp", "reinforce_pp_baseline")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dapo", *OTHERS])
def test_every_other_algorithm_takes_its_steps(shared: Shared, sft: Path, name: str) -> None:
    outcome, _ = shared.train_last(
        "tiny/grpo", sft, name, *SMALL, f"algorithm.name={name}", "algorithm.kl.coefficient=0.01"
    )
    lines = metrics(outcome.folder)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert all(np.isfinite(line["grad_norm"]) for line in lines)
    assert lines[-1]["kl"] > 0.0 or name.startswith("reinforce_pp")


@pytest.mark.slow
def test_lora_learns_with_its_base_as_reference(shared: Shared, sft: Path) -> None:
    adapter = (
        "model.lora={rank: 8}",
        "algorithm.kl.coefficient=0.05",
        "learners.zero_stage=3",
        "learners.workers=2",
    )
    outcome, _ = shared.train_last("tiny/grpo", sft, "lora", *SMALL, *adapter)
    lines = metrics(outcome.folder)
    assert lines[0]["kl"] == pytest.approx(0.0, abs=1e-6) and lines[-1]["kl"] > 0.0
    assert lines[0]["weights/mb"] < 0.2
    assert max(line["policy/train_rollout_gap_max"] for line in lines) < 1e-3


@pytest.mark.slow
def test_real_prompts_run_to_the_end(shared: Shared, sft: Path) -> None:
    """A tiny model earns no reward on them: nothing may crash, and the metrics show it."""
    real = (
        f"data.train={GSM8K}",
        "rewards.functions=[{name: math, function: last_number}]",
        "data.max_length=1024",
    )
    outcome, _ = shared.train_last(
        "tiny/grpo", sft, "gsm8k", *SMALL, *real, "rollouts.max_new_tokens=16", "rollouts.prompts=8"
    )
    lines = metrics(outcome.folder)
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert lines[-1]["reward/no_signal_ratio"] == 1.0 and lines[-1]["reward/mean"] == 0.0
    assert lines[-1]["grad_norm"] == pytest.approx(0.0, abs=1e-6)


# ---- what must not change a result


@pytest.mark.slow
def test_a_recorded_run_is_learned_again_to_the_last_bit(shared: Shared, sft: Path) -> None:
    live, _ = shared.train_last("tiny/grpo", sft, "live", *SMALL)
    replay, _ = shared.train_last(
        "tiny/grpo", sft, "replayed", *SMALL, f"rollouts.replay={live.folder / 'samples.jsonl'}"
    )
    assert exported_hash(replay.folder) == exported_hash(live.folder)


@pytest.mark.slow
def test_the_learners_cut_does_not_change_an_online_run(shared: Shared, sft: Path) -> None:
    whole, _ = shared.train_last("tiny/grpo", sft, "one", *SMALL)
    cut, _ = shared.train_last(
        "tiny/grpo", sft, "two", *SMALL, "learners.workers=2", "learners.zero_stage=3", "batch.micro_batch=16"
    )
    for name, weight in exported(whole.folder).items():
        assert np.abs(exported(cut.folder)[name] - weight).max() < 1e-4, name


@pytest.fixture(scope="module")
def policy(shared: Shared, sft: Path) -> Iterator[tuple[Recipe, LearnerGroup]]:
    recipe = last_stage(sft)
    with LearnerGroup(recipe.learners) as group:
        group.build(LearnerSpec(recipe, CUT, 1))
        yield recipe, group


CUT = Cut(1, 8, None, "prefix_shared", 0, "no_sync")


def last_stage(sft: Path, **rollouts: object) -> Recipe:
    recipe = (
        load("tiny/grpo", ["grpo:learners.workers=1", "grpo:learners.cpus_per_worker=0.3"]).stages[-1].recipe
    )
    model = recipe.model.model_copy(update={"path": str(sft)})
    return recipe.model_copy(
        update={
            "model": model,
            "rollouts": recipe.rollouts.model_copy(update={"cpus_per_worker": 0.3, **rollouts}),
        }
    )


def rolled_out(
    policy: tuple[Recipe, LearnerGroup], sft: Path, workers: int, rows: int
) -> tuple[RolloutGroup, ...]:
    recipe = last_stage(sft, workers=workers, rows_at_once=rows)
    prompts = read_prompts(recipe, build(recipe.algorithm, recipe.rollouts)).batches.at(0)
    with RolloutPool(recipe) as pool:
        ObjectStoreSync(policy[1], pool, 100_000).publish(0)
        return pool.start(list(enumerate(prompts)), Sampling(8, 8, seed=3), 0).result()


def test_rollouts_do_not_depend_on_the_number_of_actors(
    policy: tuple[Recipe, LearnerGroup], sft: Path
) -> None:
    """The same tokens with 1, 2 and 3 actors and with other numbers of rows; log-probs within 1e-5."""
    first, second, third = (
        rolled_out(policy, sft, workers, rows) for workers, rows in ((1, 64), (2, 64), (3, 24))
    )
    assert len({tuple(r.ids) for g in first for r in g.rollouts}) > 20
    for a, b, c in zip(first, second, third, strict=True):
        for x, y, z in zip(a.rollouts, b.rollouts, c.rollouts, strict=True):
            assert x.ids.tolist() == y.ids.tolist() == z.ids.tolist()
            assert max(np.abs(x.logprobs - y.logprobs).max(), np.abs(x.logprobs - z.logprobs).max()) < 1e-5


def test_the_generators_log_probs_are_the_learners(policy: tuple[Recipe, LearnerGroup], sft: Path) -> None:
    groups = rolled_out(policy, sft, 1, 64)
    batch = cut_step(
        sequences([RewardedGroup(g, np.zeros(8, np.float32)) for g in groups], mask_truncated=False), CUT
    )
    values = policy[1].token_logprobs(batch)
    checked = 0
    for micro_batch, part in zip(batch.micro_batches[0], values[0], strict=True):
        for group, branches in zip(micro_batch.examples, by_branch(micro_batch, part), strict=True):
            for rollout, learned in zip(groups[group].rollouts, branches, strict=True):
                assert np.abs(rollout.logprobs - learned).max() < 1e-4
                checked += len(learned)
    assert checked > 1000
