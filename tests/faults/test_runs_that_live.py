"""Runs that are moved, extended, evaluated in another way and exported afterwards: weights of the same recipe
are equal to the last bit."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from orchestrator.core.errors import CheckpointError, OutputError
from orchestrator.core.stopping import Stop
from orchestrator.run.export import export_run, recipe_of
from tests.running import Shared, exported_hash, shared_ray, steps

pytestmark = pytest.mark.timeout(600)

SMALL = (
    "batch.effective=8",
    "tracking.wandb=off",
    "model={tiny: {hidden_size: 32, layers: 1, heads: 2}}",
    "data.max_length=64",
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with shared_ray(tmp_path_factory.mktemp("live")) as shared:
        yield shared


def rows(path: Path, count: int = 24) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pairs = [{"prompt": f"{i} + 1 = ", "chosen": str(i + 1), "rejected": str(i)} for i in range(count)]
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return path


@pytest.fixture(scope="module")
def undisturbed(shared: Shared) -> str:
    data = rows(shared.root / "there" / "rows.jsonl")
    outcome, _ = shared.train(
        "tiny/dpo",
        "undisturbed",
        *SMALL,
        f"data.train={data}",
        "data.eval=null",
        "run.max_steps=4",
        "checkpoint.every=null",
    )
    return exported_hash(outcome.folder)


def test_moved_extended_and_evaluated_otherwise_it_is_the_same_run(
    shared: Shared, undisturbed: str, tmp_path: Path
) -> None:
    first, held = (
        rows(shared.root / "first" / "a.jsonl"),
        "[{path: toy:preference, split: eval, max_rows: 8}]",
    )
    before, _ = shared.train(
        "tiny/dpo",
        "lived",
        *SMALL,
        f"data.train={first}",
        f"data.eval={held}",
        "run.max_steps=2",
        "checkpoint.every=1",
    )
    short = exported_hash(before.folder)
    (shared.root / "lived").rename(shared.root / "moved")
    moved = first.rename(tmp_path / "b.jsonl")
    changes = (
        "data.eval=null",
        "run.max_steps=4",
        "checkpoint.every=1h",
        "checkpoint.keep=3",
        "learners.zero_stage=1",
        "export.dtype=fp32",
    )
    after, said = shared.train("tiny/dpo", "moved", *SMALL, f"data.train={moved}", *changes)
    assert steps(after.folder) == [1, 2, 3, 4] and "step 2/4" not in said
    assert exported_hash(after.folder) == undisturbed != short

    recipe, notes = recipe_of(after.folder), []
    for step, digest in ((2, short), (4, undisturbed), (None, undisturbed)):
        folder = tmp_path / f"of-{step}"
        export_run(after.folder, recipe, step, folder / "export", notes.append)
        assert exported_hash(folder) == digest, "a learner and a checkpoint are exported by the same code"
    half = recipe_of(after.folder, ["export.dtype=bf16"])
    written = load_file(
        export_run(after.folder, half, 4, tmp_path / "half", notes.append) / "model.safetensors"
    )
    full = load_file(after.folder / "export" / "model.safetensors")
    assert all(torch.equal(full[name].bfloat16(), value) for name, value in written.items())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(CheckpointError, match="no verified checkpoint of step 3") as caught:
        export_run(after.folder, recipe, 3, tmp_path / "none", notes.append)
    assert "steps 1, 2, 4" in caught.value.fix or "steps 2, 4" in caught.value.fix


def test_weights_alone_are_a_third_and_cannot_be_extended(shared: Shared, undisturbed: str) -> None:
    data = rows(shared.root / "there" / "rows.jsonl")
    common = (*SMALL, f"data.train={data}", "data.eval=null", "checkpoint.every=2")
    sizes = {}
    for final in ("weights", "none"):
        outcome, _ = shared.train("tiny/dpo", final, *common, "run.max_steps=4", f"checkpoint.final={final}")
        assert exported_hash(outcome.folder) == undisturbed
        sizes[final] = sum(
            file.stat().st_size for file in (outcome.folder / "checkpoints").rglob("*.safetensors")
        )
        again, said = shared.train("tiny/dpo", final, *common, "run.max_steps=4", f"checkpoint.final={final}")
        assert again.steps == 4 and "all 4 steps are done already" in said
        with pytest.raises(OutputError, match="cannot be extended") as caught:
            shared.train("tiny/dpo", final, *common, "run.max_steps=5", f"checkpoint.final={final}")
        assert "model.path=RUN/export" in caught.value.fix
    full = sum(
        file.stat().st_size
        for file in (shared.root / "undisturbed" / "checkpoints" / "step_00000004").rglob("*.safetensors")
    )
    assert 0.3 < sizes["weights"] / full < 0.36 and sizes["none"] == 0
    assert not (shared.root / "none" / "checkpoints").exists()
    assert [d.name for d in (shared.root / "weights" / "checkpoints").glob("step_*")] == ["step_00000004"]


class StopsAtExport(Stop):
    """Stops the run when it begins to export the model."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "doing" and value == "exporting the model":
            raise KeyboardInterrupt


@pytest.mark.slow
def test_an_interrupted_export_is_repeated_also_for_an_extended_run(shared: Shared, undisturbed: str) -> None:
    from rich.console import Console

    from orchestrator.recipe.loading import load
    from orchestrator.run.supervise import train

    data = rows(shared.root / "there" / "rows.jsonl")
    common = (*SMALL, f"data.train={data}", "data.eval=null")
    shared.train("tiny/dpo", "interrupted", *common, "run.max_steps=2")
    longer = load("tiny/dpo", [*shared.overrides(), *common, "run.max_steps=4"]).stages[0].recipe
    with pytest.raises(KeyboardInterrupt):
        train(longer, shared.root / "interrupted", Console(quiet=True), StopsAtExport())
    assert exported_hash(shared.root / "interrupted") != undisturbed, "the export of the shorter run"
    outcome, _ = shared.train("tiny/dpo", "interrupted", *common, "run.max_steps=4")
    assert exported_hash(outcome.folder) == undisturbed


@pytest.mark.parametrize("kind", ["adapter", pytest.param("merged", marks=pytest.mark.slow)])
def test_lora_is_exported_as_the_recipe_says(shared: Shared, kind: str) -> None:
    data = rows(shared.root / "there" / "rows.jsonl")
    lora = ("model.lora={rank: 2}", f"export.lora={kind}", "run.max_steps=2")
    outcome, _ = shared.train(
        "tiny/dpo", f"lora-{kind}", *SMALL, f"data.train={data}", "data.eval=null", *lora
    )
    files = {path.name for path in outcome.export.iterdir()}
    assert ("adapter_model.safetensors" in files) is (kind == "adapter") is (
        "model.safetensors" not in files
    ) and "adapter" not in files
    card = (outcome.export / "README.md").read_text()
    assert "Model Card for Model ID" not in card and "## Recipe" in card
    assert ("library_name: peft" in card) is (kind == "adapter")
