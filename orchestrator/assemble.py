"""From a recipe to live objects to a finished run: the only file that knows everybody.

    recipe --load_data--> data --make_plan--> plan --workers--> learner --OfflineTrainer--> export, report
                                                        ^                     |
                                                        +-- lost worker, memory: rebuilt from the last checkpoint
"""

import json
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from orchestrator.algorithms import Algorithm, build
from orchestrator.checkpoints import CheckpointStore
from orchestrator.cluster.placement import check_capacity, demands
from orchestrator.cluster.workers import LearnerGroup
from orchestrator.config import Recipe
from orchestrator.controllers.evaluation import Evaluator, HeldOut
from orchestrator.controllers.offline import OfflinePlan, OfflineTrainer
from orchestrator.controllers.step import Guards
from orchestrator.dataset import DataSet, load_data
from orchestrator.errors import ConfigError, OutOfMemory, WorkerLost
from orchestrator.learner.checks import model_fingerprint
from orchestrator.learner.learner import LearnerSpec
from orchestrator.observe.card import model_card
from orchestrator.observe.dashboard import write_report
from orchestrator.observe.reporter import RunReporter
from orchestrator.observe.sinks import ConsoleSink, JsonlSink, Sink, read_lines
from orchestrator.observe.tracking import WandbSink, stable_run_id
from orchestrator.plan import Plan, make_plan
from orchestrator.recipe import STAGE, Stage, dump, fingerprint
from orchestrator.records import Cut, Progress, SequenceGroup
from orchestrator.resume import RunCheckpoints
from orchestrator.run_folder import RunFolder, open_run
from orchestrator.startup import attach_reference, check_layout, measured_throughput, probed_cut


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
class Job:
    """A planned run. console: where the user looks."""

    recipe: Recipe
    algorithm: Algorithm
    data: DataSet
    plan: Plan
    console: Console


def plan_job(recipe: Recipe, console: Console) -> Job:
    """Reads the data and plans the run, without Ray and without model weights."""
    algorithm = build(recipe.algorithm)
    data = load_data(recipe, algorithm)
    return Job(recipe, algorithm, data, make_plan(recipe, algorithm, data), console)


def train(recipe: Recipe, root: Path, console: Console) -> Outcome:
    """Runs a recipe to its end in the folder `root`, going on from a verified checkpoint if one is there."""
    job = plan_job(recipe, console)
    check_capacity(demands(recipe, critic=False, rollouts=False))
    identity = fingerprint(recipe, job.data.loaded.fingerprint, "")
    with open_run(root, identity, dump(recipe), json.dumps(job.plan.to_json(), indent=1)) as folder, _stop_signals() as stopped:
        progress = _supervise(job, folder, stopped)
        report = write_report(root)
    before, after = _before_and_after(folder.metrics)
    return Outcome(root, folder.export, report, progress.step, before, after)


def _supervise(job: Job, folder: RunFolder, stopped: Callable[[], bool]) -> Progress:
    """Runs attempts until one ends: a lost worker restarts from the last checkpoint, an out-of-memory error a rank
    could not recover from in place restarts with a finer cut. Neither changes an optimizer step."""
    cut, restarts = job.plan.cut, 0
    while True:
        try:
            return _attempt(job, folder, cut, stopped)
        except OutOfMemory as error:
            if (finer := cut.halved()) == cut:
                raise
            cut = finer
            job.console.print(f"{error.what}: starting the workers again with a finer cut")
        except WorkerLost as error:
            restarts += 1
            if restarts > job.recipe.learners.max_restarts:
                raise
            job.console.print(f"{error}\nrestart {restarts} of {job.recipe.learners.max_restarts} from the last checkpoint")


def _attempt(job: Job, folder: RunFolder, cut: Cut, stopped: Callable[[], bool]) -> Progress:
    recipe = job.recipe
    store = CheckpointStore(folder.checkpoints, run=folder.fingerprint, keep=recipe.checkpoint.keep, note=job.console.print)
    saved = store.newest()
    reporter = _reporter(job, folder, saved.progress.step if saved else 0)
    try:
        with LearnerGroup(recipe.learners, logs=folder.logs) as group:
            attach = attach_reference(recipe, job.algorithm, job.data, cut, group, reporter.note)
            group.build(LearnerSpec(recipe, cut, job.plan.total_steps))
            cut = probed_cut(job.plan, job.data, cut, group, reporter.note)
            check_layout(recipe, job.algorithm, job.data, cut, group, reporter.note)
            base = group.call(model_fingerprint)[0]
            trainer = OfflineTrainer(
                plan=_offline_plan(job),
                cut=cut,
                policy=group,
                attach_reference=attach,
                batches=job.data.batches,
                evaluator=_evaluator(job.data, recipe, group, attach),
                report=reporter,
                checkpoints=RunCheckpoints(store, group, saved, base),
                throughput=measured_throughput(job.plan, group),
                should_stop=stopped,
            )
            progress = trainer.run()
            reporter.note(f"exporting to {folder.export}")
            group.export(folder.export, _card(job, folder))
            return progress
    finally:
        reporter.close()


def _reporter(job: Job, folder: RunFolder, resume_step: int) -> RunReporter:
    recipe = job.recipe
    sinks: list[Sink] = [ConsoleSink(job.plan.total_steps, job.console), JsonlSink(folder.root, resume_step)]
    if recipe.tracking.wandb != "off":
        run_id = stable_run_id(folder.fingerprint, folder.root)
        sinks.append(WandbSink(folder.root, recipe.tracking, recipe.run.name, recipe.model_dump(mode="json"), run_id))
    return RunReporter(sinks, folder.logs / "driver.log")


def _offline_plan(job: Job) -> OfflinePlan:
    recipe = job.recipe
    exact = recipe.learners.precision == "fp32"
    starts_as_reference = recipe.model.reference is None
    return OfflinePlan(
        algorithm=job.algorithm,
        total_steps=job.plan.total_steps,
        evaluate_every=recipe.evaluation.every,
        evaluate_at_start=recipe.evaluation.at_start,
        save_every=recipe.checkpoint.every,
        reference_sync_every=recipe.algorithm.reference_sync_every,
        reference_sync_alpha=recipe.algorithm.reference_sync_alpha,
        guards=Guards((1e-5 if exact else 3e-2) if starts_as_reference else None, job.plan.traffic.per_reduction),
    )


def _evaluator(data: DataSet, recipe: Recipe, group: LearnerGroup, attach: Callable) -> Evaluator:
    held_out = HeldOut(data.held_out, data.held_out_names, data.prompts, data.answers)
    return Evaluator(held_out, recipe.evaluation, group, attach, data.decode)


def _card(job: Job, folder: RunFolder) -> str:
    from importlib.metadata import version

    recipe = job.recipe
    base = recipe.model.path or f"a random-weight {recipe.model.tiny.architecture} model" if recipe.model.tiny else str(recipe.model.path)
    return model_card(
        name=recipe.run.name,
        base=base,
        algorithm=recipe.algorithm.name,
        recipe_yaml=dump(recipe),
        data_fingerprint=job.data.loaded.fingerprint,
        metrics_path=folder.metrics,
        library_versions={name: version(name) for name in ("torch", "transformers", "deepspeed", "ray", "trl")},
    )


def _before_and_after(metrics: Path) -> tuple[dict[str, float], dict[str, float]]:
    lines = read_lines(metrics) if metrics.is_file() else []
    evaluations = [{k: v for k, v in line.items() if k.startswith("eval/") and v is not None} for line in lines]
    evaluations = [e for e in evaluations if e]
    return (evaluations[0], evaluations[-1]) if evaluations else ({}, {})


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """SIGTERM and Ctrl-C ask the run to stop after its current step; a second one ends it at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def ask(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    for number in before:
        signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def resolve_stage(recipe: Recipe, exports: Mapping[str, Path]) -> Recipe:
    """The recipe with `model.path: stage:NAME` replaced by that stage's exported folder."""
    path = recipe.model.path
    if path is None or not path.startswith(STAGE):
        return recipe
    folder = exports[path.removeprefix(STAGE)]
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"path": str(folder)})})


def train_stages(stages: Sequence[Stage], root: Path, console: Console) -> dict[str, Outcome]:
    """Trains a recipe, or a pipeline stage by stage in root/NAME, each from the export of the stage it names."""
    outcomes: dict[str, Outcome] = {}
    for stage in stages:
        folder = root if len(stages) == 1 else root / stage.name
        if len(stages) > 1:
            console.rule(stage.name, align="left")
        outcomes[stage.name] = train(resolve_stage(stage.recipe, {n: o.export for n, o in outcomes.items()}), folder, console)
    return outcomes


def plan_stages(stages: Sequence[Stage]) -> list[tuple[str, Plan]]:
    """Plans of the stages that do not start from another stage's export."""
    quiet = Console(quiet=True)
    ready = [s for s in stages if not (s.recipe.model.path or "").startswith(STAGE)]
    return [(stage.name, plan_job(stage.recipe, quiet).plan) for stage in ready]


def first_batch(recipe: Recipe) -> tuple[tuple[SequenceGroup, ...], Callable[[int], str]]:
    """The examples of the first optimizer step, and a decoder of single tokens."""
    data = load_data(recipe, build(recipe.algorithm))
    return data.batches.at(0), lambda token: data.tokenizer.decode([token])


def evaluate(recipe: Recipe, model: Path | None, console: Console) -> dict[str, float]:
    """Held-out metrics of the recipe's model, or of the folder `model` against the recipe's model as reference."""
    if recipe.data.eval is None:
        raise ConfigError("data.eval is not set", fix="add a held-out file, e.g. data.eval=eval.jsonl")
    policy = recipe
    if model is not None:
        cfg = recipe.model.model_copy(update={"path": str(model), "tiny": None, "revision": None, "lora": None})
        policy = recipe.model_copy(update={"model": cfg})
    job = plan_job(policy, console)
    with LearnerGroup(recipe.learners) as group:
        attach = attach_reference(recipe, job.algorithm, job.data, job.plan.cut, group, console.print, train=False)
        group.build(LearnerSpec(policy, job.plan.cut, 1))
        return dict(_evaluator(job.data, policy, group, attach).evaluate(job.plan.cut, 0).metrics)
