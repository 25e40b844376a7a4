"""The stages of a pipeline: trained one after the other, planned, diagnosed, and the types they export in.

Rounding between stages is the user's choice, not a default. With export.dtype=source

    a stage that another one takes    exports fp32, as trained
    the last stages                   export the type of the model that the chain began with, or fp32 if they
                                      may compute in fp32: rounding would lose what small learning rates
                                      learn (models/rounding.py)
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from orchestrator.cluster.doctor.checks import check_cluster
from orchestrator.cluster.doctor.facts import of_cluster
from orchestrator.cluster.doctor.findings import Finding
from orchestrator.cluster.joining import own_ray
from orchestrator.core.errors import NotEnoughResources
from orchestrator.core.stopping import Stop
from orchestrator.models.rounding import WIDE
from orchestrator.models.shapes import as_folder, known_shape
from orchestrator.models.source import RECIPE_TYPES, source_dtype
from orchestrator.plan.choice import Choice
from orchestrator.plan.hardware import Hardware
from orchestrator.plan.planner import Plan
from orchestrator.plan.sketch import Lengths
from orchestrator.recipe.pipeline import STAGE, Stage, references, resolve
from orchestrator.recipe.schema import ONLINE, Recipe
from orchestrator.rollout.rewards.lookup import check_rewards
from orchestrator.rollout.trial import try_user_code
from orchestrator.run.planned_run import plan_run, plan_sketch, require_reward
from orchestrator.run.preflight import cluster_facts, recipe_requirements, run_requirements
from orchestrator.run.supervise import Outcome, RunOptions, train

SHORT = {long: short for short, long in RECIPE_TYPES.items()}
"""Name of a type in a checkpoint -> its name in a recipe. Example: bfloat16 -> bf16."""


def train_stages(
    stages: Sequence[Stage],
    root: Path,
    console: Console,
    stop: Stop | None = None,
    options: RunOptions = RunOptions(),
) -> dict[str, Outcome]:
    """Trains a recipe in `root`, or a pipeline stage by stage in root/NAME, each with the exports of the
    stages it names."""
    _check_later(stages[1:])  # train() checks the first one
    outcomes: dict[str, Outcome] = {}
    for stage in _grouped(with_types(stages), root.name):
        folder = root if len(stages) == 1 else root / stage.name
        if len(stages) > 1:
            console.rule(stage.name, align="left")
        with own_ray():
            recipe = resolve(stage.recipe, {name: outcome.export for name, outcome in outcomes.items()})
            outcomes[stage.name] = train(recipe, folder, console, stop, options)
    return outcomes


def _check_later(stages: Sequence[Stage]) -> None:
    """Checks rewards and user code of stages that cannot be planned yet: hours later a mistake costs more."""
    for recipe in (stage.recipe for stage in stages if stage.recipe.algorithm.name in ONLINE):
        require_reward(recipe)
        # a reward model may be the export of a stage that has not run
        functions = [f for f in recipe.rewards.functions if f.model is None]
        rewards = recipe.rewards.model_copy(update={"functions": functions})
        check_rewards(rewards)
        try_user_code(rewards, recipe.rollouts.environment, None)


def _grouped(stages: Sequence[Stage], name: str) -> list[Stage]:
    """The stages with one wandb group: tracking.group, or the pipeline's name if it is not set."""
    if len(stages) == 1:
        return list(stages)

    def tracked(recipe: Recipe) -> Recipe:
        group = recipe.tracking.group or name
        return recipe.model_copy(update={"tracking": recipe.tracking.model_copy(update={"group": group})})

    return [replace(stage, recipe=tracked(stage.recipe)) for stage in stages]


def with_types(stages: Sequence[Stage]) -> list[Stage]:
    """The stages, with a type for export.dtype=source where the stage's own source is not meant."""
    recipes = {stage.name: stage.recipe for stage in stages}
    taken = {name for stage in stages for name in references(stage.recipe).values()}
    return [replace(stage, recipe=_with_type(stage.recipe, recipes, stage.name in taken)) for stage in stages]


def _with_type(recipe: Recipe, stages: dict[str, Recipe], taken: bool) -> Recipe:
    chained = (recipe.model.path or "").startswith(STAGE)
    if recipe.export.dtype != "source" or not (taken or chained):
        return recipe
    first = recipe
    while (path := first.model.path or "").startswith(STAGE):
        first = stages[path.removeprefix(STAGE)]
    dtype = "fp32" if taken or recipe.learners.precision in WIDE else SHORT[source_dtype(first.model)]
    return recipe.model_copy(update={"export": recipe.export.model_copy(update={"dtype": dtype})})


def plan_stages(
    stages: Sequence[Stage],
    hardware: Hardware | None = None,
    lengths: Lengths | None = None,
    shape: str | None = None,
) -> list[tuple[str, Plan]]:
    """Plans the stages that take no other stage's export.

    hardware: None for this machine or cluster; lengths: lengths of made-up rows, instead of reading data;
    shape: shape of the model (models/shapes.py), by default the known one if data is made up.
    """
    ready = [s for s in stages if not references(s.recipe)]
    _check_later([s for s in stages if s not in ready])
    hardware = hardware or of_cluster(cluster_facts(recipe_requirements([s.recipe for s in ready])))
    return [(stage.name, _plan_stage(stage.recipe, hardware, lengths, shape)) for stage in ready]


def _plan_stage(recipe: Recipe, hardware: Hardware, lengths: Lengths | None, shape: str | None) -> Plan:
    shape = shape or (known_shape(recipe.model.path) if lengths is not None else None)
    with as_folder(recipe.model, shape) if shape is not None else nullcontext(recipe.model) as model:
        shaped = recipe.model_copy(update={"model": model})
        plan = (
            plan_run(shaped, Console(quiet=True), hardware).plan
            if lengths is None
            else plan_sketch(shaped, hardware, lengths)
        )
    choices = plan.choices if shape is None else (Choice("model", shape, "its shape only"), *plan.choices)
    return replace(plan, choices=choices, recipe=plan.recipe.model_copy(update={"model": recipe.model}))


def diagnose(stages: Sequence[Stage], root: Path | None) -> tuple[Finding, ...]:
    """Findings of `orchestrator doctor`: the cluster, and what the first stage that can be planned needs."""
    need = recipe_requirements([stage.recipe for stage in stages])
    facts = cluster_facts(need, root, kernels=True)
    ready = [s.recipe for s in stages if not references(s.recipe)]
    try:
        return check_cluster(
            facts,
            run_requirements(plan_run(ready[0], Console(quiet=True), of_cluster(facts))) if ready else need,
        )
    except NotEnoughResources as error:
        return (
            *check_cluster(facts, need),
            Finding("plan", "error", ready[0].run.name, error.what, error.fix),
        )
