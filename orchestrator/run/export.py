"""Exports as Hugging Face folders: the policy at the end of a run, and later any checkpoint, without Ray.

learners --export_policy--> RUN/export
RUN/recipe.yaml + RUN/checkpoints/step_N --export_run--> folder
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.cluster.ranks import Ranks
from orchestrator.core.errors import ConfigError, MissingInput
from orchestrator.learner.export import export_saved
from orchestrator.models.rounding import widened
from orchestrator.recipe.loading import load
from orchestrator.recipe.schema import Recipe
from orchestrator.run.checkpoints import CheckpointStore, Saved
from orchestrator.run.folder import RunFolder, run_record
from orchestrator.run.planned_run import PlannedRun, card_of


def export_policy(
    planned: PlannedRun, folder: RunFolder, learners: Ranks, note: Callable[[str], None]
) -> None:
    """Writes RUN/export from the weights that the learners hold."""
    note(f"exporting to {folder.export}")
    learners.export(folder.export, planned.card(folder))
    if remark := widened(planned.recipe, folder.export):
        note(remark)


def recipe_of(run: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of the last start of a run; MissingInput if the folder does not hold exactly one run."""
    file = run / "recipe.yaml"
    if not file.is_file():
        stages = sorted(folder.parent.name for folder in run.glob("*/recipe.yaml"))
        fix = (
            f"it holds a pipeline; name a stage: {', '.join(str(run / s) for s in stages)}"
            if stages
            else "give the --output of a run"
        )
        raise MissingInput(f"{run} is not a run folder: it has no recipe.yaml", fix=fix)
    return load(file, overrides).stages[0].recipe


def export_run(
    run: Path, recipe: Recipe, step: int | None, output: Path | None, note: Callable[[str], None]
) -> Path:
    """Writes the weights of a checkpoint as recipe.export asks, and returns the folder.

    step: None for the newest checkpoint that verifies.
    """
    saved = _saved(run, step, note)
    directory = output or run / f"export-step-{saved.progress.step}"
    if directory.exists() and not _is_export(directory):
        raise ConfigError(f"--output: {directory} exists and is not an export", fix="name a new folder")
    record = run_record(run) or {}
    card = card_of(recipe, _rows(record), run / "metrics.jsonl", last=saved.progress.step)
    directory.parent.mkdir(parents=True, exist_ok=True)
    note(f"step {saved.progress.step} of {run}, weights {recipe.export.dtype}")
    export_saved(recipe, saved.directory, directory, card, start=saved.extra_state["base_model"])
    if remark := widened(recipe, directory):
        note(remark)
    return directory


def _saved(run: Path, step: int | None, note: Callable[[str], None]) -> Saved:
    record = run_record(run)
    if record is None:
        raise MissingInput(f"{run} is not a run folder: it has no run.json", fix="give the --output of a run")
    return CheckpointStore(run / "checkpoints", run=record["fingerprint"], keep=1, note=note).at(step)


def _is_export(directory: Path) -> bool:
    """Whether the folder holds an export, which may be replaced; no other folder is."""
    return directory.is_dir() and (
        (directory / "config.json").is_file() or (directory / "adapter_config.json").is_file()
    )


def _rows(record: Mapping[str, Any]) -> str:
    return str(record.get("deciding", {}).get("rows", "unknown"))
