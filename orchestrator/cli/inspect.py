"""Commands that only read: recipes, their schema, the first batch, reports and comparisons of runs."""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import RESULTS, START, Overrides, RecipeArgument, last_recipe, out, show
from orchestrator.core.errors import OutputError
from orchestrator.recipe import loading as recipes
from orchestrator.recipe.files import builtin_recipes

app = typer.Typer(add_completion=False)
recipes_app = typer.Typer(no_args_is_help=True, help="List, show and copy the built-in recipes.")
config_app = typer.Typer(no_args_is_help=True, help="Print every recipe key, as a page or as a JSON schema.")
RecipeName = Annotated[
    str, typer.Argument(metavar="NAME", help="built-in name such as tiny/dpo, or YAML file")
]

app.add_typer(recipes_app, name="recipes", rich_help_panel=START)
app.add_typer(config_app, name="config", rich_help_panel=START)


@app.command(rich_help_panel=RESULTS)
def report(directory: Annotated[Path, typer.Argument(metavar="DIR", help="run folder")]) -> None:
    """Write the curves and samples of a run into one file, report.html."""
    from orchestrator.observe.report.html import write_report

    out.print(str(write_report(directory)))


@app.command(rich_help_panel=RESULTS)
def compare(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="run folders; the folder of a pipeline stands for its stages"),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show runs side by side: differences of their recipes, metrics, speed."""
    from orchestrator.observe.report.compare import read_run, run_folders, table, to_json

    runs = [read_run(name, folder) for directory in directories for name, folder in run_folders(directory)]
    if as_json:
        print(json.dumps(to_json(runs), indent=1))
    else:
        show(table(runs))


@app.command(rich_help_panel=START)
def inspect(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    examples: Annotated[int, typer.Option(min=1, help="number of examples to show")] = 3,
) -> None:
    """Show the first batch, its tokens coloured by the loss mask."""
    cfg = last_recipe(recipe, overrides)
    from orchestrator.observe.report.tokens import render_group
    from orchestrator.plan.view import data_notes
    from orchestrator.run.evaluate import first_batch

    groups, decode, report = first_batch(cfg)
    for line in data_notes(report):
        out.print(line)
    for group in groups[:examples]:
        out.rule(f"example {group.id}", align="left")
        out.print(render_group(group, decode))


@recipes_app.command("ls")
def recipes_ls() -> None:
    """List the built-in recipes, each with its first comment."""
    for name, path in builtin_recipes().items():
        first = path.read_text().splitlines()[0].removeprefix("#").strip()
        out.print(f"{name:<24}{first}")
    out.print(
        "start/… are for your own model and data (orchestrator init writes a recipe that fits them); tiny/… "
        "are for toy models with random weights"
    )


@recipes_app.command("show")
def recipes_show(name: RecipeName) -> None:
    """Print a recipe file unchanged."""
    out.print(recipes.find(name).read_text())


@recipes_app.command("cp")
def recipes_cp(
    name: RecipeName, target: Annotated[Path, typer.Argument(metavar="TARGET", help="folder to copy into")]
) -> None:
    """Copy a recipe and the files that it extends into the folder TARGET."""
    source = recipes.find(name)
    target.mkdir(parents=True, exist_ok=True)
    for file in recipes.recipe_files(source):
        if (target / file.name).exists():
            raise OutputError(f"{target / file.name} exists already", fix="choose another folder")
    for file in recipes.recipe_files(source):
        shutil.copyfile(file, target / file.name)
        out.print(str(target / file.name))


@config_app.command("schema")
def config_schema() -> None:
    """Print the JSON schema of recipe files, for editors."""
    print(json.dumps(recipes.json_schema(), indent=1))


@config_app.command("reference")
def config_reference() -> None:
    """Print every key with its default and meaning, as Markdown."""
    from orchestrator.recipe.reference_page import render

    print(render(), end="")
