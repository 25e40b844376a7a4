"""What commands share: the console, the panels of `--help`, and arguments that several commands take."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, RenderableType

from orchestrator.recipe import loading as recipes
from orchestrator.recipe.pipeline import STAGE

if TYPE_CHECKING:
    from orchestrator.recipe.schema import Recipe

out = Console(highlight=False, soft_wrap=True, markup=False)
"""Prints without markup, since names, paths and logs are the user's."""
WIDE = 10_000
"""Columns of a table in a pipe, where nothing is folded."""
START, TRAIN, RESULTS, CLUSTER = "Before a run", "A run", "After a run", "Runs on a cluster"
"""Panels of `orchestrator --help`."""
RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="YAML file, or built-in name such as tiny/dpo")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[a.b=c]...", help="overrides of recipe keys, e.g. batch.effective=64"),
]
Address = Annotated[
    str,
    typer.Option(
        "--address",
        envvar=["RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS"],
        help="dashboard of the cluster, http://HEAD:8265",
    ),
]
WorkingDir = Annotated[
    Path, typer.Option("--working-dir", help="folder to upload with the job: recipe, code, small data")
]


def show(table: RenderableType) -> None:
    """Prints a table as wide as the terminal, or in a pipe as wide as its content."""
    console = out if out.is_terminal else Console(highlight=False, markup=False, width=WIDE)
    console.print(table, soft_wrap=False)


def last_recipe(recipe: str, overrides: list[str] | None) -> "Recipe":
    """The recipe of the last stage, with the model that its first ancestor starts from.

    For commands that need no trained weights.
    """
    stages = {stage.name: stage.recipe for stage in recipes.load(recipe, overrides or ()).stages}
    last = model = list(stages.values())[-1]
    while (path := model.model.path or "").startswith(STAGE):
        model = stages[path.removeprefix(STAGE)]
    return last.model_copy(update={"model": model.model})
