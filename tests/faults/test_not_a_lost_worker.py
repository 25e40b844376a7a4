"""A failure that is not a lost worker ends the run without another attempt, with its own exit code. An
exception of an environment costs an episode. Two jobs never hold half of the cluster each."""

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from safetensors.numpy import load_file

from orchestrator.cluster.learner_group import LearnerGroup
from orchestrator.cluster.placement import reserved
from orchestrator.core.errors import (
    ConfigError,
    Exit,
    MissingInput,
    NotEnoughResources,
    OrchestratorError,
    OutputError,
    RewardsFailed,
    WorkerFailed,
)
from orchestrator.core.resources import WorkerGroup
from orchestrator.recipe.schema import Learners
from tests.running import FEW, Shared, metrics, shared_ray, steps

pytestmark = pytest.mark.timeout(600)

TINY = (
    "model.tiny.layers=1",
    "model.tiny.hidden_size=16",
    "data.eval=null",
    "tracking.wandb=off",
    "learners.workers=1",
)
OFFLINE = (f"data.train={FEW % 'preference'}", "batch.effective=16", "optimizer.warmup_steps=0")
WORLD = """
import os
from pathlib import Path
from orchestrator.rollout.episodes import Turn
class World:
    def reset(self, row): return [{"role": "user", "content": str(row["prompt"])}]
    def step(self, completion):
        if %s: raise ConnectionError("tool server: connection reset by peer")
        return Turn(done=True, reward=float(len(completion) %% 2))
"""
ONLINE = """
model: {tiny: {layers: 1, hidden_size: 16}}
data: {train: [{path: "toy:prompts", max_rows: 8}], max_length: 128}
algorithm: {name: grpo}
batch: {effective: 16}
optimizer: {learning_rate: 1e-3}
learners: {cpus_per_worker: 0.3}
rollouts: {prompts: 4, samples: 4, max_new_tokens: 8, cpus_per_worker: 0.3, environment: WORLD}
tracking: {wandb: "off"}
run: {max_steps: 1}
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with shared_ray(tmp_path_factory.mktemp("ends")) as shared:
        yield shared


@pytest.fixture(scope="module")
def done(shared: Shared) -> Path:
    """A finished run of two steps."""
    outcome, _ = shared.train("tiny/dpo", "extended", *TINY, *OFFLINE, "run.max_steps=2")
    assert steps(outcome.folder) == [1, 2]
    return outcome.folder


def test_a_finished_run_is_extended_and_a_refusal_names_the_key(shared: Shared, done: Path) -> None:
    before = load_file(done / "export" / "model.safetensors")
    outcome, said = shared.train("tiny/dpo", done.name, *TINY, *OFFLINE, "run.max_steps=3")
    assert steps(outcome.folder) == [1, 2, 3] and "step 3/3" in said and "step 2/3" not in said
    after = load_file(done / "export" / "model.safetensors")
    assert any((before[name] != after[name]).any() for name in before)
    with pytest.raises(OutputError, match="differs in 1 key ") as caught:
        shared.train("tiny/dpo", done.name, *TINY, *OFFLINE, "run.max_steps=3", "algorithm.beta=0.2")
    assert caught.value.why == "algorithm.beta: 0.1 -> 0.2"


def test_truncated_weights_are_a_missing_input_and_nothing_is_tried_again(
    shared: Shared, done: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in (done / "export").iterdir():
        if file.is_file():
            (broken / file.name).write_bytes(file.read_bytes())
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-200])
    error, said = failure(
        shared, "tiny/dpo", "truncated", *OFFLINE, *TINY[2:], f"model={{path: {broken}}}", "run.max_steps=1"
    )
    assert isinstance(error, MissingInput) and error.exit_code == Exit.NO_INPUT
    assert "model.safetensors is broken" in error.what and "restart" not in said


def failure(shared: Shared, recipe: str, folder: str, *overrides: str) -> tuple[OrchestratorError, str]:
    """The error that ended the run, and its output."""
    with pytest.raises(OrchestratorError) as caught:
        shared.train(recipe, folder, *overrides)
    assert "\x1b" not in str(caught.value) and "Traceback" not in str(caught.value)
    return caught.value, (shared.root / f"{folder}.txt").read_text()


def online(tmp_path: Path, when: str) -> str:
    (tmp_path / "world.py").write_text(WORLD % when)
    (tmp_path / "r.yaml").write_text(ONLINE.replace("WORLD", json.dumps(f"{tmp_path}/world.py:World")))
    return str(tmp_path / "r.yaml")


def test_a_flaky_environment_costs_nothing_and_a_broken_one_ends_the_run_at_once(
    shared: Shared, tmp_path: Path
) -> None:
    marker = tmp_path / "failed"
    recipe = online(
        tmp_path,
        f"len(list(Path({str(tmp_path)!r}).glob('failed*'))) < 3 and not "
        f"Path(f'{marker}{{os.urandom(4).hex()}}').touch()",
    )
    outcome, said = shared.train(recipe, "flaky")
    (line,) = metrics(outcome.folder)
    assert (
        line["reward/dropped_groups"] == 0.0
        and "restart" not in said
        and len(list(tmp_path.glob("failed*"))) == 3
    )
    error, said = failure(shared, online(tmp_path, "True"), "broken")
    assert isinstance(error, RewardsFailed) and error.exit_code == Exit.SOFTWARE
    assert "ConnectionError at world.py:8: tool server" in error.why and "restart" not in said
    assert "Traceback" in (shared.root / "broken" / "logs" / "rollout-0.log").read_text(), (
        "the whole traceback is kept"
    )


class Odd(ValueError):
    """Cannot be rebuilt from its `args`, like the exceptions of many libraries."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


def bug(learner: object) -> None:
    raise Odd(1, 2)


def test_a_bug_in_a_worker_ends_the_run_with_70_and_its_place(shared: Shared, tmp_path: Path) -> None:
    learners = Learners(workers=1, cpus_per_worker=0.3)  # pyright: ignore[reportCallIssue]
    with LearnerGroup(learners, logs=tmp_path) as group:
        for _ in range(2):  # the worker survives
            with pytest.raises(WorkerFailed, match="learner-0 failed in `call`: Odd: 1 and 2") as caught:
                group.call(bug)
    assert (
        caught.value.exit_code == Exit.SOFTWARE
        and "test_not_a_lost_worker.py" in caught.value.why
        and "in bug" in caught.value.why
    )
    assert "raise Odd(1, 2)" in (tmp_path / "learner-0.log").read_text()


def test_a_missing_environment_is_reported_before_any_worker_starts(shared: Shared, tmp_path: Path) -> None:
    recipe = online(tmp_path, "False")
    started = time.monotonic()
    error, _ = failure(shared, recipe, "nofile", "rollouts.environment=nofile.py:World")
    assert isinstance(error, ConfigError) and "no file nofile.py" in error.what
    assert not (shared.root / "nofile").exists() and time.monotonic() - started < 60


def test_two_jobs_never_take_half_each(shared: Shared) -> None:
    """Each needs all CPUs, for two groups: one gets them, the other one nothing until the first is done."""
    each = ray.cluster_resources()["CPU"] / 2
    groups = [WorkerGroup("learners", 1, each, 0.0), WorkerGroup("rollouts", 1, each, 0.0)]
    events: list[str] = []

    def job(name: str) -> None:
        with reserved(groups, 60.0) as placed:
            assert [p.first for p in placed.values()] == [0, 1]
            events.append(f"{name} began")
            time.sleep(1.0)
            events.append(f"{name} ended")

    jobs = [threading.Thread(target=job, args=(name,)) for name in "ab"]
    for thread in jobs:
        thread.start()
    for thread in jobs:
        thread.join(90)
    assert len(events) == 4, events
    assert events[0][0] == events[1][0] and events[2][0] == events[3][0], events
    late = pytest.raises(NotEnoughResources, match="not free together within 1 s")
    with reserved(groups, 30.0), late, reserved(groups, 1.0):
        pass
    with (
        pytest.raises(NotEnoughResources, match="the cluster has"),
        reserved([*groups, WorkerGroup("critic", 1, 1.0, 0.0)], 1.0),
    ):
        pass
