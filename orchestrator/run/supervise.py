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

from orchestrator.algorithms.table import build
from orchestrator.cluster.deadlines import Restarts
from orchestrator.cluster.doctor.checks import Finding, judge
from orchestrator.cluster.doctor.facts import of_cluster
from orchestrator.cluster.doctor.survey import on_cluster
from orchestrator.cluster.joining import connect, own_ray
from orchestrator.cluster.learner_group import LearnerGroup
from orchestrator.cluster.placement import check_capacity
from orchestrator.core.batches import Progress, SequenceGroup
from orchestrator.core.errors import ConfigError, NotEnoughResources, OutOfMemory, WorkerFailed, WorkerLost
from orchestrator.core.stopping import Stop, stop_signals
from orchestrator.data.dataset import load_data
from orchestrator.data.prompts import load_prompts
from orchestrator.learner.rank_learner import LearnerSpec
from orchestrator.models.shapes import as_folder, known
from orchestrator.observe.jsonl import read_lines
from orchestrator.observe.phases import phase
from orchestrator.observe.report.html import write_report
from orchestrator.observe.wandb_sink import honoured
from orchestrator.plan.hardware import Hardware
from orchestrator.plan.planner import Choice, DataReport, Plan, data_report, finer_cut
from orchestrator.plan.sketch import Lengths
from orchestrator.plan.view import data_notes, warning_lines
from orchestrator.recipe.fingerprint import TOKENS, Identity, file_digest, identity_of, text_digest, tokenizer_digest, tokens_digest
from orchestrator.recipe.loading import dump
from orchestrator.recipe.pipeline import Stage, references, resolve
from orchestrator.recipe.schema import ONLINE, Recipe
from orchestrator.rollout.rewards.http import knock
from orchestrator.rollout.rewards.lookup import check_rewards, is_users, source_of
from orchestrator.rollout.trial import try_user_code
from orchestrator.run import offline as run_offline
from orchestrator.run import online as run_online
from orchestrator.run.checkpoints import CheckpointStore
from orchestrator.run.extension import End
from orchestrator.run.folder import RunFolder, open_run
from orchestrator.run.planned_run import Job, plan_job, plan_sketch, require_reward
from orchestrator.run.preflight import asked_by, look, need_of, require, this_machine
from orchestrator.run.resume import refuse_without_checkpoint, refuse_without_optimizer
from orchestrator.run.stage_exports import with_types
from orchestrator.run.startup import attach_reference

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
    """What a caller decides of a run beside its recipe. extend: it may have another end, though its schedule looks at it; in_process: the only
    worker is this process, without Ray."""

    extend: bool = False
    in_process: bool = False


def train(recipe: Recipe, root: Path, console: Console, stop: Stop | None = None, how: How = How()) -> Outcome:
    """Runs a recipe to its end in the folder `root`, going on from a verified checkpoint if one is there. stop: of a caller that handles the
    signals already; None: they are handled here."""
    with nullcontext(stop) if stop is not None else stop_signals() as asked:
        return _train(recipe, root, console, asked, how)


def _train(recipe: Recipe, root: Path, console: Console, stop: Stop, how: How) -> Outcome:
    tracking, told = honoured(recipe.tracking, os.environ)
    recipe = recipe.model_copy(update={"tracking": tracking})
    for line in told:
        console.print(line, markup=False)
    asked = asked_by([recipe])
    facts = this_machine(asked, root) if how.in_process else look(asked, root)
    require(judge(facts, asked))  # before the plan: a node that is silent is no lack of room
    job = _here(recipe, console, of_cluster(facts)) if how.in_process else _planned(recipe, console, of_cluster(facts))
    _preflight(judge(facts, need_of(job)), console)
    if job.prompts is not None and recipe.rollouts.replay is None:
        for function in recipe.rewards.functions:
            if function.url is not None:
                knock(function)
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
    """The planned run. A Ray of its own starts meanwhile, where its size does not come from the plan (that of published weights does)."""
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
        written = {f"the file of rewards.functions, {f.name}": f.function for f in recipe.rewards.functions if is_users(f)}
        for name, where in (written | {"the file of rollouts.environment": recipe.rollouts.environment}).items():
            if where is not None and (file := source_of(where)) is not None:
                watched[f"{name} ({file.name})"] = file_digest(file)
        watched |= {f"the url of rewards.functions, {f.name}": text_digest(f.url) for f in recipe.rewards.functions if f.url is not None}
    loaded = job.data.loaded
    sources = list(zip(loaded.sizes, loaded.weights, strict=True))
    return identity_of(recipe, loaded.fingerprint, tokenizer=tokenizer_digest(job.data.tokenizer), sources=sources, watched=watched)


def _say(console: Console) -> Callable[[str], None]:
    return lambda text: console.print(text, markup=False)


def _finished(job: Job, folder: RunFolder) -> Progress | None:
    """Where a run stands that has nothing left to do: its last checkpoint and its exports are there. Spares a pipeline that is
    started again the workers of the stages behind it."""
    recipe, online = job.recipe, job.algorithm.online
    exports = [folder.export, *([folder.critic_export] if online is not None and online.critic and recipe.critic.export else [])]
    if not all(export.is_dir() for export in exports):
        return None
    saved = CheckpointStore(folder.checkpoints, run=folder.fingerprint, keep=recipe.checkpoint.keep, note=job.console.print).newest()
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
                console.print(f"{finding.check}: {finding.where}: {finding.what}\n  fix: {finding.fix}", markup=False)
    require(findings)


def _supervise(job: Job, folder: RunFolder, stop: Stop) -> Progress:
    """Runs attempts until one ends: a lost worker restarts from the last checkpoint, an out-of-memory error a rank
    could not recover from in place restarts with a finer cut, or the next ZeRO stage. Neither changes an optimizer step."""
    attempt = run_offline.attempt if job.algorithm.online is None else run_online.attempt
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
                raise WorkerFailed(f"{error.what}, twice at the same place", why=error.why, fix=f"no other attempt will help: {error.fix}") from error
            seen |= {error.repeats} if error.repeats is not None else set()
            count = restarts.add(folder.saved_steps)
            if count > restarts.limit:
                raise
            _require_room(job, error)
            job.console.print(f"{error}\nrestart {count} of {restarts.limit} from the last checkpoint", markup=False)


def _require_room(job: Job, lost: WorkerLost) -> None:
    """WorkerLost, with an exit code that says "run it again", where a host went with its worker and the rest cannot hold them all."""
    try:
        check_capacity(job.demands())
    except NotEnoughResources as error:
        raise WorkerLost(
            f"{lost.what}, and {error.what}",
            why=lost.why,
            fix="run the same command again (orchestrator resume): with learners.workers=auto it goes on with the hosts that are left, "
            "at the same effective batch",
        ) from lost


def _before_and_after(metrics: Path) -> tuple[dict[str, float], dict[str, float]]:
    lines = read_lines(metrics) if metrics.is_file() else []
    evaluations = [{k: v for k, v in line.items() if k.startswith("eval/") and v is not None} for line in lines]
    evaluations = [e for e in evaluations if e]
    return (evaluations[0], evaluations[-1]) if evaluations else ({}, {})


def train_stages(stages: Sequence[Stage], root: Path, console: Console, stop: Stop | None = None, how: How = How()) -> dict[str, Outcome]:
    """Trains a recipe, or a pipeline stage by stage in root/NAME, each with the exports of the stages it names."""
    _check_later(stages[1:])  # the first one is about to be planned
    outcomes: dict[str, Outcome] = {}
    for stage in _grouped(with_types(stages), root.name):
        folder = root if len(stages) == 1 else root / stage.name
        if len(stages) > 1:
            console.rule(stage.name, align="left")
        with own_ray():
            outcomes[stage.name] = train(resolve(stage.recipe, {n: o.export for n, o in outcomes.items()}), folder, console, stop, how)
    return outcomes


def _check_later(stages: Sequence[Stage]) -> None:
    """What can be known of stages that cannot be planned yet: a mistake in one is not to be told hours later."""
    for recipe in (stage.recipe for stage in stages if stage.recipe.algorithm.name in ONLINE):
        require_reward(recipe)
        functions = [f for f in recipe.rewards.functions if f.model is None]  # a model may be a stage's that is yet to come
        rewards = recipe.rewards.model_copy(update={"functions": functions})
        check_rewards(rewards)
        try_user_code(rewards, recipe.rollouts.environment, None)


def _grouped(stages: Sequence[Stage], name: str) -> list[Stage]:
    """Stages of a pipeline stand together in wandb, under its name if the recipe gives none."""
    if len(stages) == 1:
        return list(stages)

    def tracked(recipe: Recipe) -> Recipe:
        group = recipe.tracking.group or name
        return recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"group": group})})

    return [replace(stage, recipe=tracked(stage.recipe)) for stage in stages]


def plan_stages(
    stages: Sequence[Stage], hardware: Hardware | None = None, lengths: Lengths | None = None, shape: str | None = None
) -> list[tuple[str, Plan]]:
    """Plans of the stages that take no other stage's export, on `hardware` or on what there is. lengths: of rows to make up instead of
    reading data; shape: of the model (see models/shapes.py), by default the known one where data is made up."""
    ready = [s for s in stages if not references(s.recipe)]
    _check_later([s for s in stages if s not in ready])
    hardware = hardware or of_cluster(look(asked_by([s.recipe for s in ready])))
    return [(stage.name, _plan(stage.recipe, hardware, lengths, shape)) for stage in ready]


def _plan(recipe: Recipe, hardware: Hardware, lengths: Lengths | None, shape: str | None) -> Plan:
    shape = shape or (known(recipe.model.path) if lengths is not None else None)
    with as_folder(recipe.model, shape) if shape is not None else nullcontext(recipe.model) as model:
        shaped = recipe.model_copy(update={"model": model})
        plan = plan_job(shaped, Console(quiet=True), hardware).plan if lengths is None else plan_sketch(shaped, hardware, lengths)
    choices = plan.choices if shape is None else (Choice("model", shape, "its shape only"), *plan.choices)
    return replace(plan, choices=choices, recipe=plan.recipe.model_copy(update={"model": recipe.model}))


def diagnose(stages: Sequence[Stage], root: Path | None) -> tuple[Finding, ...]:
    """What `orchestrator doctor` finds: of the cluster, and of what the first plannable stage needs, if a recipe is given."""
    asked = asked_by([stage.recipe for stage in stages])
    facts = look(asked, root, kernels=True)
    ready = [s.recipe for s in stages if not references(s.recipe)]
    try:
        return judge(facts, need_of(plan_job(ready[0], Console(quiet=True), of_cluster(facts))) if ready else asked)
    except NotEnoughResources as error:
        return (*judge(facts, asked), Finding("plan", "error", ready[0].run.name, error.what, error.fix))


def first_batch(recipe: Recipe) -> tuple[tuple[SequenceGroup, ...], Callable[[int], str], DataReport]:
    """The examples of the first optimizer step, a decoder of single tokens, and what is to be said of the data."""
    algorithm = build(recipe.algorithm, recipe.rollouts)
    if algorithm.online is None:
        data = load_data(recipe, algorithm)
        return data.batches.at(0), lambda token: data.tokenizer.decode([token]), data_report(data)
    prompts = load_prompts(recipe, algorithm)
    bare = tuple(SequenceGroup(p.id, p.ids, (), p.source) for p in prompts.batches.at(0))
    return bare, lambda token: prompts.tokenizer.decode([token]), data_report(prompts.longest)


def evaluate(recipe: Recipe, model: Path | None, console: Console) -> dict[str, float]:
    """Held-out metrics of the recipe's model, or of the folder `model` against the recipe's model as reference."""
    if recipe.data.eval is None:
        raise ConfigError("data.eval is not set", fix="add a held-out file, e.g. data.eval=eval.jsonl")
    policy = recipe
    if model is not None:
        cfg = recipe.model.model_copy(update={"path": str(model), "tiny": None, "revision": None, "lora": None})
        policy = recipe.model_copy(update={"model": cfg})
    job = plan_job(policy, console, of_cluster(look(asked_by([policy]))))
    if job.prompts is not None:
        return run_online.evaluate(job)
    with LearnerGroup(job.recipe.learners, parameters=job.sizes().all) as group:
        policy, recipe = (r.model_copy(update={"learners": job.recipe.learners}) for r in (policy, recipe))
        attach = attach_reference(recipe, job.algorithm, job.data, job.plan.cut, group, console.print, train=False)
        group.build(LearnerSpec(job.recipe, job.plan.cut, 1))
        evaluator = run_offline.evaluator(job.data, policy, job.algorithm, group, attach, itself=model is None)
        return dict(evaluator.evaluate(job.plan.cut, 0).metrics)
