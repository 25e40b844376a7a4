"""Held-out figures without training, and the first batch for a look."""

from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from orchestrator.algorithms.table import build
from orchestrator.cluster.doctor.facts import of_cluster
from orchestrator.cluster.learner_group import LearnerGroup
from orchestrator.core.batches import SequenceGroup
from orchestrator.core.errors import ConfigError
from orchestrator.learner.rank_learner import LearnerSpec
from orchestrator.plan.data_report import DataReport, data_report
from orchestrator.recipe.schema import Recipe
from orchestrator.run import offline as run_offline
from orchestrator.run import online as run_online
from orchestrator.run.inputs import read_data, read_prompts
from orchestrator.run.planned_run import plan_job
from orchestrator.run.preflight import asked_by, look
from orchestrator.run.startup import attach_reference


def first_batch(recipe: Recipe) -> tuple[tuple[SequenceGroup, ...], Callable[[int], str], DataReport]:
    """The examples of the first optimizer step, a decoder of single tokens, and what is to be said of the
    data."""
    algorithm = build(recipe.algorithm, recipe.rollouts)
    if algorithm.online is None:
        data = read_data(recipe, algorithm)
        return data.batches.at(0), lambda token: data.tokenizer.decode([token]), data_report(data)
    prompts = read_prompts(recipe, algorithm)
    bare = tuple(SequenceGroup(p.id, p.ids, (), p.source) for p in prompts.batches.at(0))
    return bare, lambda token: prompts.tokenizer.decode([token]), data_report(prompts.longest)


def evaluate(recipe: Recipe, model: Path | None, console: Console) -> dict[str, float]:
    """Held-out metrics of the recipe's model, or of the folder `model` against the recipe's model as
    reference."""
    if recipe.data.eval is None:
        raise ConfigError("data.eval is not set", fix="add a held-out file, e.g. data.eval=eval.jsonl")
    policy = recipe
    if model is not None:
        cfg = recipe.model.model_copy(
            update={"path": str(model), "tiny": None, "revision": None, "lora": None}
        )
        policy = recipe.model_copy(update={"model": cfg})
    job = plan_job(policy, console, of_cluster(look(asked_by([policy]))))
    if job.prompts is not None:
        return run_online.evaluate(job)
    with LearnerGroup(job.recipe.learners, parameters=job.sizes().all) as group:
        policy, recipe = (r.model_copy(update={"learners": job.recipe.learners}) for r in (policy, recipe))
        attach = attach_reference(
            recipe, job.algorithm, job.data, job.plan.cut, group, console.print, train=False
        )
        group.build(LearnerSpec(job.recipe, job.plan.cut, 1))
        evaluator = run_offline.evaluator(
            job.data, policy, job.algorithm, group, attach, itself=model is None
        )
        return dict(evaluator.evaluate(job.plan.cut, 0).metrics)
