"""From a recipe to a finished run: checks, plan, starts and restarts.

recipe --plan_run--> PlannedRun --offline | online run_once--> Progress --> report.html
                          ^                     |
                          +-- lost worker, out of memory: again from the last checkpoint
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from orchestrator.cluster.capacity import check_capacity
from orchestrator.cluster.deadlines import Restarts
from orchestrator.cluster.doctor.checks import check_cluster
from orchestrator.cluster.doctor.facts import of_cluster
from orchestrator.cluster.doctor.findings import Finding
from orchestrator.cluster.doctor.survey import on_cluster
from orchestrator.cluster.joining import connect
from orchestrator.core.errors import NotEnoughResources, OrchestratorError, WorkerFailed, WorkerLost
from orchestrator.core.files import read_lines
from orchestrator.core.reports import Progress
from orchestrator.core.stopping import Stop, stop_signals
from orchestrator.core.user_code import names_code
from orchestrator.observe.callbacks import Callback
from orchestrator.observe.phases import phase
from orchestrator.observe.report.html import write_report
from orchestrator.observe.wandb_sink import apply_environment
from orchestrator.plan.hardware import Hardware
from orchestrator.plan.planner import finer_cut
from orchestrator.plan.view import data_notes, warning_lines
from orchestrator.recipe.fingerprint import (
    TOKENS,
    Identity,
    file_digest,
    identity_of,
    text_digest,
    tokenizer_digest,
    tokens_digest,
)
from orchestrator.recipe.loading import dump
from orchestrator.recipe.schema import ONLINE, Recipe
from orchestrator.rollout.rewards.http import check_reachable
from orchestrator.rollout.rewards.lookup import is_users, source_of
from orchestrator.run import offline as run_offline
from orchestrator.run import online as run_online
from orchestrator.run.checkpoints import (
    CheckpointStore,
    refuse_without_checkpoint,
    refuse_without_optimizer,
)
from orchestrator.run.folder import End, RunFolder, open_run
from orchestrator.run.planned_run import PlannedRun, plan_run
from orchestrator.run.preflight import (
    cluster_facts,
    recipe_requirements,
    require,
    run_requirements,
    this_machine,
)

MISTAKES_S = 0.7
"""Seconds in which planning finds most mistakes of a recipe and its data."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a finished run."""

    folder: Path
    export: Path
    report: Path
    steps: int
    before: Mapping[str, float]
    """Held-out metrics of the first evaluation, empty without data.eval."""
    after: Mapping[str, float]
    """Held-out metrics of the last evaluation, empty without data.eval."""


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of a run that are not keys of its recipe."""

    extend: bool = False
    """The run may end at another step, although the learning rate's schedule depends on the end."""
    in_process: bool = False
    """The only worker is this process, without Ray."""
    callbacks: tuple[Callback, ...] = ()
    """Functions that see each report of a step and of an evaluation."""


def train(
    recipe: Recipe,
    root: Path,
    console: Console,
    stop: Stop | None = None,
    options: RunOptions = RunOptions(),
) -> Outcome:
    """Runs a recipe to its end in the folder `root`, from the newest verified checkpoint if there is one.

    stop: given by a caller that handles signals itself; None: they are handled here.
    """
    with nullcontext(stop) if stop is not None else stop_signals() as stop_request:
        return _train(recipe, root, console, stop_request, options)


def _train(recipe: Recipe, root: Path, console: Console, stop: Stop, options: RunOptions) -> Outcome:
    tracking, notes = apply_environment(recipe.tracking, os.environ)
    recipe = recipe.model_copy(update={"tracking": tracking})
    for line in notes:
        console.print(line, markup=False)
    need = recipe_requirements([recipe])
    facts = this_machine(need, root) if options.in_process else cluster_facts(need, root)
    require(check_cluster(facts, need))  # before the plan, to which a silent node looks like missing room
    make = _plan_in_process if options.in_process else _plan_while_ray_starts
    planned = replace(make(recipe, console, of_cluster(facts)), callbacks=options.callbacks)
    _preflight(check_cluster(facts, run_requirements(planned)), console)
    if planned.prompts is not None and recipe.rollouts.replay is None:
        for function in recipe.rewards.functions:
            if function.url is not None:
                check_reachable(function)
    end = End(recipe.optimizer, planned.plan.total_steps, planned.optimizer_steps, options.extend)
    identity = _identity(recipe.model_copy(update={"learners": planned.recipe.learners}), planned)
    with open_run(
        root, identity, dump(recipe), planned.plan_json(), _plain_printer(console), end=end
    ) as folder:
        for line in (*data_notes(planned.plan.data), *warning_lines(planned.plan)):
            console.print(line)
        progress = _already_finished(planned, folder) or _supervise(planned, folder, stop)
        report = write_report(root)
    before, after = _before_and_after(folder.metrics)
    return Outcome(root, folder.export, report, progress.step, before, after)


def _plan_in_process(recipe: Recipe, console: Console, hardware: Hardware) -> PlannedRun:
    """Plans the run on one worker, which is this process."""
    with phase(console, "planning"):
        return replace(plan_run(recipe.in_one_process(), console, hardware), in_process=True)


def _plan_while_ray_starts(recipe: Recipe, console: Console, hardware: Hardware) -> PlannedRun:
    """Plans the run, and starts a local Ray meanwhile. Online the plan comes first: it decides the size of
    Ray's object store."""
    if recipe.algorithm.name in ONLINE or on_cluster():
        with phase(console, "planning"):
            return plan_run(recipe, console, hardware)
    with phase(console, "planning, and starting Ray"), ThreadPoolExecutor(1) as pool:
        plan = pool.submit(plan_run, recipe, console, hardware)
        if not wait(
            [plan], timeout=MISTAKES_S
        ).done:  # an unusable recipe is reported without waiting for Ray
            connect()  # in the main thread, which alone may set signal handlers
        return plan.result()


def _identity(recipe: Recipe, planned: PlannedRun) -> Identity:
    """What decides the run's result, and the user's files and urls that are watched for changes."""
    learned = planned.data.groups if planned.prompts is None else planned.prompts.batches.groups
    watched = {TOKENS: tokens_digest(learned)}
    user_code = {
        f"the file of algorithm.{key}": code
        for key in ("loss", "advantage")
        if names_code(code := getattr(recipe.algorithm, key))
    }
    if planned.prompts is not None:
        user_code |= {
            f"the file of rewards.functions, {f.name}": f.function
            for f in recipe.rewards.functions
            if is_users(f)
        }
        user_code["the file of rollouts.environment"] = recipe.rollouts.environment
        watched |= {
            f"the url of rewards.functions, {f.name}": text_digest(f.url)
            for f in recipe.rewards.functions
            if f.url is not None
        }
    for name, where in user_code.items():
        if where is not None and (file := source_of(where)) is not None:
            watched[f"{name} ({file.name})"] = file_digest(file)
    loaded = planned.data.loaded
    sources = list(zip(loaded.sizes, loaded.weights, strict=True))
    return identity_of(
        recipe,
        loaded.fingerprint,
        tokenizer=tokenizer_digest(planned.data.tokenizer),
        sources=sources,
        watched=watched,
    )


def _plain_printer(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, markup=False)


def _already_finished(planned: PlannedRun, folder: RunFolder) -> Progress | None:
    """The progress of a run whose last checkpoint and exports exist; None if something remains to do.

    A pipeline that is started again then needs no workers for its finished stages.
    """
    recipe, online = planned.recipe, planned.algorithm.online
    exports = [folder.export]
    if online is not None and online.critic and recipe.critic.export:
        exports.append(folder.critic_export)
    if not all(export.is_dir() for export in exports):
        return None
    saved = CheckpointStore(
        folder.checkpoints, run=folder.fingerprint, keep=recipe.checkpoint.keep, note=planned.console.print
    ).newest()
    total = planned.plan.total_steps
    if saved is None and folder.done_steps == 0:
        return None
    progress = saved.progress if saved is not None else Progress(step=folder.done_steps)
    if saved is None:
        refuse_without_checkpoint(folder.root, progress.step, total)
    elif progress.step < total:
        refuse_without_optimizer(saved, total)  # before workers start
        return None
    elif 0 < folder.done_steps < progress.step:  # extended, and interrupted before the new export
        return None
    planned.console.print(f"{folder.root}: all {progress.step} steps are done already", markup=False)
    return progress


def _preflight(findings: Sequence[Finding], console: Console) -> None:
    """Prints the warnings about a cluster. Raises if the run cannot work there, before anything is placed."""
    if on_cluster():
        for finding in findings:
            if finding.level == "warning":
                console.print(
                    f"{finding.check}: {finding.where}: {finding.what}\n  fix: {finding.fix}", markup=False
                )
    require(findings)


def _supervise(planned: PlannedRun, folder: RunFolder, stop: Stop) -> Progress:
    """Starts the run until it ends.

    After a lost worker it restarts from the last checkpoint. After an out-of-memory error that no rank could
    recover from in place it restarts with a finer cut, or at the next ZeRO stage. Neither changes a step.
    """
    run_once = run_offline.run_once if planned.algorithm.online is None else run_online.run_once
    cut, restarts = planned.plan.cut, Restarts(planned.recipe.learners.max_restarts)
    failures = set[str]()
    while True:
        try:
            return run_once(planned, folder, cut, stop)
        except OrchestratorError as error:
            if error.recovery == "finer_cut":
                cut = finer_cut(planned.plan, planned.data, cut)
                planned.console.print(f"{error.what}: starting the workers again with {cut}", markup=False)
                continue
            if error.recovery == "none" or stop():
                raise
            if error.repeats is not None and error.repeats in failures:
                raise WorkerFailed(
                    f"{error.what}, twice at the same place",
                    why=error.why,
                    fix=f"another restart will not help: {error.fix}",
                ) from error
            failures |= {error.repeats} if error.repeats is not None else set()
            count = restarts.add(folder.saved_steps)
            if count > restarts.limit:
                raise
            _require_room(planned, error)
            planned.console.print(
                f"{error}\nrestart {count} of {restarts.limit} from the last checkpoint", markup=False
            )


def _require_room(planned: PlannedRun, lost: OrchestratorError) -> None:
    """WorkerLost, with exit code 75 ("run it again"), if the remaining hosts cannot hold all workers."""
    try:
        check_capacity(planned.demands())
    except NotEnoughResources as error:
        raise WorkerLost(
            f"{lost.what}, and {error.what}",
            why=lost.why,
            fix="run the same command again (orchestrator resume): with learners.workers=auto it resumes "
            "on the remaining hosts, at the same effective batch",
        ) from lost


def _before_and_after(metrics: Path) -> tuple[dict[str, float], dict[str, float]]:
    lines = read_lines(metrics) if metrics.is_file() else []
    held_out = [{k: v for k, v in line.items() if k.startswith("eval/") and v is not None} for line in lines]
    evaluations = [values for values in held_out if values]
    return (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
