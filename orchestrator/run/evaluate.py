"""Held-out metrics without training, and the examples of the first step."""

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
from orchestrator.run.planned_run import plan_run
from orchestrator.run.preflight import cluster_facts, recipe_requirements
from orchestrator.run.startup import attach_reference


def first_batch(recipe: Recipe) -> tuple[tuple[SequenceGroup, ...], Callable[[int], str], DataReport]:
    """(examples of the first optimizer step, decoder of one token id, report on the data)."""
    algorithm = build(recipe.algorithm, recipe.rollouts)
    if algorithm.online is None:
        data = read_data(recipe, algorithm)
        return data.batches.at(0), lambda token: data.tokenizer.decode([token]), data_report(data)
    prompts = read_prompts(recipe, algorithm)
    groups = tuple(SequenceGroup(p.id, p.ids, (), p.source) for p in prompts.batches.at(0))
    return groups, lambda token: prompts.tokenizer.decode([token]), data_report(prompts.longest)


def evaluate(recipe: Recipe, model: Path | None, console: Console) -> dict[str, float]:
    """Held-out metrics of the recipe's model, or of the folder `model` with the recipe's as reference."""
    if recipe.data.eval is None:
        raise ConfigError("data.eval is not set", fix="add a held-out file, e.g. data.eval=eval.jsonl")
    policy = recipe
    if model is not None:
        changes = {"path": str(model), "tiny": None, "revision": None, "lora": None}
        policy = recipe.model_copy(update={"model": recipe.model.model_copy(update=changes)})
    planned = plan_run(policy, console, of_cluster(cluster_facts(recipe_requirements([policy]))))
    if planned.prompts is not None:
        return run_online.evaluate(planned)
    with LearnerGroup(planned.recipe.learners, parameters=planned.sizes().all) as group:
        policy, recipe = (
            r.model_copy(update={"learners": planned.recipe.learners}) for r in (policy, recipe)
        )
        attach = attach_reference(
            recipe, planned.algorithm, planned.data, planned.plan.cut, group, console.print, train=False
        )
        group.build(LearnerSpec(planned.recipe, planned.plan.cut, 1))
        evaluator = run_offline.evaluator(
            planned.data_set, policy, planned.algorithm, group, attach, itself=model is None
        )
        return dict(evaluator.evaluate(planned.plan.cut, 0).metrics)
