"""A pipeline's stages one after the other: trained, planned, and what a diagnosis asks for them."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from orchestrator.cluster.doctor.checks import Finding, check_cluster
from orchestrator.cluster.doctor.facts import of_cluster
from orchestrator.cluster.joining import own_ray
from orchestrator.core.errors import NotEnoughResources
from orchestrator.core.stopping import Stop
from orchestrator.models.shapes import as_folder, known
from orchestrator.plan.choice import Choice
from orchestrator.plan.hardware import Hardware
from orchestrator.plan.planner import Plan
from orchestrator.plan.sketch import Lengths
from orchestrator.recipe.pipeline import Stage, references, resolve
from orchestrator.recipe.schema import ONLINE, Recipe
from orchestrator.rollout.rewards.lookup import check_rewards
from orchestrator.rollout.trial import try_user_code
from orchestrator.run.planned_run import plan_job, plan_sketch, require_reward
from orchestrator.run.preflight import asked_by, look, need_of
from orchestrator.run.stage_exports import with_types
from orchestrator.run.supervise import How, Outcome, train


def train_stages(
    stages: Sequence[Stage], root: Path, console: Console, stop: Stop | None = None, how: How = How()
) -> dict[str, Outcome]:
    """Trains a recipe, or a pipeline stage by stage in root/NAME, each with the exports of the stages it
    names."""
    _check_later(stages[1:])  # the first one is about to be planned
    outcomes: dict[str, Outcome] = {}
    for stage in _grouped(with_types(stages), root.name):
        folder = root if len(stages) == 1 else root / stage.name
        if len(stages) > 1:
            console.rule(stage.name, align="left")
        with own_ray():
            outcomes[stage.name] = train(
                resolve(stage.recipe, {n: o.export for n, o in outcomes.items()}), folder, console, stop, how
            )
    return outcomes


def _check_later(stages: Sequence[Stage]) -> None:
    """What can be known of stages that cannot be planned yet: a mistake in one is not to be told hours later."""
    for recipe in (stage.recipe for stage in stages if stage.recipe.algorithm.name in ONLINE):
        require_reward(recipe)
        functions = [
            f for f in recipe.rewards.functions if f.model is None
        ]  # a model may be a stage's that is yet to come
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
    stages: Sequence[Stage],
    hardware: Hardware | None = None,
    lengths: Lengths | None = None,
    shape: str | None = None,
) -> list[tuple[str, Plan]]:
    """Plans of the stages that take no other stage's export, on `hardware` or on what there is. lengths: of
    rows to make up instead of reading data; shape: of the model (see models/shapes.py), by default the known
    one where data is made up."""
    ready = [s for s in stages if not references(s.recipe)]
    _check_later([s for s in stages if s not in ready])
    hardware = hardware or of_cluster(look(asked_by([s.recipe for s in ready])))
    return [(stage.name, _plan(stage.recipe, hardware, lengths, shape)) for stage in ready]


def _plan(recipe: Recipe, hardware: Hardware, lengths: Lengths | None, shape: str | None) -> Plan:
    shape = shape or (known(recipe.model.path) if lengths is not None else None)
    with as_folder(recipe.model, shape) if shape is not None else nullcontext(recipe.model) as model:
        shaped = recipe.model_copy(update={"model": model})
        plan = (
            plan_job(shaped, Console(quiet=True), hardware).plan
            if lengths is None
            else plan_sketch(shaped, hardware, lengths)
        )
    choices = plan.choices if shape is None else (Choice("model", shape, "its shape only"), *plan.choices)
    return replace(plan, choices=choices, recipe=plan.recipe.model_copy(update={"model": recipe.model}))


def diagnose(stages: Sequence[Stage], root: Path | None) -> tuple[Finding, ...]:
    """What `orchestrator doctor` finds: of the cluster, and of what the first plannable stage needs, if a
    recipe is given."""
    asked = asked_by([stage.recipe for stage in stages])
    facts = look(asked, root, kernels=True)
    ready = [s.recipe for s in stages if not references(s.recipe)]
    try:
        return check_cluster(
            facts, need_of(plan_job(ready[0], Console(quiet=True), of_cluster(facts))) if ready else asked
        )
    except NotEnoughResources as error:
        return (
            *check_cluster(facts, asked),
            Finding("plan", "error", ready[0].run.name, error.what, error.fix),
        )
