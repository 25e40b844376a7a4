"""One start of an offline run: builds the live objects of a recipe, runs the loop over them, exports.

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
from orchestrator.observe.phases import phase
from orchestrator.recipe.schema import Recipe
from orchestrator.run.checkpoints import CheckpointStore, RunCheckpoints
from orchestrator.run.export import export_policy
from orchestrator.run.folder import RunFolder
from orchestrator.run.planned_run import PlannedRun
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


def run_once(planned: PlannedRun, folder: RunFolder, cut: Cut, stop: Stop) -> Progress:
    """Runs from the newest checkpoint to the end, or until a worker is lost."""
    recipe = planned.recipe
    store = CheckpointStore(
        folder.checkpoints, run=folder.fingerprint, keep=recipe.checkpoint.keep, note=planned.console.print
    )
    saved = store.newest()
    with ExitStack() as stack:
        reporter = stack.enter_context(planned.reporter(folder, saved.progress.step if saved else 0))
        workers = f"{recipe.learners.count} worker{'s' if recipe.learners.count > 1 else ''}"
        with phase(planned.console, f"starting {workers}"):
            group = stack.enter_context(_ranks(planned, folder))
        cut, attach = _build(planned, cut, group, reporter.note)
        base = group.call(model_fingerprint)[0]
        evaluated = saved is not None and folder.evaluated(saved.progress.step)
        checkpoints = RunCheckpoints(
            store, [group], saved, base, final=recipe.checkpoint.final, last=planned.plan.total_steps
        )
        trainer = OfflineTrainer(
            plan=_loop_plan(planned, evaluated),
            cut=cut,
            policy=group,
            attach_reference=attach,
            batches=planned.data.batches,
            evaluator=evaluator(planned.data_set, recipe, planned.algorithm, group, attach),
            report=reporter,
            checkpoints=checkpoints,
            throughput=measured_throughput(planned.plan, planned.algorithm, group, reporter.note),
            stop=stop,
        )
        progress = trainer.run()
        stop.doing = "exporting the model"
        export_policy(planned, folder, group, reporter.note)
        folder.mark_done(progress.step)
        checkpoints.finish()
        return progress


def _ranks(planned: PlannedRun, folder: RunFolder) -> LearnerGroup | LocalRank:
    learners = planned.recipe.learners
    return (
        LocalRank(learners)
        if planned.in_process
        else LearnerGroup(learners, parameters=planned.sizes().all, logs=folder.logs)
    )


def _build(planned: PlannedRun, cut: Cut, group: Ranks, note: Callable[[str], None]) -> tuple[Cut, Attach]:
    """Loads the start weights into the learners and checks them.

    Returns the cut that fits into their memory, and the function that adds reference log-probs to a batch.
    """
    recipe, attach = planned.recipe, None
    if not learners_are_reference(recipe):
        with phase(planned.console, REFERENCE):
            attach = attach_reference(recipe, planned.algorithm, planned.data, cut, group, note)
    with phase(planned.console, "loading the model"):
        group.build(LearnerSpec(recipe, cut, planned.schedule_steps))
    with phase(planned.console, "checking memory and layout"):
        cut = probed_cut(planned.plan, planned.data, cut, group, note)
        check_layout(recipe, planned.algorithm, planned.data, cut, group, note)
    if attach is None:
        with phase(planned.console, REFERENCE) if planned.algorithm.needs_reference else nullcontext():
            attach = attach_reference(recipe, planned.algorithm, planned.data, cut, group, note, built=True)
    return cut, attach


def _loop_plan(planned: PlannedRun, evaluated: bool) -> OfflinePlan:
    recipe = planned.recipe
    return OfflinePlan(
        algorithm=planned.algorithm,
        total_steps=planned.plan.total_steps,
        evaluate_every=recipe.evaluation.every,
        evaluate_at_start=recipe.evaluation.at_start,
        save_every=recipe.checkpoint.steps,
        save_after_s=recipe.checkpoint.seconds,
        evaluated=evaluated,
        reference_sync_every=recipe.algorithm.reference_sync_every,
        reference_sync_alpha=recipe.algorithm.reference_sync_alpha,
        guards=planned.guards(),
        sources=planned.data.loaded.names,
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
    """Evaluates held-out rows with the learners.

    itself: the policy starts as the recipe's model.
    """
    held_out = HeldOut(data.held_out, data.held_out_names, data.prompts, data.answers)
    return Evaluator(
        held_out, recipe.evaluation, group, attach, data.decode, Ranking.of(recipe, algorithm, itself=itself)
    )
