"""What is taken from a run folder afterwards: the weights of any of its checkpoints as a Hugging Face folder,
without Ray.

RUN/recipe.yaml + RUN/checkpoints/step_N --export_saved--> folder
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orchestrator.core.errors import ConfigError, MissingInput
from orchestrator.learner.export import export_saved
from orchestrator.models.rounding import widened
from orchestrator.recipe.loading import load
from orchestrator.recipe.schema import Recipe
from orchestrator.run.checkpoints import CheckpointStore, Saved
from orchestrator.run.folder import run_record
from orchestrator.run.planned_run import card_of


def recipe_of(run: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe that a run folder was started with last; MissingInput where the folder is none of one run."""
    file = run / "recipe.yaml"
    if not file.is_file():
        stages = sorted(folder.parent.name for folder in run.glob("*/recipe.yaml"))
        fix = (
            f"it is a pipeline's; name a stage: {', '.join(str(run / s) for s in stages)}"
            if stages
            else "give the --output of a run"
        )
        raise MissingInput(f"{run} is no run folder: it has no recipe.yaml", fix=fix)
    return load(file, overrides).stages[0].recipe


def export_run(
    run: Path, recipe: Recipe, step: int | None, output: Path | None, note: Callable[[str], None]
) -> Path:
    """Writes the weights of a checkpoint (None: the newest that verifies) as recipe.export says; the folder."""
    saved = _saved(run, step, note)
    directory = output or run / f"export-step-{saved.progress.step}"
    if directory.exists() and not _ours(directory):
        raise ConfigError(f"--output: {directory} exists and is no export", fix="name a new folder")
    record = run_record(run) or {}
    card = card_of(recipe, _rows(record), run / "metrics.jsonl", last=saved.progress.step)
    directory.parent.mkdir(parents=True, exist_ok=True)
    note(f"step {saved.progress.step} of {run}, weights {recipe.export.dtype}")
    export_saved(recipe, saved.directory, directory, card, start=saved.extra_state["base_model"])
    if said := widened(recipe, directory):
        note(said)
    return directory


def _saved(run: Path, step: int | None, note: Callable[[str], None]) -> Saved:
    record = run_record(run)
    if record is None:
        raise MissingInput(f"{run} is no run folder: it has no run.json", fix="give the --output of a run")
    return CheckpointStore(run / "checkpoints", run=record["fingerprint"], keep=1, note=note).at(step)


def _ours(directory: Path) -> bool:
    """An export may be written again; nothing else is replaced."""
    return directory.is_dir() and (
        (directory / "config.json").is_file() or (directory / "adapter_config.json").is_file()
    )


def _rows(record: Mapping[str, Any]) -> str:
    return str(record.get("deciding", {}).get("rows", "unknown"))
