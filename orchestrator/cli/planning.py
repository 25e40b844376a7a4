"""Commands that look before anything starts: `plan` a run, and the `doctor` for machines."""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from orchestrator.cli.options import Overrides, RecipeArgument, WorkingDir, out, show
from orchestrator.cluster.submit import submission
from orchestrator.cluster.submit.ray_jobs import Jobs, exit_code
from orchestrator.cluster.submit.upload import collect
from orchestrator.core.errors import ConfigError
from orchestrator.recipe import loading as recipes
from orchestrator.recipe.pipeline import references

app = typer.Typer(add_completion=False)
PLAN_WIDTH = 100
"""Columns of a plan that is not read on a terminal."""
ON_GPUS = ("learners.workers=auto", "learners.gpus_per_worker=auto")
"""What a plan for GPUs fills in where the command line says nothing else."""


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address", help="plan on the nodes of this cluster, http://HEAD:8265, bandwidth measured"
        ),
    ] = None,
    gpu: Annotated[
        str | None, typer.Option("--gpu", help="plan without the machines: a GPU of the table, e.g. h100-80g")
    ] = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="with --gpu: machines")] = 1,
    gpus_per_node: Annotated[
        int | None, typer.Option(min=1, help="with --gpu; default: as many as is usual")
    ] = None,
    network_gbit: Annotated[
        float | None, typer.Option(min=0.001, help="with --gpu: Gbit/s between machines; default 100")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(metavar="MEAN,MAX", help="plan without data: tokens of prompt and completion together"),
    ] = None,
    shape: Annotated[
        str | None,
        typer.Option(help="plan without the model: a known one, e.g. llama-3-8b, or a config.json"),
    ] = None,
    whole: Annotated[
        bool, typer.Option("--recipe", help="print the whole resolved recipe too, with every default")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    working_dir: WorkingDir = Path("."),
) -> None:
    """Dry run: data report, batch arithmetic, ZeRO stage and sync policy with the reason, memory and traffic.
    With --address or
    --gpu the workers are as many as those machines have room for."""
    if address is not None:
        fill = ["learners.workers=auto", *(overrides or ())]
        recipes.load(recipe, fill)
        options = [
            *(["--lengths", lengths] if lengths else []),
            *(["--shape", shape] if shape else []),
            *(["--json"] if as_json else []),
        ]
        options += ["--recipe"] if whole else []
        _ask_cluster(
            address, recipe, working_dir, lambda there: ["plan", there, *fill, *options], document=as_json
        )
        return
    if gpu is None and (nodes > 1 or gpus_per_node or network_gbit):
        raise ConfigError(
            "--nodes, --gpus-per-node and --network-gbit say nothing without --gpu",
            fix="add e.g. --gpu h100-80g",
        )
    from orchestrator.plan import hardware

    machines = hardware.hypothetical_hardware(nodes, gpu, gpus_per_node, network_gbit) if gpu else None
    loaded = recipes.load(recipe, [*(ON_GPUS if gpu else ()), *(overrides or ())])
    from orchestrator.plan.sketch import Lengths
    from orchestrator.plan.view import not_read, render
    from orchestrator.run.stages import plan_stages

    plans = plan_stages(loaded.stages, machines, Lengths.parse(lengths) if lengths else None, shape)
    if as_json:
        ignored = {stage.name: [str(key) for key in stage.ignored] for stage in loaded.stages}
        documents = [{"stage": name, **p.to_json(), "not_read": ignored[name]} for name, p in plans]
        print(json.dumps(documents[0] if len(documents) == 1 else documents, indent=1))
        return
    page = out if out.is_terminal else Console(width=PLAN_WIDTH, highlight=False, markup=False)
    given = {stage.name: stage.recipe for stage in loaded.stages}
    for name, p in plans:
        out.rule(name, align="left")
        page.print(render(p, given[name]), soft_wrap=False)
    for stage in loaded.stages:
        if stage.ignored:
            out.rule(f"{stage.name}, keys", align="left")
            out.print(not_read(stage.ignored))
        if needed := ", ".join(dict.fromkeys(references(stage.recipe).values())):
            out.print(
                f"{stage.name} is planned when what it takes from other stages has been trained ({needed})"
            )
    for name, p in plans if whole else ():
        out.rule(f"{name}, resolved recipe", align="left")
        out.print(recipes.dump(p.recipe))


@app.command()
def doctor(
    recipe: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="checks what this run needs as well")
    ] = None,
    overrides: Overrides = None,
    address: Annotated[
        str | None,
        typer.Option("--address", help="look at this cluster, http://HEAD:8265; default: this machine"),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="the run folder that the nodes will share")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    working_dir: WorkingDir = Path("."),
) -> None:
    """Looks at every node: versions, GPUs, storage, network, bandwidth, token. Each trouble comes with its
    fix."""
    loaded = recipes.load(recipe, overrides or ()) if recipe is not None else None
    folder = output.absolute() if output else None
    if address is not None:
        options = [*(["--output", str(folder)] if folder else []), *(["--json"] if as_json else [])]

        def words(there: str) -> list[str]:
            return ["doctor", *([there, *(overrides or ())] if there else []), *options]

        _ask_cluster(address, recipe, working_dir, words, document=as_json)
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


def _ask_cluster(
    address: str, recipe: str | None, working_dir: Path, words: Callable[[str], list[str]], *, document: bool
) -> None:
    """Runs a command on the cluster and shows what it says. words: the command, of the recipe's name there
    ("" without one); document: it says JSON, and nothing else is to be shown."""

    name = submission.path_in_upload(recipe, working_dir) if recipe is not None else ""
    jobs, upload = Jobs(address), collect(working_dir)
    id = submission.run_command(jobs, words(name), upload)
    attempt = jobs.follow(
        id, (lambda text: None) if document else lambda text: print(text, end="", flush=True)
    )
    if document:
        found = re.search(r"^[\[{]$.*", jobs.logs(id), re.MULTILINE | re.DOTALL)
        print(found[0].rstrip() if found else jobs.logs(id))
    if attempt.exit_code is None and attempt.status != "SUCCEEDED":
        print(attempt.message, file=sys.stderr)  # it ended before it could say anything
    if code := exit_code(attempt):
        sys.exit(code)
