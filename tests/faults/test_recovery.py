"""A run that was disturbed ends with the weights of one that was not. After a kill of any process at any
place they are equal to the last bit; after another cut they differ as sums in another order do."""

import math
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from orchestrator.core.errors import Diverged, Exit
from tests.running import (
    FEW,
    Command,
    Sandbox,
    Shared,
    distance,
    exported,
    exported_hash,
    metrics,
    planned_faults,
    shared_ray,
    steps,
)

pytestmark = pytest.mark.timeout(600)

STEPS = 8
RUN = (
    f"data.train={FEW % 'preference'}",
    "data.eval=null",
    f"run.max_steps={STEPS}",
    "batch.effective=16",
    "batch.micro_batch=4",
    "learners.workers=2",
    "checkpoint.every=2",
    "optimizer.warmup_steps=0",
    "optimizer.learning_rate=1e-2",
    "tracking.wandb=off",
)


@dataclass(frozen=True, slots=True)
class Undisturbed:
    """A run without a disturbance."""

    folder: Path
    digest: str


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with shared_ray(tmp_path_factory.mktemp("resume")) as shared:
        yield shared


@pytest.fixture(scope="module")
def undisturbed(shared: Shared) -> Undisturbed:
    outcome, _ = shared.train("tiny/dpo", "undisturbed", *RUN)
    assert steps(outcome.folder) == list(range(1, STEPS + 1))
    return Undisturbed(outcome.folder, exported_hash(outcome.folder))


def check_equal(folder: Path, undisturbed: Undisturbed) -> None:
    """The same weights to the last bit, and every step recorded once."""
    assert steps(folder) == list(range(1, STEPS + 1))
    assert exported_hash(folder) == undisturbed.digest


def cut_back(undisturbed: Undisturbed, folder: Path, step: int) -> Path:
    """A copy of the run as it was after it had written the checkpoint of `step`, which must still exist."""
    shutil.copytree(undisturbed.folder, folder)
    shutil.rmtree(folder / "export")
    for later in folder.glob("checkpoints/step_*"):
        if int(later.name.removeprefix("step_")) > step:
            shutil.rmtree(later)
    return folder


def test_worker_killed(shared: Shared, undisturbed: Undisturbed, tmp_path: Path) -> None:
    """The supervisor starts the workers again in the same command."""
    with planned_faults(
        {"site": "micro_batch", "action": "kill", "step": 4, "rank": 1, "once": str(tmp_path / "killed")}
    ):
        outcome, said = shared.train("tiny/dpo", "worker", *RUN)
    assert (tmp_path / "killed").exists()
    assert "learner-1 died" in said and "restart 1 of 3" in said
    assert said.count("step 4/8") == 1 and said.count("step 5/8") == 1, (
        "it continued from the checkpoint of step 4"
    )
    check_equal(outcome.folder, undisturbed)


CRASHES = [
    (("checkpoint.written", 2), ("checkpoint.renamed", 4)),
    pytest.param((("checkpoint.manifest", 2), ("checkpoint.manifest", 6)), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("crashes", CRASHES, ids=lambda crashes: crashes[0][0])
def test_driver_killed(
    shared: Shared, undisturbed: Undisturbed, crashes: tuple[tuple[str, int], ...]
) -> None:
    """While it writes a checkpoint: before the manifest, after it, and between the rename and LATEST. The
    same command continues each time."""
    name = f"driver-{crashes[0][0]}"
    for site, step in crashes:
        fault = {"site": site, "step": step, "action": "kill"}
        finished = shared.sandbox.run(
            "train", "tiny/dpo", *RUN, *shared.overrides(), "--output", shared.root / name, faults=[fault]
        )
        assert finished.code == -9, finished.err
        assert not (shared.root / name / "export").exists()
    outcome, _ = shared.train("tiny/dpo", name, *RUN)
    check_equal(outcome.folder, undisturbed)
    assert not list(outcome.folder.glob("checkpoints/.tmp-*")), "the remains of the crashes were removed"


def flip_bit(checkpoint: Path) -> None:
    shard = checkpoint / "state-rank0001-0000.safetensors"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def truncate(checkpoint: Path) -> None:
    shard = checkpoint / "state-rank0000-0000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])


def remove_shard(checkpoint: Path) -> None:
    (checkpoint / "state-rank0001-0000.safetensors").unlink()


DAMAGES = [
    (flip_bit, "state-rank0001-0000.safetensors is damaged"),
    pytest.param(truncate, "state-rank0000-0000.safetensors is truncated", marks=pytest.mark.slow),
    pytest.param(remove_shard, "state-rank0001-0000.safetensors is missing", marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("damage", "message"), DAMAGES)
def test_damaged_checkpoint_is_refused_by_name(
    shared: Shared, undisturbed: Undisturbed, damage: Callable[[Path], None], message: str
) -> None:
    folder = cut_back(undisturbed, shared.root / damage.__name__, STEPS)
    damage(folder / "checkpoints" / f"step_{STEPS:08d}")
    _, said = shared.train("tiny/dpo", folder.name, *RUN)
    assert f"checkpoint step_{STEPS:08d} is not used: {message}" in said
    assert "step 7/8" in said and "step 6/8" not in said, "the checkpoint before it was used"
    check_equal(folder, undisturbed)


RESHARDINGS = [
    ("learners.workers=1", "learners.zero_stage=3"),
    pytest.param(("learners.workers=1",), marks=pytest.mark.slow),
    pytest.param(("learners.workers=4", "learners.cpus_per_worker=0.25"), marks=pytest.mark.slow),
    pytest.param(("learners.zero_stage=2",), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("cut", RESHARDINGS, ids=" ".join)
def test_resharded(shared: Shared, undisturbed: Undisturbed, cut: tuple[str, ...]) -> None:
    """Another number of workers or another ZeRO stage continues with the same examples."""
    folder = cut_back(undisturbed, shared.root / "-".join(cut), 6)
    _, said = shared.train("tiny/dpo", folder.name, *RUN, *cut)
    assert "step 7/8" in said and "step 6/8" not in said
    assert steps(folder) == list(range(1, STEPS + 1))
    assert distance(exported(undisturbed.folder), exported(folder)) <= 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("after", ["1", "2"])
def test_from_zero_3_to_a_lower_stage(shared: Shared, undisturbed: Undisturbed, after: str) -> None:
    name = f"from-3-to-{after}"
    fault = {"site": "checkpoint.renamed", "step": 4, "action": "kill"}
    started = (
        "train",
        "tiny/dpo",
        *RUN,
        *shared.overrides(),
        "learners.zero_stage=3",
        "--output",
        shared.root / name,
    )
    assert shared.sandbox.run(*started, faults=[fault]).code == -9
    shared.train("tiny/dpo", name, *RUN, f"learners.zero_stage={after}")
    assert steps(shared.root / name) == list(range(1, STEPS + 1))
    assert distance(exported(undisturbed.folder), exported(shared.root / name)) <= 1e-5


def check_close(folder: Path, undisturbed: Undisturbed, tolerance: float) -> None:
    """The same losses and weights, up to the order of sums. tolerance: of the weights, relative."""
    assert steps(folder) == list(range(1, STEPS + 1))
    for one, other in zip(metrics(undisturbed.folder), metrics(folder), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert distance(exported(undisturbed.folder), exported(folder)) <= tolerance


def test_out_of_memory_is_replayed_in_place(shared: Shared, undisturbed: Undisturbed, tmp_path: Path) -> None:
    fault = {"site": "micro_batch", "action": "oom", "step": 4, "rank": 1, "once": str(tmp_path / "oom")}
    with planned_faults(fault):
        outcome, said = shared.train("tiny/dpo", "in-place", *RUN)
    note = "worker 1 ran out of memory in micro-batch 0"
    assert note in said and "cutting the step finer (2 examples) and replaying it" in said
    assert note in (outcome.folder / "logs" / "driver.log").read_text()
    assert [line["perf/micro_batches"] for line in metrics(outcome.folder)] == [2] * 4 + [4] * 4
    check_close(outcome.folder, undisturbed, 1e-6)


@pytest.mark.slow
def test_out_of_memory_in_the_update_rebuilds_the_workers(
    shared: Shared, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """It is unknown which weights were updated by then. It does not count as a lost worker: the step is cut
    finer, and no restart is spent on it."""
    fault = {"site": "optim_step", "action": "oom", "step": 4, "rank": 1, "once": str(tmp_path / "oom")}
    with planned_faults(fault):
        outcome, said = shared.train("tiny/dpo", "update", *RUN)
    assert (
        "learner-1 ran out of memory in `optim_step`: starting the workers again with at most 2 examples"
        in said
    )
    assert "restart 1" not in said
    check_close(outcome.folder, undisturbed, 1e-6)


@pytest.mark.slow
def test_out_of_memory_amid_collectives_rebuilds_the_workers(
    shared: Shared, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    """At ZeRO 3 the other rank waits in a collective for the one that ran out of memory."""
    fault = {"site": "micro_batch", "action": "oom", "step": 4, "rank": 1, "once": str(tmp_path / "oom")}
    with planned_faults(fault):
        outcome, said = shared.train("tiny/dpo", "rebuilt", *RUN, "learners.zero_stage=3")
    assert "starting the workers again with at most 2 examples" in said
    assert said.count("step 4/8") == 1, "it continued from the checkpoint of step 4"
    assert [line["perf/micro_batches"] for line in metrics(outcome.folder)] == [2] * 4 + [4] * 4
    check_close(outcome.folder, undisturbed, 1e-5)  # the undisturbed run has stage 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_non_finite_steps_are_skipped_and_five_in_a_row_end_the_run(
    shared: Shared, tmp_path: Path, stage: int
) -> None:
    once = {"site": "micro_batch", "action": "nan", "step": 0, "rank": 0, "once": str(tmp_path / "nan")}
    always = {"site": "micro_batch", "action": "nan", "step": 2}
    folder = shared.root / f"nan-{stage}"
    with planned_faults(once, always), pytest.raises(Diverged, match="5 steps in a row") as raised:
        shared.train("tiny/dpo", folder.name, *RUN, f"learners.zero_stage={stage}")
    assert raised.value.exit_code == Exit.SOFTWARE == 70
    first, second = metrics(folder)
    assert abs(first["loss"] - math.log(2)) < 1e-6, "the skipped step left the weights alone"
    assert (first["skipped"], first["examples"]) == (1, 32), "its examples are used up"
    assert abs(second["loss"] - math.log(2)) > 1e-5
    log = (folder / "logs" / "driver.log").read_text()
    named = [
        ids.split(", ") for ids in re.findall(r"non-finite \w+, no step taken; examples \[([\d, ]+)\]", log)
    ]
    assert [len(set(ids)) for ids in named] == [16] * 6
    assert [p.name for p in folder.glob("checkpoints/step_*")] == ["step_00000002"]


def kill_something(sandbox: Sandbox, running: Command, victim: str, choice: random.Random) -> None:
    """Sends SIGKILL to the driver, to one learner worker, or to the driver, Ray and all workers."""
    workers = sorted(pid for pid, name in sandbox.living().items() if name.startswith("ray::LearnerActor"))
    if victim == "everything":
        sandbox.kill_all()
    elif victim == "worker" and workers:
        os.kill(choice.choice(workers), signal.SIGKILL)
    else:
        running.process.kill()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_random_kills(undisturbed: Undisturbed, tmp_path: Path) -> None:
    """Ten SIGKILLs at random moments of commands with their own Ray; then each run is continued to its
    end."""
    choice = random.Random(20)
    folders = [tmp_path / "run-0"]
    for turn in range(10):
        if last_checkpoint(folders[-1]) >= STEPS - 1:  # almost nothing remains to be disturbed
            folders.append(tmp_path / f"run-{len(folders)}")
        folder = folders[-1]
        victim = choice.choice(["driver", "worker", "everything"])
        sandbox = Sandbox(tmp_path / f"turn-{turn}")
        try:
            running = sandbox.start(
                "train", "tiny/dpo", *RUN, "learners.cpus_per_worker=0.5", "--output", folder
            )
            if choice.random() < 0.8:
                running.wait_for(f"step {choice.randrange(last_checkpoint(folder) + 1, STEPS)}/{STEPS}")
                time.sleep(choice.uniform(0.0, 0.1))
            else:
                time.sleep(choice.uniform(1.0, 20.0))
            kill_something(sandbox, running, victim, choice)
            assert running.finish().code in ((0, -9) if victim == "worker" else (-9,))
        finally:
            sandbox.close()
    sandbox = Sandbox(tmp_path / "end")
    try:
        for folder in folders:
            finished = sandbox.run(
                "train", "tiny/dpo", *RUN, "learners.cpus_per_worker=0.5", "--output", folder
            )
            assert finished.code == 0, finished.err
            check_equal(folder, undisturbed)
    finally:
        sandbox.close()


def last_checkpoint(folder: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    return max((int(p.name.removeprefix("step_")) for p in folder.glob("checkpoints/step_*")), default=0)
