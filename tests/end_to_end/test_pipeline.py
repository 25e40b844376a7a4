"""Pipelines: stages feed each other, and a killed pipeline continues at its stage."""

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.core.files import read_lines
from tests.running import Shared, exported_hash, shared_ray, steps

pytestmark = [pytest.mark.timeout(900), pytest.mark.slow]

STAGES = {"sft": 6, "reward": 7, "ppo": 5}
"""Steps of each stage, all different, so that a line `step 3/7` names its stage."""
SMALL = (
    *(f"{name}:run.max_steps={count}" for name, count in STAGES.items()),
    *(
        "sft:data.train=[{path: toy:sft, max_rows: 64}]",
        "reward:data.train=[{path: toy:reward, max_rows: 64}]",
    ),
    *(
        "sft:batch.effective=16",
        "reward:batch.effective=16",
        "ppo:rollouts.prompts=64",
        "ppo:batch.effective=32",
    ),
    *(
        "data.eval=null",
        "evaluation.every=null",
        "checkpoint.every=2",
        "tracking.wandb=off",
        "learners.cpus_per_worker=0.5",
    ),
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with shared_ray(tmp_path_factory.mktemp("pipeline")) as shared:
        yield shared


def test_a_killed_pipeline_continues_at_its_stage(shared: Shared) -> None:
    """The driver gets SIGKILL in the second and the third stage; the same command gives the same bits."""
    undisturbed, folder = shared.root / "undisturbed", shared.root / "killed"
    finished = shared.sandbox.run("train", "tiny/rlhf", *SMALL, "--output", undisturbed)
    assert finished.code == 0, finished.err

    logs: list[str] = []
    for line in ("step 4/7", "step 3/5"):
        running = shared.sandbox.start("train", "tiny/rlhf", *SMALL, "--output", folder)
        running.wait_for(line)
        running.process.kill()
        assert running.finish().code == -9
        logs.append(running.out.read_text())
    finished = shared.sandbox.run("train", "tiny/rlhf", *SMALL, "--output", folder)
    assert finished.code == 0, finished.err
    logs.append(finished.out)

    assert taken(logs[0], 6) == [1, 2, 3, 4, 5, 6] and taken(logs[0], 7)[:4] == [1, 2, 3, 4]
    assert taken(logs[1], 6) == [] and 3 <= taken(logs[1], 7)[0] <= 5 and taken(logs[1], 5)[:3] == [1, 2, 3]
    assert taken(logs[2], 6) == [] and taken(logs[2], 7) == [] and 3 <= taken(logs[2], 5)[0] <= 5
    for name, count in STAGES.items():
        assert steps(folder / name) == list(range(1, count + 1))
        assert exported_hash(folder / name) == exported_hash(undisturbed / name), name


def taken(log: str, total: int) -> list[int]:
    """Steps that a command printed of the stage that has `total` steps."""
    return [int(step) for step in re.findall(rf"step (\d+)/{total}\b", log)]


def test_rlhf_trains_a_reward_model_and_learns_exact_match_from_it(shared: Shared, tmp_path: Path) -> None:
    """PPO sees the reward model alone; exact match, with weight 0, checks what it learned."""
    finished = shared.sandbox.run(
        "train", "tiny/rlhf", "learners.cpus_per_worker=0.5", "--output", tmp_path / "rlhf", timeout=600
    )
    assert finished.code == 0, finished.err
    evaluations = [
        line
        for line in read_lines(tmp_path / "rlhf" / "ppo" / "metrics.jsonl")
        if "eval/reward/exact" in line
    ]
    first, last = evaluations[0], evaluations[-1]
    assert last["eval/reward/learned"] > first["eval/reward/learned"] + 2
    assert first["eval/reward/exact"] < 0.5 and last["eval/reward/exact"] > 0.85
    scores = [
        line
        for line in read_lines(tmp_path / "rlhf" / "reward" / "metrics.jsonl")
        if "eval/preference_accuracy" in line
    ]
    assert scores[-1]["eval/preference_accuracy"] > 0.95
