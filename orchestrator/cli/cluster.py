"""Commands for runs on a Ray cluster: submit, status, logs, stop, resume.

Heavy imports stand inside the commands, as in `main.py`.
"""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from orchestrator.cli.options import CLUSTER, Address, Overrides, RecipeArgument, WorkingDir, out, show
from orchestrator.cli.status import REPEATED_LOG, StatusRow, status_lines, status_table
from orchestrator.cluster.quiet import is_small_talk
from orchestrator.cluster.submit import submission
from orchestrator.cluster.submit.ray_jobs import LOCAL, Jobs, exit_code
from orchestrator.cluster.submit.upload import collect
from orchestrator.core.errors import Exit, OrchestratorError
from orchestrator.observe.live_table import LiveTable, StepLine
from orchestrator.recipe import loading as recipes

app = typer.Typer(add_completion=False)

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="name of a submitted run, or id of one attempt")
]

Grace = Annotated[
    int,
    typer.Option(
        "--stop-grace",
        min=1,
        metavar="SECONDS",
        help="time between SIGTERM and SIGKILL when the job is stopped",
    ),
]
Follow = Annotated[
    bool,
    typer.Option(
        "--follow/--no-follow", help="show the job's log until it ends; Ctrl-C leaves the job running"
    ),
]


@app.command(rich_help_panel=CLUSTER)
def submit(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    address: Address = LOCAL,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="run folder on storage that all nodes share (default: ./runs/NAME)"
        ),
    ] = None,
    working_dir: WorkingDir = Path("."),
    stop_grace: Grace = submission.STOP_GRACE_S,
    follow: Follow = True,
    to: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="slurm|k8s|sky", help="scheduler that starts the machines, instead of a Ray job"
        ),
    ] = None,
    only_print: Annotated[
        bool, typer.Option("--print", help="with --to: print the job file instead of submitting it")
    ] = False,
    nodes: Annotated[int, typer.Option(min=1, help="with --to: number of machines")] = 1,
    gpus_per_node: Annotated[int, typer.Option(min=0, help="with --to: GPUs of a machine")] = 8,
    cpus_per_node: Annotated[int, typer.Option(min=1, help="with --to: CPUs of a machine")] = 32,
    gpu: Annotated[str, typer.Option(help="with --to sky: kind of GPU")] = "H100",
    image: Annotated[
        str, typer.Option(help="with --to k8s or sky: container built from docker/")
    ] = "orchestrator:latest",
) -> None:
    """Run a recipe on a cluster; the same command again follows or resumes the run."""
    loaded = recipes.load(recipe, overrides or ())  # a mistake in it is an error before anything is uploaded
    folder = (output or Path("runs") / loaded.name).absolute()
    if to is None:
        _submit_job(recipe, overrides or (), loaded, address, folder, working_dir, stop_grace, follow)
        return
    from orchestrator.cluster.submit.schedulers import Launch, artefact, dispatch

    changes, where = tuple(overrides or ()), str(folder)
    launch = Launch(recipe, changes, loaded.name, nodes, gpus_per_node, cpus_per_node, where, image, gpu)
    text = artefact(to, launch)
    print((text if only_print else dispatch(to, text)).rstrip("\n"))


def _submit_job(
    recipe: str,
    overrides: Sequence[str],
    loaded: recipes.LoadedRecipe,
    address: str,
    folder: Path,
    working_dir: Path,
    stop_grace: int,
    follow: bool,
) -> None:
    """Starts a Ray job for the run, unless an attempt is running or has succeeded; then follows it."""
    command = submission.entrypoint(recipe, overrides, folder, working_dir)
    upload = collect(working_dir)
    submission.check_paths(recipe, loaded.stages, upload)
    jobs = Jobs(address)
    decision = submission.decide(jobs.attempts(loaded.name), command)
    if decision.number is not None:
        out.print(f"uploading {upload.summary()}")
        id = submission.start(jobs, loaded.name, command, decision.number, upload, stop_grace)
        earlier = ""
        if (last := decision.attempt) is not None:
            earlier = f"; {last.id} ended as {last.status}, this continues in its run folder"
        out.print(f"submitted {id} to {address}{earlier}")
    else:
        assert decision.attempt is not None
        id = decision.attempt.id
        out.print(f"{id} is {decision.attempt.status} already; nothing was submitted")
    out.print(f"run folder  {folder}  (all nodes must share it: orchestrator doctor)")
    _print_next_commands(loaded.name, address)
    if follow:
        _follow(jobs, id, loaded.name, address)


@app.command(rich_help_panel=CLUSTER)
def status(
    run: Annotated[
        str | None, typer.Argument(metavar="[RUN]", help="name of a run (default: all runs of the cluster)")
    ] = None,
    address: Address = LOCAL,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show where submitted runs stand: status, step, loss, exit code, age.

    In a pipe there is one line for each attempt, with tabs between the columns.
    """
    jobs = Jobs(address)
    attempts = jobs.attempts(run)
    if run is not None and not attempts:
        attempts = [jobs.find(run)]
    newest = {attempt.run: attempt.id for attempt in attempts}
    now = time.time()
    rows = []
    for attempt in attempts:
        needs_log = run is not None or attempt.id == newest[attempt.run]  # each log is one more request
        rows.append(StatusRow.of(attempt, jobs.logs(attempt.id) if needs_log else "", now))
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    elif out.is_terminal:
        show(status_table(rows) if rows else f"no run was submitted to {address}")
    elif rows:
        print(status_lines(rows))


@app.command(rich_help_panel=CLUSTER)
def logs(run: RunArgument, address: Address = LOCAL, follow: Follow = False) -> None:
    """Print the log of a submitted run's newest attempt."""
    jobs = Jobs(address)
    attempt = jobs.find(run)
    if follow:
        _follow(jobs, attempt.id, attempt.run, address)
    else:
        lines = jobs.logs(attempt.id).splitlines(keepends=True)
        print("".join(line for line in lines if not is_small_talk(line)), end="")


@app.command(rich_help_panel=CLUSTER)
def stop(run: RunArgument, address: Address = LOCAL) -> None:
    """Stop a submitted run once it has saved a checkpoint; `resume` continues it."""
    jobs = Jobs(address)
    attempt = jobs.find(run)
    if attempt.is_over:
        out.print(f"{attempt.id} is {attempt.status} already")
        return
    ended = jobs.stop(attempt.id)
    out.print(
        f"{ended.id} is {ended.status}; continue with: orchestrator resume {ended.run} --address {address}"
    )


@app.command(rich_help_panel=CLUSTER)
def resume(
    run: RunArgument,
    address: Address = LOCAL,
    working_dir: WorkingDir = Path("."),
    stop_grace: Grace = submission.STOP_GRACE_S,
    follow: Follow = True,
) -> None:
    """Resume a submitted run that was stopped or has failed, from its last checkpoint."""
    jobs = Jobs(address)
    last = jobs.find(jobs.find(run).run)
    decision = submission.decide([last], last.entrypoint)
    if decision.number is None:
        raise OrchestratorError(
            f"{last.id} is {last.status}: there is nothing to resume",
            fix=f"orchestrator logs {last.run} --address {address}",
        )
    upload = collect(working_dir)
    out.print(f"uploading {upload.summary()}")
    id = submission.start(jobs, last.run, last.entrypoint, decision.number, upload, stop_grace)
    out.print(f"submitted {id} to {address}: `{last.entrypoint}`")
    _print_next_commands(last.run, address)
    if follow:
        _follow(jobs, id, last.run, address)


def _follow(jobs: Jobs, id: str, run: str, address: str) -> None:
    """Shows the log until the job is over, then exits with the driver's code."""
    view = LogView(out)
    try:
        attempt = jobs.follow(id, view.write)
    except KeyboardInterrupt:
        view.close()
        out.print(
            f"\n{id} is still running; follow it with: orchestrator logs {run} --follow --address {address}"
        )
        sys.exit(128 + 2)
    view.close()
    code = exit_code(attempt)
    out.print(f"{id} {attempt.status}")
    if code == Exit.RESUMABLE:
        out.print(f"it can be resumed: orchestrator resume {run} --address {address}")
    elif code:
        out.print(attempt.message.partition(REPEATED_LOG)[0])  # the log has been shown
    if code:
        sys.exit(code)


class LogView:
    """A followed log: steps as the live table on a terminal, every other line unchanged."""

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


def _print_next_commands(run: str, address: str) -> None:
    options = "" if address == LOCAL else f" --address {address}"
    for command in (f"status {run}", f"logs {run} --follow", f"stop {run}", f"resume {run}"):
        out.print(f"  orchestrator {command}{options}")
