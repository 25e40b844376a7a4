"""Online runs that were disturbed end with the weights of one that was not. Rollouts are never too old."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from orchestrator.recipe.loading import dump, load
from tests.running import Shared, every_line, exported_hash, metrics, planned_faults, shared_ray, steps

pytestmark = pytest.mark.timeout(600)

STEPS = 4
RUN = (
    f"run.max_steps={STEPS}",
    "rollouts.prompts=16",
    "rollouts.samples=2",
    "rollouts.workers=2",
    "rollouts.cpus_per_worker=0.25",
    "critic.cpus_per_worker=0.25",
    "batch.effective=16",
    "checkpoint.every=2",
    "rewards.normalise=running",
    "evaluation.every=null",
    "data.eval=null",
    "tracking.wandb=off",
)
"""PPO with all kinds of state: critic, warm-up, KL controller, running reward moments, two epochs of two
mini-batches."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with shared_ray(tmp_path_factory.mktemp("online-resume")) as shared:
        yield shared


@pytest.fixture(scope="module")
def sft(shared: Shared) -> Path:
    small = ("learners.workers=1", "tracking.wandb=off", "evaluation.every=null", "data.eval=null")
    return shared.train("tiny/sft", "sft", *small)[0].export


@pytest.fixture(scope="module")
def undisturbed(shared: Shared, sft: Path) -> Path:
    outcome, _ = shared.train_last("tiny/ppo", sft, "undisturbed", *RUN)
    assert steps(outcome.folder) == list(range(1, STEPS + 1))
    return outcome.folder


def check_equal(folder: Path, undisturbed: Path) -> None:
    assert steps(folder) == list(range(1, STEPS + 1))
    assert exported_hash(folder) == exported_hash(undisturbed)
    for mine, theirs in zip(metrics(folder), metrics(undisturbed), strict=True):
        for name in ("loss", "reward/mean", "kl_coefficient", "value/loss", "optimizer_steps"):
            assert mine.get(name) == theirs.get(name), (
                mine["step"],
                name,
            )  # no policy loss while the critic warms up


def test_a_killed_rollout_actor_changes_nothing(
    shared: Shared, sft: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """It is replaced, and its prompts are sampled again from the same seeds."""
    fault = {"site": "roll_out", "action": "kill", "step": 2, "rank": 1, "once": str(tmp_path / "killed")}
    with planned_faults(fault):
        outcome, _ = shared.train_last("tiny/ppo", sft, "actor", *RUN)
    assert (tmp_path / "killed").exists()
    check_equal(outcome.folder, undisturbed)


@pytest.mark.slow
def test_a_killed_learner_restarts_the_run_from_its_checkpoint(
    shared: Shared, sft: Path, undisturbed: Path, tmp_path: Path
) -> None:
    """Policy and critic alike. All rollouts that were in flight are sampled again."""
    fault = {"site": "micro_batch", "action": "kill", "step": 13, "once": str(tmp_path / "killed")}
    with planned_faults(fault):
        outcome, said = shared.train_last("tiny/ppo", sft, "learner", *RUN)
    assert (tmp_path / "killed").exists() and "restart 1 of 3" in said
    check_equal(outcome.folder, undisturbed)


@pytest.mark.slow
def test_a_killed_driver_continues_by_the_same_command(shared: Shared, sft: Path, undisturbed: Path) -> None:
    """Killed between two checkpoints, in its own process."""
    recipe = shared.root / "driver.yaml"
    overrides = [f"ppo:{o}" for o in (*RUN, *shared.overrides())]
    last = load("tiny/ppo", overrides).stages[-1].recipe
    recipe.write_text(
        dump(last.model_copy(update={"model": last.model.model_copy(update={"path": str(sft)})}))
    )
    fault = {"site": "checkpoint.written", "step": STEPS, "action": "kill"}
    finished = shared.sandbox.run("train", recipe, "--output", shared.root / "driver", faults=[fault])
    assert finished.code == -9, finished.err
    finished = shared.sandbox.run("train", recipe, "--output", shared.root / "driver")
    assert finished.code == 0, finished.err
    check_equal(shared.root / "driver", undisturbed)


# age of rollouts


AHEAD = (
    "run.max_steps=6",
    "learners.workers=1",
    "rollouts.prompts=8",
    "rollouts.samples=4",
    "batch.effective=32",
    *RUN[3:5],
    *RUN[9:],
)


def test_generation_runs_one_version_ahead_and_never_more(shared: Shared, sft: Path) -> None:
    """With an actor that is slow on purpose: batch b is sampled with version max(0, b - 1), so the learner
    sees age 0, then 1."""
    with planned_faults({"site": "roll_out", "action": "slow", "rank": 1}):
        outcome, _ = shared.train_last("tiny/grpo", sft, "ahead", *AHEAD, "rollouts.max_staleness=1")
    assert [line["policy/staleness"] for line in metrics(outcome.folder)] == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    rollouts = [s for s in every_line(outcome.folder / "samples.jsonl") if s["kind"] == "rollout"]
    assert {(s["step"], s["version"]) for s in rollouts} == {(1, 0), (2, 0), (3, 1), (4, 2), (5, 3), (6, 4)}
    gaps = [line["policy/train_rollout_gap"] for line in metrics(outcome.folder)]
    assert all(gap < 1e-4 for gap in gaps[:2]), "the warm-up's first step has rate 0: version 1 is version 0"
    assert all(gap > 1e-4 for gap in gaps[2:]), "old rollouts: the gap is real"


@pytest.mark.slow
def test_weights_may_change_between_the_requests_of_a_batch(shared: Shared, sft: Path) -> None:
    """Slow actors still work on the next batch when new weights come: its later prompts are sampled with
    these, and each rollout names its version."""
    slow = (
        "rollouts.max_staleness=1",
        "rollouts.update=request",
        "rollouts.rows_at_once=8",
        "run.max_steps=4",
    )
    with planned_faults({"site": "roll_out", "action": "slow"}):
        outcome, _ = shared.train_last("tiny/grpo", sft, "in-flight", *AHEAD, *slow)
    ages = [line["policy/staleness"] for line in metrics(outcome.folder)]
    assert all(0.0 <= age <= 1.0 for age in ages) and any(0.0 < age < 1.0 for age in ages), ages


@pytest.mark.slow
def test_one_step_ahead_learns_as_well_and_idles_less(shared: Shared, sft: Path) -> None:
    """Three seeds of tiny GRPO: the held-out reward is within 0.05, and rollout actors idle for a smaller
    part of the time."""
    for seed in (0, 1, 2):
        results = {}
        for ahead in (0, 1):
            changes = (
                f"run.seed={seed}",
                f"rollouts.max_staleness={ahead}",
                "tracking.wandb=off",
                "evaluation.every=60",
                "learners.workers=1",
            )
            outcome, _ = shared.train_last("tiny/grpo", sft, f"seed{seed}-ahead{ahead}", *changes)
            lines = metrics(outcome.folder)[2:]
            idle = float(
                np.sum([x["time/idle/rollouts"] for x in lines]) / np.sum([x["time/step"] for x in lines])
            )
            results[ahead] = (
                outcome.after["eval/reward/mean"],
                idle,
                float(np.sum([x["time/step"] for x in lines])),
            )
        print(
            f"seed {seed}: "
            + ", ".join(
                f"ahead {k}: reward {r:.3f}, idle {i:.0%}, {t:.1f} s" for k, (r, i, t) in results.items()
            )
        )
        assert results[1][0] >= results[0][0] - 0.05
        assert results[1][1] < results[0][1]
