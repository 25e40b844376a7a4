"""Commands that look before anything starts: `plan` for a run, `doctor` for machines.

Heavy imports stand inside the commands, as in `main.py`.
"""

import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from orchestrator.cli.options import START, Overrides, RecipeArgument, WorkingDir, out, show
from orchestrator.cluster.submit import submission
from orchestrator.cluster.submit.ray_jobs import Jobs, exit_code
from orchestrator.cluster.submit.upload import collect
from orchestrator.core.errors import ConfigError
from orchestrator.recipe import loading as recipes
from orchestrator.recipe.pipeline import Stage, references

if TYPE_CHECKING:
    from orchestrator.plan.hardware import Hardware
    from orchestrator.plan.planner import Plan

app = typer.Typer(add_completion=False)
PLAN_WIDTH = 100
"""Columns of a plan that is not printed on a terminal."""
ON_GPUS = ("learners.workers=auto", "learners.gpus_per_worker=auto")
"""What a plan for GPUs fills in unless the command line sets it."""
JSON_DOCUMENT = re.compile(r"^[\[{]$.*", re.MULTILINE | re.DOTALL)
"""A JSON document in a log: from a line with its first bracket to the end."""


@app.command(rich_help_panel=START)
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option("--address", help="plan for the nodes of this cluster, http://HEAD:8265"),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="plan for GPUs that are not here, e.g. h100-80g")
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="with --gpu: number of machines")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="with --gpu: GPUs of a machine (default: the usual number)")
    ] = None,
    network_gbit: Annotated[
        float | None,
        typer.Option(min=0.001, help="with --gpu: Gbit/s between machines (default: 100)"),
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(metavar="MEAN,MAX", help="plan without data: tokens of prompt and completion together"),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="plan without the model: a known shape, e.g. llama-3-8b, or a config.json"),
    ] = None,
    full_recipe: Annotated[
        bool, typer.Option("--recipe", help="print the resolved recipe too, with every default")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    working_dir: WorkingDir = Path("."),
) -> None:
    """Show how a run will be cut for your hardware, and why, without starting it.

    With --address or --gpu there are as many workers as those machines have room for.
    """
    if address is not None:
        options = [
            *(["--lengths", lengths] if lengths else []),
            *(["--shape", shape] if shape else []),
            *(["--json"] if as_json else []),
            *(["--recipe"] if full_recipe else []),
        ]
        _plan_on_cluster(address, recipe, overrides or (), options, working_dir, as_json)
        return
    hardware = _planned_hardware(gpu, nodes, gpus_per_node, network_gbit)
    loaded = recipes.load(recipe, [*(ON_GPUS if gpu else ()), *(overrides or ())])
    from orchestrator.plan.sketch import Lengths
    from orchestrator.run.stages import plan_stages

    plans = plan_stages(loaded.stages, hardware, Lengths.parse(lengths) if lengths else None, shape)
    if as_json:
        _print_json(plans, loaded.stages)
    else:
        _print_plans(plans, loaded.stages, full_recipe)


def _plan_on_cluster(
    address: str,
    recipe: str,
    overrides: Sequence[str],
    options: Sequence[str],
    working_dir: Path,
    as_json: bool,
) -> None:
    """Runs `plan` on the cluster; a mistake in the recipe is an error before anything is uploaded."""
    changes = ["learners.workers=auto", *overrides]
    recipes.load(recipe, changes)
    _run_on_cluster(
        address, recipe, working_dir, lambda uploaded: ["plan", uploaded, *changes, *options], as_json=as_json
    )


def _planned_hardware(
    gpu: str | None, nodes: int, gpus_per_node: int | None, network_gbit: float | None
) -> "Hardware | None":
    """The machines that --gpu describes; None for this machine. ConfigError if --gpu is missing."""
    if gpu is None:
        if nodes > 1 or gpus_per_node or network_gbit:
            raise ConfigError(
                "--nodes, --gpus-per-node and --network-gbit have no effect without --gpu",
                fix="add e.g. --gpu h100-80g",
            )
        return None
    from orchestrator.plan.hardware import hypothetical_hardware

    return hypothetical_hardware(nodes, gpu, gpus_per_node, network_gbit)


def _print_json(plans: "Sequence[tuple[str, Plan]]", stages: Sequence[Stage]) -> None:
    """One document for one stage, a list for more."""
    ignored = {stage.name: [str(key) for key in stage.ignored] for stage in stages}
    documents = [{"stage": name, **p.to_json(), "not_read": ignored[name]} for name, p in plans]
    print(json.dumps(documents[0] if len(documents) == 1 else documents, indent=1))


def _print_plans(plans: "Sequence[tuple[str, Plan]]", stages: Sequence[Stage], full_recipe: bool) -> None:
    """Each plan, keys that nothing reads, stages that cannot be planned yet, and on request the recipes."""
    from orchestrator.plan.view import not_read, render

    page = out if out.is_terminal else Console(width=PLAN_WIDTH, highlight=False, markup=False)
    written = {stage.name: stage.recipe for stage in stages}
    for name, p in plans:
        out.rule(name, align="left")
        page.print(render(p, written[name]), soft_wrap=False)
    for stage in stages:
        if stage.ignored:
            out.rule(f"{stage.name}, keys", align="left")
            out.print(not_read(stage.ignored))
        if needed := ", ".join(dict.fromkeys(references(stage.recipe).values())):
            out.print(f"{stage.name} is planned once the stages that it needs are trained ({needed})")
    for name, p in plans if full_recipe else ():
        out.rule(f"{name}, resolved recipe", align="left")
        out.print(recipes.dump(p.recipe))


@app.command(rich_help_panel=START)
def doctor(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="recipe whose needs are checked as well")
    ] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option("--address", help="cluster to check, http://HEAD:8265 (default: this machine)"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="run folder that the nodes will share")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
    working_dir: WorkingDir = Path("."),
) -> None:
    """Check every machine and show a fix for each problem.

    It looks at versions, GPUs, storage, network, bandwidth and the cluster's token.
    """
    loaded = recipes.load(recipe, overrides or ()) if recipe is not None else None
    folder = output.absolute() if output else None
    if address is not None:
        options = [*(["--output", str(folder)] if folder else []), *(["--json"] if as_json else [])]

        def command(uploaded: str) -> list[str]:
            return ["doctor", *([uploaded, *(overrides or ())] if uploaded else []), *options]

        _run_on_cluster(address, recipe, working_dir, command, as_json=as_json)
        return
    from orchestrator.cluster.doctor.findings import render
    from orchestrator.run.preflight import exit_code as code_of
    from orchestrator.run.stages import diagnose

    findings = diagnose(loaded.stages if loaded else (), folder)
    if as_json:
        print(json.dumps([asdict(f) for f in findings], indent=1))
    else:
        show(render(findings))
    if code := code_of(findings):
        sys.exit(code)


def _run_on_cluster(
    address: str,
    recipe: str | None,
    working_dir: Path,
    command: Callable[[str], list[str]],
    *,
    as_json: bool,
) -> None:
    """Runs a command as a Ray job, shows what it prints and ends with its exit code.

    `command` makes the command line from the recipe's name in the upload ("" without a recipe). With
    as_json only the JSON document of the log is printed.
    """
    name = submission.path_in_upload(recipe, working_dir) if recipe is not None else ""
    jobs, upload = Jobs(address), collect(working_dir)
    id = submission.run_command(jobs, command(name), upload)
    attempt = jobs.follow(
        id, (lambda text: None) if as_json else lambda text: print(text, end="", flush=True)
    )
    if as_json:
        document = JSON_DOCUMENT.search(jobs.logs(id))
        print(document[0].rstrip() if document else jobs.logs(id))
    if attempt.exit_code is None and attempt.status != "SUCCEEDED":
        print(attempt.message, file=sys.stderr)  # the job ended before it printed anything
    if code := exit_code(attempt):
        sys.exit(code)
