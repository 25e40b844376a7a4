"""The program. Every command does one thing and ends with an exit code of sysexits.h.

Heavy imports stand inside the commands, so that `--help` needs neither torch nor ray.
"""

import errno
import os
import sys
import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orchestrator.cli import cluster, inspect, planning
from orchestrator.cli.chat import command as chat
from orchestrator.cli.held_out import held_out
from orchestrator.cli.options import (
    RESULTS,
    START,
    TRAIN,
    Overrides,
    RecipeArgument,
    last_recipe,
    out,
    show,
)
from orchestrator.cluster.forkserver import forked_workers
from orchestrator.core.errors import ConfigError, Exit, OrchestratorError, OutputError
from orchestrator.core.stopping import enduring_output, stop_signals
from orchestrator.core.user_code import names_code
from orchestrator.observe.phases import phase
from orchestrator.recipe import loading as recipes
from orchestrator.recipe.pipeline import references

if TYPE_CHECKING:
    from orchestrator.recipe.schema import Recipe

PATH_ERRORS = (
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOSPC,
    errno.EDQUOT,
    errno.ENOENT,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ESTALE,
)
"""Errors of the system that name a path which the user can fix."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Train language models on preferences, with the same result on a laptop and on a cluster.",
)

for commands in (planning, cluster, chat, inspect):
    app.add_typer(commands.app)


def _loading() -> AbstractContextManager[None]:
    return phase(out, "loading torch, transformers and DeepSpeed")


@app.command(rich_help_panel=START)
def init(
    model: Annotated[str, typer.Option("--model", help="model folder, or hub name with --revision")],
    data: Annotated[str, typer.Option("--data", help="file or folder of training rows")],
    columns: Annotated[
        list[str] | None,
        typer.Argument(metavar="[data.columns.NAME=COLUMN]...", help="columns that init does not recognise"),
    ] = None,
    held_out: Annotated[str | None, typer.Option("--eval", help="file or folder of held-out rows")] = None,
    kind: Annotated[
        str | None,
        typer.Option(
            "--kind",
            metavar="sft|dpo|lora-dpo|reward|grpo|kto",
            help="kind of training (default: what the rows look like)",
        ),
    ] = None,
    revision: Annotated[str | None, typer.Option("--revision", help="commit of a hub model")] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="recipe file (default: KIND.yaml)")
    ] = None,
) -> None:
    """Write a recipe that fits your model and data, with reasons."""
    from orchestrator.cli.init.data_profile import parse_request, profile_data
    from orchestrator.cli.init.recipe import next_commands, save

    request = parse_request(model, revision, data, held_out, kind, columns or ())
    profile = profile_data(request)
    target = output or Path(f"{profile.kind}.yaml")
    for file in save(request, profile, target):
        out.print(f"wrote {file}")
    out.print(f"{profile.rows} rows, {profile.form}: {profile.why}")
    for line in next_commands(profile, target):
        out.print(f"  {line}")


@app.command(rich_help_panel=TRAIN)
def train(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="run folder (default: runs/NAME)")
    ] = None,
    in_process: Annotated[
        bool,
        typer.Option(
            "--in-process", help="one worker in this process, without Ray, for breakpoints and profilers"
        ),
    ] = False,
    extend: Annotated[
        bool,
        typer.Option(
            "--extend", help="accept a new run.max_steps or run.epochs although it changes the schedule"
        ),
    ] = False,
) -> None:
    """Train a model; the same command again continues from the last checkpoint."""
    with stop_signals() as stop, enduring_output():
        loaded = recipes.load(recipe, overrides or ())
        with nullcontext() if in_process else forked_workers(_loading):
            with _loading() if in_process else nullcontext():
                from orchestrator.run.stages import train_stages
                from orchestrator.run.supervise import RunOptions

            outcomes = train_stages(
                loaded.stages, output or Path("runs") / loaded.name, out, stop, RunOptions(extend, in_process)
            )
    if (results := held_out(outcomes)).row_count:
        show(results)
    for outcome in outcomes.values():
        out.print(f"report  {outcome.report}\nmodel   {outcome.export}")


@app.command(rich_help_panel=RESULTS)
def evaluate(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE|RUN", help="recipe, or run folder for the model that it trained")
    ],
    overrides: Overrides = None,
    model: Annotated[
        Path | None, typer.Option("--model", help="model folder to evaluate instead of the recipe's model")
    ] = None,
    step: Annotated[
        int | None, typer.Option("--step", min=1, help="step of the run's checkpoint (default: its export)")
    ] = None,
) -> None:
    """Evaluate a model on held-out data.

    Prints preference accuracy and greedy exact match; for an online recipe the reward, greedy and pass@k.
    """
    run = Path(recipe) if Path(recipe).is_dir() else None
    if run is None and step is not None:
        raise ConfigError(
            "--step needs a run folder", fix=f"{recipe} is a recipe; give the --output of a run"
        )
    if model is not None and step is not None:
        raise ConfigError("--step and --model name two models", fix="leave one of them out")
    if run is not None:
        from orchestrator.run.export import recipe_of

        cfg = recipe_of(run, overrides or ())
    else:
        cfg = last_recipe(recipe, overrides)
    if named := references(cfg):
        fix = "give the run folder of that stage, in which they are folders"
        raise ConfigError(f"{', '.join(named)} of {recipe} are made by stages of a run", fix=fix)
    with forked_workers(), tempfile.TemporaryDirectory(prefix="orchestrator-evaluate-") as scratch:
        from orchestrator.observe.metric_names import display_name, unknown
        from orchestrator.run.evaluate import evaluate as evaluated

        if run is not None and model is None:
            model = _trained(run, cfg, step, Path(scratch))
        metrics = evaluated(cfg, model, out)
    for name, value in metrics.items():
        shown = "–" if unknown(name, value) else f"{value:.4f}"
        out.print(f"{display_name(name, metrics):<48}{shown}")


def _trained(run: Path, cfg: "Recipe", step: int | None, scratch: Path) -> Path:
    """The folder with a run's model: its export, or a checkpoint written to `scratch` in fp32."""
    from orchestrator.run.export import export_run

    if step is None and (run / "export" / "config.json").is_file():
        out.print(f"evaluating {run / 'export'}", markup=False)
        return run / "export"
    exact = cfg.export.model_copy(update={"dtype": "fp32", "lora": "merged"})
    return export_run(
        run,
        cfg.model_copy(update={"export": exact}),
        step,
        scratch / "model",
        lambda text: out.print(text, markup=False),
    )


@app.command(rich_help_panel=RESULTS)
def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="run folder")],
    overrides: Overrides = None,
    step: Annotated[
        int | None, typer.Option("--step", min=1, help="step of the checkpoint (default: the newest)")
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="source|fp32|bf16|fp16",
            help="number format (default: the recipe's export.dtype)",
        ),
    ] = None,
    lora: Annotated[
        str | None,
        typer.Option(
            "--lora",
            metavar="both|merged|adapter",
            help="what of a LoRA run (default: the recipe's export.lora)",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="model folder (default: RUN/export-step-N)")
    ] = None,
) -> None:
    """Write a checkpoint of a run as a Hugging Face folder."""
    # This process computes nothing, so DeepSpeed need not look for a GPU and print what it sees.
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from transformers.utils import logging

    from orchestrator.run.export import export_run, recipe_of

    logging.disable_progress_bar()
    options = [
        f"export.{key}={value}" for key, value in (("dtype", dtype), ("lora", lora)) if value is not None
    ]
    cfg = recipe_of(run, [*(overrides or ()), *options])
    folder = export_run(run, cfg, step, output, lambda text: out.print(text, markup=False))
    out.print(f"model   {folder}", markup=False)


@app.command(rich_help_panel=TRAIN)
def verify(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="optimizer steps of each cut")] = 5,
    workers: Annotated[
        str, typer.Option(help="worker counts to try, e.g. 1,2,4 (default: 1 and the recipe's)")
    ] = "",
    everything: Annotated[
        bool, typer.Option("--all", help="try every combination instead of a covering set")
    ] = False,
) -> None:
    """Prove that a recipe gives the same result however it is cut.

    Runs the same steps under many cuts and prints how far each is from one plain large batch.
    """
    with forked_workers():
        _verify(last_recipe(recipe, overrides), steps, workers, everything)


def _verify(cfg: "Recipe", steps: int, workers: str, everything: bool) -> None:
    from orchestrator.plan.hardware import this_machine
    from orchestrator.plan.settle import settle
    from orchestrator.run.verify import TOLERANCE, run

    cfg, _ = settle(cfg, this_machine())
    cfg = cfg.with_workers(2) if cfg.learners.workers == "auto" else cfg
    try:
        counts = sorted({int(n) for n in workers.split(",")} if workers else {1, cfg.learners.count})
    except ValueError:
        raise ConfigError(
            f"--workers {workers!r} is not a list of numbers", fix="write e.g. --workers 1,2,4"
        ) from None
    tolerance, failed = TOLERANCE[cfg.learners.precision], 0
    out.print(
        f"{steps} steps, {cfg.batch.effective} examples each, {cfg.learners.precision}, against one "
        "process, one batch, plain torch"
    )
    out.print(
        f"{'workers':>7} {'micro':>6} {'layout':<14} {'ZeRO':>4} {'sync':<16} {'loss':>9} {'grad norm':>9} "
        f"{'weights':>9}"
    )
    for result in run(cfg, steps=steps, workers=counts, everything=everything):
        cut, good = result.cut, result.within(tolerance)
        failed += not good
        row = f"{cut.workers:>7} {cut.examples:>6} {cut.layout:<14} {cut.zero_stage:>4} {cut.sync:<16}"
        out.print(
            f"{row} {result.loss:>9.1e} {result.grad_norm:>9.1e} "
            f"{result.weights:>9.1e}{'' if good else '   ABOVE TOLERANCE'}"
        )
    if failed:
        raise OrchestratorError(
            f"{failed} cuts differ by more than {tolerance:g}",
            why="the effective batch is not independent of the hardware here",
            fix="divide the sum of the losses by a count of `units`, never by one of the micro-batch"
            if names_code(cfg.algorithm.loss)
            else "report it with this table; do not trust accumulation with these settings",
        )
    out.print(f"all within {tolerance:g} (relative; weights: norm of the difference over norm)")


def system_error(error: OSError) -> OrchestratorError:
    """An error of the system as the user reads it: a path that cannot be used, else a bug."""
    if error.filename is not None and error.errno in PATH_ERRORS:
        fix = (
            "free space, fix its permissions, or choose another place (HOME, TMPDIR, --output and the "
            "recipe's paths decide where it lies)"
        )
        return OutputError(
            f"{error.filename} cannot be used",
            why=f"{error.strerror or type(error).__name__} ({type(error).__name__})",
            fix=fix,
        )
    return OrchestratorError(
        f"{type(error).__name__}: {error}",
        fix="this is a bug; run again with --debug and report the traceback",
    )


def _print_error(text: str) -> None:
    """Prints to a terminal that may be closed by now; the exit code is returned all the same."""
    with enduring_output():
        print(text, file=sys.stderr)


def main() -> None:
    """Runs a command. A failure is one message and an exit code; `--debug` anywhere shows the traceback."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    try:
        app()
    except OrchestratorError as error:
        if debug:
            raise
        _print_error(f"error: {error}")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _print_error("interrupted; run the same command again to continue from the last checkpoint")
        sys.exit(Exit.RESUMABLE)
    except OSError as error:
        if debug:
            raise
        explained = system_error(error)
        print(f"error: {explained}", file=sys.stderr)
        sys.exit(explained.exit_code)
    except Exception as error:
        if debug:
            raise
        print(
            f"error: {type(error).__name__}: {error}\n  fix: this is a bug; run again with --debug and "
            "report the traceback",
            file=sys.stderr,
        )
        sys.exit(Exit.SOFTWARE)
