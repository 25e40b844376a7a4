"""Training from Python: recipes from files or mappings, rows in memory, a function that sees every report."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from orchestrator.core.errors import ConfigError
from orchestrator.core.files import write_atomically
from orchestrator.observe.callbacks import Callback
from orchestrator.recipe.loading import dump, load
from orchestrator.recipe.schema import Recipe
from orchestrator.run.folder import ROWS
from orchestrator.run.supervise import Outcome, RunOptions
from orchestrator.run.supervise import train as run_recipe


def load_recipe(recipe: str | Path | Mapping[str, Any] | Recipe, *overrides: str) -> Recipe:
    """A checked recipe of a file, a built-in name such as `tiny/dpo`, or a mapping of sections.

    overrides: `a.b=c`, as on the command line. ConfigError lists every problem; a pipeline has no single
    recipe and is refused.
    """
    if isinstance(recipe, Mapping | Recipe):
        text = dump(recipe) if isinstance(recipe, Recipe) else yaml.safe_dump(dict(recipe), sort_keys=False)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "recipe.yaml"
            file.write_text(text)
            stages = load(file, overrides).stages
    else:
        stages = load(recipe, overrides).stages
    if len(stages) != 1:
        names = ", ".join(stage.name for stage in stages)
        raise ConfigError(
            f"{recipe} is a pipeline of {names}", fix="`orchestrator train` runs all of its stages"
        )
    return stages[0].recipe


def train(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    *overrides: str,
    output: str | Path,
    rows: Sequence[Mapping[str, Any]] | None = None,
    held_out: Sequence[Mapping[str, Any]] | None = None,
    callbacks: Sequence[Callback] = (),
    in_process: bool = False,
    extend: bool = False,
) -> Outcome:
    """Runs a recipe to its end in the folder `output`, as `orchestrator train` does.

    The same call resumes from the newest checkpoint. rows, held_out: records in memory in the place of
    data.train and data.eval; they are written to `output`/rows. callbacks: called with each report.
    in_process: without Ray. extend: the run may end later than it was begun to.
    """
    folder = Path(output)
    changes = [
        f"data.{key}={_written(folder / ROWS / f'{key}.jsonl', records)}"
        for key, records in (("train", rows), ("eval", held_out))
        if records is not None
    ]
    options = RunOptions(extend=extend, in_process=in_process, callbacks=tuple(callbacks))
    return run_recipe(load_recipe(recipe, *changes, *overrides), folder, Console(), options=options)


def _written(file: Path, records: Sequence[Mapping[str, Any]]) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(file, "".join(json.dumps(dict(record), ensure_ascii=False) + "\n" for record in records))
    return json.dumps(str(file.absolute()))
