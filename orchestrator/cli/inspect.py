"""Commands that read: recipes, their schema, the first batch, reports and comparisons of runs."""

import json
import shutil
from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli.options import Overrides, RecipeArgument, last_recipe, out, show
from orchestrator.core.errors import OutputError
from orchestrator.recipe import loading as recipes
from orchestrator.recipe.files import builtin_recipes

app = typer.Typer(add_completion=False)
recipes_app = typer.Typer(no_args_is_help=True, help="The recipes that come with the program.")
config_app = typer.Typer(no_args_is_help=True, help="The recipe schema.")


app.add_typer(recipes_app, name="recipes")
app.add_typer(config_app, name="config")


@app.command()
def report(directory: Annotated[Path, typer.Argument(metavar="DIR", help="a run folder")]) -> None:
    """Writes one self-contained report.html with the curves and sample pairs."""
    from orchestrator.observe.report.html import write_report

    out.print(str(write_report(directory)))


@app.command()
def compare(
    directories: Annotated[
        list[Path],
        typer.Argument(metavar="DIR...", help="run folders; a pipeline's root stands for its stages"),
    ],
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Runs side by side: where their recipes differ, held-out and training metrics, speed."""
    from orchestrator.observe.report.compare import read_run, run_folders, table, to_json

    runs = [read_run(name, folder) for directory in directories for name, folder in run_folders(directory)]
    if as_json:
        print(json.dumps(to_json(runs), indent=1))
    else:
        show(table(runs))


@app.command()
def inspect(
    recipe: RecipeArgument, overrides: Overrides = None, examples: Annotated[int, typer.Option(min=1)] = 3
) -> None:
    """The first batch, tokens coloured by loss mask."""
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
    """Names of the built-in recipes, with their first comment."""
    for name, path in builtin_recipes().items():
        first = path.read_text().splitlines()[0].removeprefix("#").strip()
        out.print(f"{name:<24}{first}")
    out.print(
        "start/… are for a model and data of your own (orchestrator init writes one fitted to them); tiny/… "
        "are for random-weight toy models"
    )


@recipes_app.command("show")
def recipes_show(name: str) -> None:
    """Prints a recipe file as it is."""
    out.print(recipes.find(name).read_text())


@recipes_app.command("cp")
def recipes_cp(name: str, target: Path) -> None:
    """Copies a recipe, with the files it extends, into the folder TARGET."""
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
    """The JSON schema of recipe files, for editors."""
    print(json.dumps(recipes.json_schema(), indent=1))


@config_app.command("reference")
def config_reference() -> None:
    """Every key with its default and what it means, as Markdown."""
    from orchestrator.recipe.reference_page import render

    print(render(), end="")
