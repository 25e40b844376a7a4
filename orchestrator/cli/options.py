"""What commands share: the console, and arguments that several of them take."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console, RenderableType

from orchestrator.recipe import loading as recipes
from orchestrator.recipe.pipeline import STAGE

if TYPE_CHECKING:
    from orchestrator.recipe.schema import Recipe

out = Console(highlight=False, soft_wrap=True, markup=False)  # names, paths and logs are the user's
WIDE = 10_000
"""Columns of a table in a pipe: nothing is folded where no screen ends."""
RecipeArgument = Annotated[
    str, typer.Argument(metavar="RECIPE", help="a YAML file, or a built-in name such as tiny/dpo")
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[a.b=c]...", help="overrides, e.g. batch.effective=64")
]
Address = Annotated[
    str,
    typer.Option(
        "--address",
        envvar=["RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS"],
        help="the cluster's dashboard, http://HEAD:8265",
    ),
]
WorkingDir = Annotated[
    Path, typer.Option("--working-dir", help="the folder that the job brings along: recipe, code, small data")
]


def show(table: RenderableType) -> None:
    """A table: as wide as the terminal, or as it needs in a pipe."""
    console = out if out.is_terminal else Console(highlight=False, markup=False, width=WIDE)
    console.print(table, soft_wrap=False)


def last_recipe(recipe: str, overrides: list[str] | None) -> "Recipe":
    """The recipe of the last stage, with the model that its first ancestor starts from: for what needs no
    trained weights."""
    stages = {stage.name: stage.recipe for stage in recipes.load(recipe, overrides or ()).stages}
    last = model = list(stages.values())[-1]
    while (path := model.model.path or "").startswith(STAGE):
        model = stages[path.removeprefix(STAGE)]
    return last.model_copy(update={"model": model.model})
