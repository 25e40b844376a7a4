"""From a recipe to a finished run: attempts, restarts, stages, and what the commands ask for.

recipe --plan_job--> Job --run_offline | run_online--> Progress --> report
                          ^                   |
                          +-- lost worker, memory: tried again from the last checkpoint
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from orchestrator.cluster.deadlines import Restarts
from orchestrator.cluster.doctor.checks import Finding, check_cluster
from orchestrator.cluster.doctor.facts import of_cluster
from orchestrator.cluster.doctor.survey import on_cluster
from orchestrator.cluster.joining import connect
from orchestrator.cluster.placement import check_capacity
from orchestrator.core.errors import NotEnoughResources, OutOfMemory, WorkerFailed, WorkerLost
from orchestrator.core.files import read_lines
from orchestrator.core.reports import Progress
from orchestrator.core.stopping import Stop, stop_signals
from orchestrator.observe.phases import phase
from orchestrator.observe.report.html import write_report
from orchestrator.observe.wandb_sink import honoured
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
from orchestrator.run.checkpoints import CheckpointStore
from orchestrator.run.extension import End
from orchestrator.run.folder import RunFolder, open_run
from orchestrator.run.planned_run import Job, plan_job
from orchestrator.run.preflight import asked_by, look, need_of, require, this_machine
from orchestrator.run.resume import refuse_without_checkpoint, refuse_without_optimizer

MISTAKES_S = 0.7
"""In which most mistakes in a recipe and its data are found."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run left behind. before, after: the first and last held-out metrics, empty without data.eval."""

    folder: Path
    export: Path
    report: Path
    steps: int
    before: Mapping[str, float]
    after: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class How:
    """What a caller decides of a run beside its recipe. extend: it may have another end, though its schedule
    looks at it; in_process: the only worker is this process, without Ray."""

    extend: bool = False
    in_process: bool = False


def train(
    recipe: Recipe, root: Path, console: Console, stop: Stop | None = None, how: How = How()
) -> Outcome:
    """Runs a recipe to its end in the folder `root`, going on from a verified checkpoint if one is there.
    stop: of a caller that handles the signals already; None: they are handled here."""
    with nullcontext(stop) if stop is not None else stop_signals() as asked:
        return _train(recipe, root, console, asked, how)


def _train(recipe: Recipe, root: Path, console: Console, stop: Stop, how: How) -> Outcome:
    tracking, told = honoured(recipe.tracking, os.environ)
    recipe = recipe.model_copy(update={"tracking": tracking})
    for line in told:
        console.print(line, markup=False)
    asked = asked_by([recipe])
    facts = this_machine(asked, root) if how.in_process else look(asked, root)
    require(check_cluster(facts, asked))  # before the plan: a node that is silent is no lack of room
    job = (
        _here(recipe, console, of_cluster(facts))
        if how.in_process
        else _planned(recipe, console, of_cluster(facts))
    )
    _preflight(check_cluster(facts, need_of(job)), console)
    if job.prompts is not None and recipe.rollouts.replay is None:
        for function in recipe.rewards.functions:
            if function.url is not None:
                check_reachable(function)
    end = End(recipe.optimizer, job.plan.total_steps, job.optimizer_steps, how.extend)
    identity = _identity(recipe.model_copy(update={"learners": job.recipe.learners}), job)
    with open_run(root, identity, dump(recipe), job.plan_json(), _say(console), end=end) as folder:
        for line in (*data_notes(job.plan.data), *warning_lines(job.plan)):
            console.print(line)
        progress = _finished(job, folder) or _supervise(job, folder, stop)
        report = write_report(root)
    before, after = _before_and_after(folder.metrics)
    return Outcome(root, folder.export, report, progress.step, before, after)


def _here(recipe: Recipe, console: Console, hardware: Hardware) -> Job:
    """The planned run on one worker, which is this process."""
    with phase(console, "planning"):
        return replace(plan_job(recipe.in_one_process(), console, hardware), in_process=True)


def _planned(recipe: Recipe, console: Console, hardware: Hardware) -> Job:
    """The planned run. A Ray of its own starts meanwhile, where its size does not come from the plan (that of
    published weights does)."""
    if recipe.algorithm.name in ONLINE or on_cluster():
        with phase(console, "planning"):
            return plan_job(recipe, console, hardware)
    with phase(console, "planning, and starting Ray"), ThreadPoolExecutor(1) as pool:
        job = pool.submit(plan_job, recipe, console, hardware)
        if not wait([job], timeout=MISTAKES_S).done:  # a recipe or data that cannot be used are told at once
            connect()  # here: it handles signals, which only the main thread may
        return job.result()


def _identity(recipe: Recipe, job: Job) -> Identity:
    """What the run learns from, and the user's files beside it."""
    learned = job.data.groups if job.prompts is None else job.prompts.batches.groups
    watched = {TOKENS: tokens_digest(learned)}
    if job.prompts is not None:
        written = {
            f"the file of rewards.functions, {f.name}": f.function
            for f in recipe.rewards.functions
            if is_users(f)
        }
        for name, where in (
            written | {"the file of rollouts.environment": recipe.rollouts.environment}
        ).items():
            if where is not None and (file := source_of(where)) is not None:
                watched[f"{name} ({file.name})"] = file_digest(file)
        watched |= {
            f"the url of rewards.functions, {f.name}": text_digest(f.url)
            for f in recipe.rewards.functions
            if f.url is not None
        }
    loaded = job.data.loaded
    sources = list(zip(loaded.sizes, loaded.weights, strict=True))
    return identity_of(
        recipe,
        loaded.fingerprint,
        tokenizer=tokenizer_digest(job.data.tokenizer),
        sources=sources,
        watched=watched,
    )


def _say(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, markup=False)


def _finished(job: Job, folder: RunFolder) -> Progress | None:
    """Where a run stands that has nothing left to do: its last checkpoint and its exports are there. Spares a
    pipeline that is started again the workers of the stages behind it."""
    recipe, online = job.recipe, job.algorithm.online
    exports = [
        folder.export,
        *([folder.critic_export] if online is not None and online.critic and recipe.critic.export else []),
    ]
    if not all(export.is_dir() for export in exports):
        return None
    saved = CheckpointStore(
        folder.checkpoints, run=folder.fingerprint, keep=recipe.checkpoint.keep, note=job.console.print
    ).newest()
    total = job.plan.total_steps
    if saved is None and folder.done_steps == 0:
        return None
    progress = saved.progress if saved is not None else Progress(step=folder.done_steps)
    if saved is None:
        refuse_without_checkpoint(folder.root, progress.step, total)
    elif progress.step < total:
        refuse_without_optimizer(saved, total)  # before workers are started for it
        return None
    elif 0 < folder.done_steps < progress.step:  # extended, and interrupted before the new export
        return None
    job.console.print(f"{folder.root}: all {progress.step} steps are done already", markup=False)
    return progress


def _preflight(findings: Sequence[Finding], console: Console) -> None:
    """Says what is doubtful on a cluster; an error before anything is placed where the run cannot work."""
    if on_cluster():
        for finding in findings:
            if finding.level == "warning":
                console.print(
                    f"{finding.check}: {finding.where}: {finding.what}\n  fix: {finding.fix}", markup=False
                )
    require(findings)


def _supervise(job: Job, folder: RunFolder, stop: Stop) -> Progress:
    """Runs attempts until one ends: a lost worker restarts from the last checkpoint, an out-of-memory error a
    rank could not recover from in place restarts with a finer cut, or the next ZeRO stage. Neither changes an
    optimizer step."""
    attempt = run_offline.run_once if job.algorithm.online is None else run_online.run_once
    cut, restarts, seen = job.plan.cut, Restarts(job.recipe.learners.max_restarts), set[str]()
    while True:
        try:
            return attempt(job, folder, cut, stop)
        except OutOfMemory as error:
            cut = finer_cut(job.plan, job.data, cut)
            job.console.print(f"{error.what}: starting the workers again with {cut}", markup=False)
        except WorkerLost as error:
            if stop():
                raise
            if error.repeats is not None and error.repeats in seen:
                raise WorkerFailed(
                    f"{error.what}, twice at the same place",
                    why=error.why,
                    fix=f"no other attempt will help: {error.fix}",
                ) from error
            seen |= {error.repeats} if error.repeats is not None else set()
            count = restarts.add(folder.saved_steps)
            if count > restarts.limit:
                raise
            _require_room(job, error)
            job.console.print(
                f"{error}\nrestart {count} of {restarts.limit} from the last checkpoint", markup=False
            )


def _require_room(job: Job, lost: WorkerLost) -> None:
    """WorkerLost, with an exit code that says "run it again", where a host went with its worker and the rest
    cannot hold them all."""
    try:
        check_capacity(job.demands())
    except NotEnoughResources as error:
        raise WorkerLost(
            f"{lost.what}, and {error.what}",
            why=lost.why,
            fix="run the same command again (orchestrator resume): with learners.workers=auto it goes on "
            "with the hosts that are left, "
            "at the same effective batch",
        ) from lost


def _before_and_after(metrics: Path) -> tuple[dict[str, float], dict[str, float]]:
    lines = read_lines(metrics) if metrics.is_file() else []
    evaluations = [
        {k: v for k, v in line.items() if k.startswith("eval/") and v is not None} for line in lines
    ]
    evaluations = [e for e in evaluations if e]
    return (evaluations[0], evaluations[-1]) if evaluations else ({}, {})
