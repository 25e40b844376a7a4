"""Commands that speak to a Ray cluster: submit a run, see where it stands, read it, stop it, go on.

Heavy imports happen inside the commands, as in `cli`.
"""

import json
import re
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console, RenderableType

from orchestrator.recipe import loading as recipes
from orchestrator.cluster.submit import submission
from orchestrator.cluster.submit.ray_jobs import LOCAL, Jobs, exit_code
from orchestrator.cluster.quiet import is_small_talk
from orchestrator.core.errors import ConfigError, Exit, OrchestratorError
from orchestrator.observe.live_table import LiveTable, StepLine
from orchestrator.recipe.pipeline import references
from orchestrator.cli.status import LOG_AGAIN, StatusRow, status_lines, status_table
from orchestrator.cluster.submit.upload import collect

app = typer.Typer(add_completion=False)
out = Console(highlight=False, soft_wrap=True, markup=False)  # names, paths and logs are the user's
WIDE = 10_000
"""Columns of a table in a pipe: nothing is folded where no screen ends."""

RecipeArgument = Annotated[str, typer.Argument(metavar="RECIPE", help="a YAML file, or a built-in name such as tiny/dpo")]
Overrides = Annotated[list[str] | None, typer.Argument(metavar="[a.b=c]...", help="overrides, e.g. batch.effective=64")]
Address = Annotated[
    str, typer.Option("--address", envvar=["RAY_API_SERVER_ADDRESS", "RAY_DASHBOARD_ADDRESS"], help="the cluster's dashboard, http://HEAD:8265")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="the name of a submitted run, or the id of one attempt")]
WorkingDir = Annotated[Path, typer.Option("--working-dir", help="the folder that the job brings along: recipe, code, small data")]
Grace = Annotated[int, typer.Option("--stop-grace", min=1, metavar="SECONDS", help="between SIGTERM and SIGKILL when the job is stopped")]
Follow = Annotated[bool, typer.Option("--follow/--no-follow", help="show the job's log until it ends; Ctrl-C leaves the job running")]
PLAN_WIDTH = 100
"""Columns of a plan that is not read on a terminal."""
ON_GPUS = ("learners.workers=auto", "learners.gpus_per_worker=auto")
"""What a plan for GPUs fills in where the command line says nothing else."""


def show(table: RenderableType) -> None:
    """A table: as wide as the terminal, or as it needs in a pipe."""
    console = out if out.is_terminal else Console(highlight=False, markup=False, width=WIDE)
    console.print(table, soft_wrap=False)


@app.command()
def submit(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    address: Address = LOCAL,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="run folder on storage that all nodes see; default ./runs/NAME")] = None,
    working_dir: WorkingDir = Path("."),
    stop_grace: Grace = submission.STOP_GRACE_S,
    follow: Follow = True,
    to: Annotated[str | None, typer.Option("--to", metavar="slurm|k8s|sky", help="start machines by a scheduler instead")] = None,
    only_print: Annotated[bool, typer.Option("--print", help="with --to: print what would be handed over")] = False,
    nodes: Annotated[int, typer.Option(min=1, help="with --to: machines")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="with --to")] = 8,
    cpus_per_node: Annotated[int, typer.Option(min=1, help="with --to")] = 32,
    gpu: Annotated[str, typer.Option(help="with --to sky: the kind of GPU")] = "H100",
    image: Annotated[str, typer.Option(help="with --to k8s or sky: a container built from docker/")] = "orchestrator:latest",
) -> None:
    """Runs a recipe as a Ray job; submitting the same again follows it, or goes on where it ended early."""
    loaded = recipes.load(recipe, overrides or ())  # a mistake in it is told before anything leaves this machine
    folder = (output or Path("runs") / loaded.name).absolute()
    if to is not None:
        from orchestrator.cluster.submit.schedulers import Launch, artefact, dispatch

        changes = tuple(overrides or ())
        text = artefact(to, Launch(recipe, changes, loaded.name, nodes, gpus_per_node, cpus_per_node, str(folder), image, gpu))
        print((text if only_print else dispatch(to, text)).rstrip("\n"))
        return

    command = submission.entrypoint(recipe, overrides or (), folder, working_dir)
    upload = collect(working_dir)
    submission.check_paths(recipe, loaded.stages, upload)
    jobs = Jobs(address)
    decision = submission.decide(jobs.attempts(loaded.name), command)
    if decision.number is not None:
        out.print(f"uploading {upload.summary()}")
        id = submission.start(jobs, loaded.name, command, decision.number, upload, stop_grace)
        again = "" if decision.attempt is None else f"; {decision.attempt.id} ended as {decision.attempt.status}, this goes on in its run folder"
        out.print(f"submitted {id} to {address}{again}")
    else:
        assert decision.attempt is not None
        id = decision.attempt.id
        out.print(f"{id} is {decision.attempt.status} already; nothing was submitted")
    out.print(f"run folder  {folder}  (all nodes must see it: orchestrator doctor)")
    _say_next(loaded.name, address)
    if follow:
        _follow(jobs, id, loaded.name, address)


@app.command()
def plan(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option("--address", help="plan on the nodes of this cluster, http://HEAD:8265, bandwidth measured")] = None,
    gpu: Annotated[str | None, typer.Option("--gpu", help="plan without the machines: a GPU of the table, e.g. h100-80g")] = None,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="with --gpu: machines")] = 1,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="with --gpu; default: as many as is usual")] = None,
    network_gbit: Annotated[float | None, typer.Option(min=0.001, help="with --gpu: Gbit/s between machines; default 100")] = None,
    lengths: Annotated[str | None, typer.Option(metavar="MEAN,MAX", help="plan without data: tokens of prompt and completion together")] = None,
    shape: Annotated[str | None, typer.Option(help="plan without the model: a known one, e.g. llama-3-8b, or a config.json")] = None,
    whole: Annotated[bool, typer.Option("--recipe", help="print the whole resolved recipe too, with every default")] = False,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    working_dir: WorkingDir = Path("."),
) -> None:
    """Dry run: data report, batch arithmetic, ZeRO stage and sync policy with the reason, memory and traffic. With --address or
    --gpu the workers are as many as those machines have room for."""
    if address is not None:
        fill = ["learners.workers=auto", *(overrides or ())]
        recipes.load(recipe, fill)
        options = [*(["--lengths", lengths] if lengths else []), *(["--shape", shape] if shape else []), *(["--json"] if as_json else [])]
        options += ["--recipe"] if whole else []
        _ask_cluster(address, recipe, working_dir, lambda there: ["plan", there, *fill, *options], document=as_json)
        return
    if gpu is None and (nodes > 1 or gpus_per_node or network_gbit):
        raise ConfigError("--nodes, --gpus-per-node and --network-gbit say nothing without --gpu", fix="add e.g. --gpu h100-80g")
    from orchestrator.plan import hardware

    machines = hardware.imagined(nodes, gpu, gpus_per_node, network_gbit) if gpu else None
    loaded = recipes.load(recipe, [*(ON_GPUS if gpu else ()), *(overrides or ())])
    from orchestrator.run.supervise import plan_stages
    from orchestrator.plan.view import not_read, render
    from orchestrator.plan.sketch import Lengths

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
            out.print(f"{stage.name} is planned when what it takes from other stages has been trained ({needed})")
    for name, p in plans if whole else ():
        out.rule(f"{name}, resolved recipe", align="left")
        out.print(recipes.dump(p.recipe))


@app.command()
def doctor(
    recipe: Annotated[str | None, typer.Argument(metavar="[RECIPE]", help="checks what this run needs as well")] = None,
    overrides: Overrides = None,
    address: Annotated[str | None, typer.Option("--address", help="look at this cluster, http://HEAD:8265; default: this machine")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="the run folder that the nodes will share")] = None,
    as_json: Annotated[bool, typer.Option("--json")] = False,
    working_dir: WorkingDir = Path("."),
) -> None:
    """Looks at every node: versions, GPUs, storage, network, bandwidth, token. Each trouble comes with its fix."""
    loaded = recipes.load(recipe, overrides or ()) if recipe is not None else None
    folder = output.absolute() if output else None
    if address is not None:
        options = [*(["--output", str(folder)] if folder else []), *(["--json"] if as_json else [])]

        def words(there: str) -> list[str]:
            return ["doctor", *([there, *(overrides or ())] if there else []), *options]

        _ask_cluster(address, recipe, working_dir, words, document=as_json)
        return
    from orchestrator.run.supervise import diagnose
    from orchestrator.cluster.doctor.checks import render
    from orchestrator.run.preflight import exit_code as code_of

    findings = diagnose(loaded.stages if loaded else (), folder)
    if as_json:
        print(json.dumps([asdict(f) for f in findings], indent=1))
    else:
        show(render(findings))
    if code := code_of(findings):
        sys.exit(code)


@app.command()
def status(
    run: Annotated[str | None, typer.Argument(metavar="[RUN]", help="a run; without it, all runs of the cluster")] = None,
    address: Address = LOCAL,
    as_json: Annotated[bool, typer.Option("--json")] = False,
) -> None:
    """Where submitted runs stand: step, exit code, age. In a pipe a line for each attempt, columns by tabs."""
    jobs = Jobs(address)
    attempts = jobs.attempts(run)
    if run is not None and not attempts:
        attempts = [jobs.find(run)]
    newest = {attempt.run: attempt.id for attempt in attempts}
    now = time.time()
    rows = []
    for attempt in attempts:
        read = run is not None or attempt.id == newest[attempt.run]  # a log is a request of its own
        rows.append(StatusRow.of(attempt, jobs.logs(attempt.id) if read else "", now))
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    elif out.is_terminal:
        show(status_table(rows) if rows else f"no run was submitted to {address}")
    elif rows:
        print(status_lines(rows))


@app.command()
def logs(run: RunArgument, address: Address = LOCAL, follow: Follow = False) -> None:
    """What a run's newest attempt has said."""
    jobs = Jobs(address)
    attempt = jobs.find(run)
    if follow:
        _follow(jobs, attempt.id, attempt.run, address)
    else:
        print("".join(line for line in jobs.logs(attempt.id).splitlines(keepends=True) if not is_small_talk(line)), end="")


@app.command()
def stop(run: RunArgument, address: Address = LOCAL) -> None:
    """Asks a run to save and end, and waits for it; `resume` goes on from there."""
    jobs = Jobs(address)
    attempt = jobs.find(run)
    if attempt.is_over:
        out.print(f"{attempt.id} is {attempt.status} already")
        return
    ended = jobs.stop(attempt.id)
    out.print(f"{ended.id} is {ended.status}; go on with: orchestrator resume {ended.run} --address {address}")


@app.command()
def resume(
    run: RunArgument,
    address: Address = LOCAL,
    working_dir: WorkingDir = Path("."),
    stop_grace: Grace = submission.STOP_GRACE_S,
    follow: Follow = True,
) -> None:
    """Starts a run again that was stopped or failed: the same command, from its last checkpoint."""
    jobs = Jobs(address)
    last = jobs.find(jobs.find(run).run)
    decision = submission.decide([last], last.entrypoint)
    if decision.number is None:
        raise OrchestratorError(f"{last.id} is {last.status}: there is nothing to resume", fix=f"orchestrator logs {last.run} --address {address}")
    upload = collect(working_dir)
    out.print(f"uploading {upload.summary()}")
    id = submission.start(jobs, last.run, last.entrypoint, decision.number, upload, stop_grace)
    out.print(f"submitted {id} to {address}: `{last.entrypoint}`")
    _say_next(last.run, address)
    if follow:
        _follow(jobs, id, last.run, address)


def _ask_cluster(address: str, recipe: str | None, working_dir: Path, words: Callable[[str], list[str]], *, document: bool) -> None:
    """Runs a command on the cluster and shows what it says. words: the command, of the recipe's name there ("" without one);
    document: it says JSON, and nothing else is to be shown."""

    name = submission.there(recipe, working_dir) if recipe is not None else ""
    jobs, upload = Jobs(address), collect(working_dir)
    id = submission.ask(jobs, words(name), upload)
    attempt = jobs.follow(id, (lambda text: None) if document else lambda text: print(text, end="", flush=True))
    if document:
        found = re.search(r"^[\[{]$.*", jobs.logs(id), re.MULTILINE | re.DOTALL)
        print(found[0].rstrip() if found else jobs.logs(id))
    if attempt.exit_code is None and attempt.status != "SUCCEEDED":
        print(attempt.message, file=sys.stderr)  # it ended before it could say anything
    if code := exit_code(attempt):
        sys.exit(code)


def _follow(jobs: Jobs, id: str, run: str, address: str) -> None:
    """Shows the log until the job is over; ends with the driver's exit code."""

    view = LogView(out)
    try:
        attempt = jobs.follow(id, view.write)
    except KeyboardInterrupt:
        view.close()
        out.print(f"\n{id} goes on; look again with: orchestrator logs {run} --follow --address {address}")
        sys.exit(128 + 2)
    view.close()
    code = exit_code(attempt)
    out.print(f"{id} {attempt.status}")
    if code == Exit.RESUMABLE:
        out.print(f"it can go on: orchestrator resume {run} --address {address}")
    elif code:
        out.print(attempt.message.partition(LOG_AGAIN)[0])  # the log has been shown
    if code:
        sys.exit(code)


class LogView:
    """A followed log: steps as the live table on a terminal, everything else as it came."""

    def __init__(self, console: Console) -> None:
        self._console, self._table, self._rest = console, LiveTable(console), ""

    def write(self, text: str) -> None:
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            self._line(line)

    def close(self) -> None:
        if self._rest:
            self._line(self._rest)
        self._table.stop()

    def _line(self, line: str) -> None:
        if is_small_talk(line):
            return
        step = StepLine.parse(line) if self._console.is_interactive else None
        if step is None:
            self._console.print(line, markup=False)
        else:
            self._table.add(step)


def _say_next(run: str, address: str) -> None:
    where = "" if address == LOCAL else f" --address {address}"
    for words in (f"status {run}", f"logs {run} --follow", f"stop {run}", f"resume {run}"):
        out.print(f"  orchestrator {words}{where}")
