"""Types in which the stages of a pipeline export, and the disk space of a run."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from orchestrator.algorithms.table import build
from orchestrator.core.errors import ConfigError
from orchestrator.models.rounding import may_be_too_coarse, rounding_share
from orchestrator.models.source import source_dtype
from orchestrator.plan.disk import checkpoint_bytes, export_bytes, in_words
from orchestrator.plan.memory import model_sizes
from orchestrator.recipe.loading import load
from orchestrator.recipe.schema import Model
from orchestrator.run.stages import with_types

PIPELINE = """pipeline:
  - name: sft
    model: {path: %s}
    data: {train: toy:sft}
    algorithm: {name: sft}
    optimizer: {learning_rate: 1e-3}
  - name: dpo
    model: {path: stage:sft}
    data: {train: toy:preference}
    algorithm: {name: dpo}
    optimizer: {learning_rate: 1e-3}
"""


def folder(path: Path, dtype: torch.dtype) -> Path:
    path.mkdir()
    save_file({"weight": torch.zeros(64, dtype=dtype), "scale": torch.zeros(2)}, path / "model.safetensors")
    return path


@pytest.mark.parametrize(
    ("dtype", "name", "short"), [(torch.bfloat16, "bfloat16", "bf16"), (torch.float32, "float32", "fp32")]
)
def test_a_chain_ends_in_the_type_that_it_began_with_and_rounds_only_there(
    tmp_path: Path, dtype: torch.dtype, name: str, short: str
) -> None:
    start = folder(tmp_path / "start", dtype)
    assert source_dtype(Model(path=str(start))) == name  # pyright: ignore[reportCallIssue]
    (tmp_path / "p.yaml").write_text(PIPELINE % start)
    low = load(tmp_path / "p.yaml", ["learners.precision=bf16"]).stages
    assert [stage.recipe.export.dtype for stage in with_types(low)] == ["fp32", short]
    assert [stage.recipe.export.dtype for stage in with_types(load(tmp_path / "p.yaml").stages)] == [
        "fp32",
        "fp32",
    ], "fp32 runs are not rounded"
    asked = load(tmp_path / "p.yaml", ["export.dtype=fp16"]).stages
    assert [stage.recipe.export.dtype for stage in with_types(asked)] == ["fp16", "fp16"]


def test_rounding_that_would_undo_the_training_is_not_done_by_default(tmp_path: Path) -> None:
    start = {"a": torch.full((64,), 1.0), "never learns": torch.randn(64)}
    small, large = ({**start, "a": start["a"] + step} for step in (1e-4, 0.1))
    assert rounding_share(small, start, "bfloat16") == pytest.approx(1.0, abs=1e-3), (
        "all of it is below bfloat16's last bit"
    )
    assert rounding_share(large, start, "bfloat16") < 0.02 and rounding_share(small, start, "float32") == 0.0
    assert rounding_share(start, start, "bfloat16") == 0.0
    path = f"model.path={folder(tmp_path / 'start', torch.bfloat16)}"

    def asked(*changes: str) -> bool:
        return may_be_too_coarse(load("tiny/dpo", [path, "model.tiny=null", *changes]).stages[0].recipe)

    assert (
        asked("learners.precision=fp32")
        and not asked("learners.precision=bf16")
        and not asked("learners.precision=fp32", "export.dtype=bf16")
    )


def test_a_single_run_keeps_its_source_type_and_a_random_model_is_fp32() -> None:
    (stage,) = with_types(load("tiny/dpo").stages)
    assert stage.recipe.export.dtype == "source" and source_dtype(stage.recipe.model) == "float32"


def test_a_stage_that_exports_only_an_adapter_cannot_be_the_model_of_another(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(PIPELINE % "nowhere")
    with pytest.raises(ConfigError, match="stage sft exports only its adapter") as caught:
        load(tmp_path / "p.yaml", ["sft:model.lora={}", "sft:export.lora=adapter"])
    assert "sft:export.lora=both" in caught.value.fix


def test_the_disk_space_of_a_run() -> None:
    def of(*overrides: str) -> tuple[int, int, str]:
        recipe = load("tiny/dpo", overrides).stages[0].recipe
        algorithm = build(recipe.algorithm, recipe.rollouts)
        sizes = model_sizes(recipe, algorithm)
        return (
            checkpoint_bytes(recipe, algorithm, sizes),
            export_bytes(recipe, sizes),
            in_words(recipe, algorithm, sizes)[1],
        )

    saved, written, text = of("checkpoint.every=10m", "checkpoint.final=weights")
    assert saved == 3 * written and text.startswith("every 10m, 2 kept; weights alone at the end; export ")
    assert of("export.dtype=bf16")[1] * 2 == written
    small, both, _ = of("model.lora={rank: 2}")
    adapter = of("model.lora={rank: 2}", "export.lora=adapter")[1]
    assert small == 3 * adapter and both == adapter + of("model.lora={rank: 2}", "export.lora=merged")[1]
