"""One attempt at an offline run: the live objects of a recipe, and the loop over them.

plan --workers--> reference log-probs --> learner --probe, checks--> OfflineTrainer --> export
"""

from collections.abc import Callable
from contextlib import ExitStack, nullcontext

from orchestrator.algorithms.table import AlgorithmSpec
from orchestrator.cluster.in_process import LocalRank
from orchestrator.cluster.learner_group import LearnerGroup
from orchestrator.cluster.ranks import Ranks
from orchestrator.core.batches import Cut
from orchestrator.core.reports import Progress
from orchestrator.core.stopping import Stop
from orchestrator.data.dataset import DataSet
from orchestrator.learner.probes import model_fingerprint
from orchestrator.learner.rank_learner import LearnerSpec
from orchestrator.models.rounding import widened
from orchestrator.observe.phases import phase
from orchestrator.observe.reporter import RunReporter
from orchestrator.recipe.schema import Recipe
from orchestrator.run.checkpoints import CheckpointStore
from orchestrator.run.folder import RunFolder
from orchestrator.run.planned_run import Job
from orchestrator.run.resume import RunCheckpoints
from orchestrator.run.startup import (
    Attach,
    attach_reference,
    check_layout,
    learners_are_reference,
    measured_throughput,
    probed_cut,
)
from orchestrator.trainers.evaluation import Evaluator, HeldOut
from orchestrator.trainers.offline import OfflinePlan, OfflineTrainer
from orchestrator.trainers.ranking import Ranking

REFERENCE = "reference log-probs"


def run_once(job: Job, folder: RunFolder, cut: Cut, stop: Stop) -> Progress:
    """Runs from the newest checkpoint to the end, or until a worker is lost."""
    recipe = job.recipe
    store = CheckpointStore(
        folder.checkpoints, run=folder.fingerprint, keep=recipe.checkpoint.keep, note=job.console.print
    )
    saved = store.newest()
    with ExitStack() as stack:
        reporter = stack.enter_context(job.reporter(folder, saved.progress.step if saved else 0))
        with phase(
            job.console, f"starting {recipe.learners.count} worker{'s' if recipe.learners.count > 1 else ''}"
        ):
            group = stack.enter_context(_ranks(job, folder))
        cut, attach = _begun(job, cut, group, reporter)
        base = group.call(model_fingerprint)[0]
        evaluated = saved is not None and folder.evaluated(saved.progress.step)
        checkpoints = RunCheckpoints(
            store, [group], saved, base, final=recipe.checkpoint.final, last=job.plan.total_steps
        )
        trainer = OfflineTrainer(
            plan=_plan(job, evaluated),
            cut=cut,
            policy=group,
            attach_reference=attach,
            batches=job.data.batches,
            evaluator=evaluator(job.data, recipe, job.algorithm, group, attach),
            report=reporter,
            checkpoints=checkpoints,
            throughput=measured_throughput(job.plan, job.algorithm, group, reporter.note),
            stop=stop,
        )
        progress = trainer.run()
        stop.doing = "exporting the model"
        reporter.note(f"exporting to {folder.export}")
        group.export(folder.export, job.card(folder))
        if said := widened(job.recipe, folder.export):
            reporter.note(said)
        folder.mark_done(progress.step)
        checkpoints.finish()
        return progress


def _ranks(job: Job, folder: RunFolder) -> LearnerGroup | LocalRank:
    learners = job.recipe.learners
    return (
        LocalRank(learners)
        if job.in_process
        else LearnerGroup(learners, parameters=job.sizes().all, logs=folder.logs)
    )


def _begun(job: Job, cut: Cut, group: Ranks, reporter: RunReporter) -> tuple[Cut, Attach]:
    """Learners with the start weights, checked: the cut that fits them, and how batches get their reference
    log-probs."""
    recipe, attach = job.recipe, None
    if not learners_are_reference(recipe):
        with phase(job.console, REFERENCE):
            attach = attach_reference(recipe, job.algorithm, job.data, cut, group, reporter.note)
    with phase(job.console, "loading the model"):
        group.build(LearnerSpec(recipe, cut, job.schedule_steps))
    with phase(job.console, "checking memory and layout"):
        cut = probed_cut(job.plan, job.data, cut, group, reporter.note)
        check_layout(recipe, job.algorithm, job.data, cut, group, reporter.note)
    if attach is None:
        with phase(job.console, REFERENCE) if job.algorithm.needs_reference else nullcontext():
            attach = attach_reference(recipe, job.algorithm, job.data, cut, group, reporter.note, built=True)
    return cut, attach


def _plan(job: Job, evaluated: bool) -> OfflinePlan:
    recipe = job.recipe
    return OfflinePlan(
        algorithm=job.algorithm,
        total_steps=job.plan.total_steps,
        evaluate_every=recipe.evaluation.every,
        evaluate_at_start=recipe.evaluation.at_start,
        save_every=recipe.checkpoint.steps,
        save_after_s=recipe.checkpoint.seconds,
        evaluated=evaluated,
        reference_sync_every=recipe.algorithm.reference_sync_every,
        reference_sync_alpha=recipe.algorithm.reference_sync_alpha,
        guards=job.guards(),
        sources=job.data.loaded.names,
    )


def evaluator(
    data: DataSet,
    recipe: Recipe,
    algorithm: AlgorithmSpec,
    group: Ranks,
    attach: Callable,
    *,
    itself: bool = True,
) -> Evaluator:
    """Evaluates held-out rows with the learners. itself: the policy starts as the recipe's model."""
    held_out = HeldOut(data.held_out, data.held_out_names, data.prompts, data.answers)
    return Evaluator(
        held_out, recipe.evaluation, group, attach, data.decode, Ranking.of(recipe, algorithm, itself=itself)
    )
