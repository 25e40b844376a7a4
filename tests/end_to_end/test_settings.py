"""Settings that only whole runs can show: two runs differ in many keys, each visible in its run folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from orchestrator.core.errors import WorkerLost
from orchestrator.recipe.loading import load
from orchestrator.run.supervise import train
from tests.running import Shared, planned_faults, shared_ray
from tests.unit.settings.runs import RUNS, steps

pytestmark = pytest.mark.timeout(900)  # four whole runs, two of them with four kinds of actors

BASES = {
    "rows": """algorithm: {name: dpo}
data:
  train: [{path: toy:preference, max_rows: 64}]
  eval: [{path: toy:preference, split: eval, max_rows: 8}]
batch: {micro_batch: 8}
evaluation: {generate: {}}
""",
    "rollouts": """run: {max_steps: 3}
algorithm: {name: ppo, kl: {coefficient: 0.1, place: reward}}
data:
  train: [{path: toy:prompts, max_rows: 64}]
  eval: [{path: toy:prompts, split: eval, max_rows: 8}]
  max_length: 64
rollouts: {cpus_per_worker: 0.25}
critic: {cpus_per_worker: 0.25}
tracking: {wandb: off}
""",
}
COMMON = "model: {tiny: {hidden_size: 32, layers: 1, heads: 2}}\noptimizer: {learning_rate: 1e-2}\n"
MATCHING = {"rollouts": (["batch.effective=8"], ["batch.effective=32"])}
"""Overrides that the first, and the second, values of other keys need."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with shared_ray(tmp_path_factory.mktemp("settings")) as shared:
        yield shared


def overrides(kind: str, which: int, root: Path) -> list[str]:
    """All first, or all second, values of the table; a key of a reward sets the whole list."""
    changes = [*MATCHING.get(kind, ([], []))[which], "learners.cpus_per_worker=0.25"]
    for path, run in RUNS.items():
        value = run.values[which].replace("ROOT", str(root))
        if run.kind == kind:
            changes.append(
                f"{path}={value}"
                if "[]" not in path
                else f"rewards.functions=[{{name: {value}, function: exact_match}}]"
            )
    return changes


@pytest.fixture(scope="module", params=sorted(BASES))
def ran(shared: Shared, request: pytest.FixtureRequest) -> tuple[str, tuple[Path, Path]]:
    """The folders of the two runs of a kind."""
    kind = request.param
    file = shared.root / f"{kind}.yaml"
    file.write_text(COMMON + BASES[kind])
    folders = (shared.root / f"{kind}-first", shared.root / f"{kind}-second")
    for which, folder in enumerate(folders):
        train(load(file, overrides(kind, which, shared.root)).stages[0].recipe, folder, Console(quiet=True))
    return kind, folders


def test_every_key_of_the_runs_is_visible_in_their_folders(ran: tuple[str, tuple[Path, Path]]) -> None:
    kind, folders = ran
    seen = {
        path: tuple(run.see(folder) for folder in folders) for path, run in RUNS.items() if run.kind == kind
    }
    assert seen == {path: run.wanted for path, run in RUNS.items() if run.kind == kind}


@pytest.mark.slow
def test_a_lost_worker_is_replaced_as_often_as_the_recipe_says(shared: Shared, tmp_path: Path) -> None:
    file = shared.root / "lost.yaml"
    file.write_text(COMMON + BASES["rows"])
    few = [
        "run.max_steps=2",
        "batch.effective=8",
        "data.eval=null",
        "tracking.wandb=off",
        f"reference.cache_dir={shared.root / 'lost'}",
    ]
    for allowed in (0, 1):
        recipe = load(file, [*few, f"learners.max_restarts={allowed}"]).stages[0].recipe
        crash = {
            "site": "micro_batch",
            "action": "kill",
            "step": 1,
            "once": str(tmp_path / f"crashed-{allowed}"),
        }
        folder = shared.root / f"lost-{allowed}"
        with planned_faults(crash):
            if allowed:
                train(recipe, folder, Console(quiet=True))
                assert len(steps(folder)) == 2
            else:
                with pytest.raises(WorkerLost):
                    train(recipe, folder, Console(quiet=True))
