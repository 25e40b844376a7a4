"""What a step does when memory runs out or a number is not finite: the result is that of a run in which it did not happen."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import Diverged, Exit
from tests.running import FEW, Shared, distance, exported, metrics, planned_faults, shared_ray, steps

pytestmark = pytest.mark.timeout(600)

RUN = (
    f"data.train={FEW % 'preference'}",
    "data.eval=null",
    "run.max_steps=4",
    "batch.effective=16",
    "batch.micro_batch=4",
    "learners.workers=2",
    "checkpoint.every=2",
    "optimizer.warmup_steps=0",
    "optimizer.learning_rate=1e-2",
    "tracking.wandb=off",
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with shared_ray(tmp_path_factory.mktemp("steps")) as shared:
        yield shared


@pytest.fixture(scope="module")
def undisturbed(shared: Shared) -> Path:
    return shared.train("tiny/dpo", "undisturbed", *RUN)[0].folder


def check_same(folder: Path, undisturbed: Path) -> None:
    """The same losses and weights, as near as sums in another order are."""
    assert steps(folder) == [1, 2, 3, 4]
    for one, other in zip(metrics(undisturbed), metrics(folder), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert distance(exported(undisturbed), exported(folder)) <= 1e-6


def test_out_of_memory_is_replayed_in_place(shared: Shared, undisturbed: Path, tmp_path: Path) -> None:
    fault = {"site": "micro_batch", "action": "oom", "step": 2, "rank": 1, "once": str(tmp_path / "oom")}
    with planned_faults(fault):
        outcome, said = shared.train("tiny/dpo", "in-place", *RUN)
    note = "worker 1 ran out of memory in micro-batch 0"
    assert note in said and "cutting the step finer (2 examples) and replaying it" in said
    assert note in (outcome.folder / "logs" / "driver.log").read_text()
    assert [line["perf/micro_batches"] for line in metrics(outcome.folder)] == [2, 2, 4, 4]
    check_same(outcome.folder, undisturbed)


def test_out_of_memory_amid_collectives_rebuilds_the_workers(shared: Shared, undisturbed: Path, tmp_path: Path) -> None:
    """At ZeRO 3 the other rank waits in a collective for the one that ran out of memory."""
    fault = {"site": "micro_batch", "action": "oom", "step": 2, "rank": 1, "once": str(tmp_path / "oom")}
    with planned_faults(fault):
        outcome, said = shared.train("tiny/dpo", "rebuilt", *RUN, "learners.zero_stage=3")
    assert "starting the workers again with a finer cut" in said
    assert said.count("step 2/4") == 1, "it went on from the checkpoint of step 2"
    assert [line["perf/micro_batches"] for line in metrics(outcome.folder)] == [2, 2, 4, 4]
    check_same(outcome.folder, undisturbed)


def test_non_finite_steps_are_skipped_and_five_in_a_row_end_the_run(shared: Shared, tmp_path: Path) -> None:
    once = {"site": "micro_batch", "action": "nan", "step": 0, "rank": 0, "once": str(tmp_path / "nan")}
    always = {"site": "micro_batch", "action": "nan", "step": 2}
    with planned_faults(once, always), pytest.raises(Diverged, match="5 steps in a row") as raised:
        shared.train("tiny/dpo", "nan", *RUN)
    assert raised.value.exit_code == Exit.SOFTWARE == 70
    first, second = metrics(shared.root / "nan")
    assert abs(first["loss"] - math.log(2)) < 1e-6, "the skipped step left the weights alone"
    assert (first["skipped"], first["examples"]) == (1, 32), "its examples are used up"
    assert abs(second["loss"] - math.log(2)) > 1e-5
    log = (shared.root / "nan" / "logs" / "driver.log").read_text()
    named = [sorted(map(int, ids.split(", "))) for ids in re.findall(r"non-finite loss, no step taken; examples \[([\d, ]+)\]", log)]
    assert len(named) == 6 and all(len(set(ids)) == 16 for ids in named)
    assert sorted(p.name for p in (shared.root / "nan").glob("checkpoints/step_*")) == ["step_00000002"]
