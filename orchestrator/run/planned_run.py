"""A planned run, offline or online: its recipe, data and plan, and the sinks and model card made from them.

Recipe --settle, learners.workers--> make_plan --choices, warnings--> PlannedRun
"""

import json
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from orchestrator.algorithms.table import AlgorithmSpec, build
from orchestrator.cluster.metrics_sink import RayMetricsSink
from orchestrator.cluster.placement import demands
from orchestrator.core.errors import ConfigError, NotEnoughResources
from orchestrator.core.format import size
from orchestrator.core.resources import WorkerGroup
from orchestrator.data.dataset import DataSet, PlanInput
from orchestrator.data.prompts import PromptSet, check_batches
from orchestrator.models.load import load_config
from orchestrator.models.precision import precision_of
from orchestrator.observe.callbacks import Callback, CallbackSink
from orchestrator.observe.console import ConsoleSink
from orchestrator.observe.jsonl import JsonlSink
from orchestrator.observe.report.model_card import model_card
from orchestrator.observe.reporter import RunReporter
from orchestrator.observe.sink import Sink
from orchestrator.observe.wandb_sink import WandbSink, stable_run_id
from orchestrator.observe.watch import Watch
from orchestrator.plan import disk
from orchestrator.plan.choice import Choice
from orchestrator.plan.hardware import Hardware, this_machine
from orchestrator.plan.planner import Plan, make_plan
from orchestrator.plan.sanity import SanityInputs, sanity_warnings
from orchestrator.plan.settle import settle
from orchestrator.plan.sketch import Lengths, synthetic_data
from orchestrator.plan.state_bytes import Sizes
from orchestrator.recipe.loading import dump
from orchestrator.recipe.schema import ONLINE, Recipe
from orchestrator.rollout.rewards.lookup import check_rewards
from orchestrator.rollout.trial import try_user_code
from orchestrator.run.folder import RunFolder
from orchestrator.run.inputs import read_data, read_prompts
from orchestrator.trainers.optimizer_step import Guards

TRACKED_PLAN = ("arithmetic", "total_steps", "cut", "choices", "memory", "memory_limit", "traffic")
"""Parts of the plan that are logged to wandb. The part about the data is left out: it may quote rows."""


@dataclass(frozen=True, slots=True)
class PlannedRun:
    """A recipe with its data and its plan: what one start of a run works from."""

    recipe: Recipe
    """The plan's recipe: `learners.workers` is a number."""
    algorithm: AlgorithmSpec
    data: PlanInput
    """Examples that steps are planned and checked with: of an online run its longest possible rollouts."""
    prompts: PromptSet | None
    """None for an offline run."""
    plan: Plan
    optimizer_steps: int
    """Optimizer steps per step of the loop: 1 offline; online as many as one rollout batch gives."""
    console: Console
    """The user's console."""
    in_process: bool = False
    """The only worker is this process, without Ray."""
    callbacks: tuple[Callback, ...] = ()
    """Functions that see every report."""

    @property
    def schedule_steps(self) -> int:
        """Optimizer steps of the whole run, which the learning rate's schedule counts."""
        return self.plan.total_steps * self.optimizer_steps

    @property
    def data_set(self) -> DataSet:
        """The data of an offline run, held-out rows included."""
        assert isinstance(self.data, DataSet), "an online run has prompts, not rows"
        return self.data

    def demands(self) -> tuple[WorkerGroup, ...]:
        """Worker groups that the run needs."""
        return _demands(self.recipe, self.algorithm)

    def reward_models(self) -> tuple[WorkerGroup, ...]:
        """Worker groups of the reward models that have a GPU."""
        functions = (
            self.recipe.rewards.functions
            if self.algorithm.online is not None and self.recipe.rollouts.replay is None
            else []
        )
        return tuple(WorkerGroup(f"reward {f.name}", 1, 0.0, f.gpus) for f in functions if f.gpus)

    def sizes(self) -> Sizes:
        """Parameters of the policy."""
        return self.plan.sizes

    def store_bytes(self) -> int:
        """Bytes of the published weights in Ray's object store; 0 if they take another way.

        They are those of the version in use, of the one being written, and of rollouts.max_staleness more.
        """
        recipe = self.recipe
        if (
            self.algorithm.online is None
            or recipe.rollouts.replay is not None
            or recipe.rollouts.transport not in ("auto", "object_store")
        ):
            return 0
        return (
            (2 + recipe.rollouts.max_staleness)
            * precision_of(recipe.learners.precision).wire_dtype.itemsize
            * self.sizes().learns
        )

    def guards(self) -> Guards:
        """Limits that each optimizer step is checked against."""
        tolerance = 1e-5 if precision_of(self.recipe.learners.precision).exact else 3e-2
        if self.recipe.model.reference is not None:  # the policy does not start as the reference
            tolerance = None
        return Guards(tolerance, self.plan.traffic.per_reduction, precision=self.recipe.learners.precision)

    def reporter(self, folder: RunFolder, resume_step: int) -> RunReporter:
        """A reporter over all sinks that the recipe asks for.

        Used as a context, it knows whether the run failed.
        """
        recipe, tracking = self.recipe, self.recipe.tracking
        name, algorithm = recipe.run.name, recipe.algorithm.name
        sinks: list[Sink] = [
            ConsoleSink(self.plan.total_steps, self.console),
            JsonlSink(folder.root, resume_step),
        ]
        sinks.append(RayMetricsSink(tracking.group or name, algorithm, name))
        sinks += [CallbackSink(self.callbacks)] if self.callbacks else []
        if tracking.wandb != "off":
            plan = self.plan.to_json()
            config = {
                **recipe.model_dump(mode="json"),
                "plan": {key: plan[key] for key in TRACKED_PLAN},
                "versions": _versions(),
            }
            sinks.append(
                WandbSink(
                    folder.root,
                    tracking,
                    name,
                    config,
                    stable_run_id(folder.fingerprint, folder.root),
                    algorithm,
                )
            )
        return RunReporter(
            sinks, folder.logs / "driver.log", Watch(folder.root, tracking.alerts, resume_step)
        )

    def card(self, folder: RunFolder) -> str:
        """The model card of the export."""
        return card_of(self.recipe, self.data.loaded.fingerprint, folder.metrics)

    def plan_json(self) -> str:
        return json.dumps(self.plan.to_json(), indent=1)


def card_of(recipe: Recipe, rows: str, metrics: Path, last: int | None = None) -> str:
    """The model card of an export.

    rows: fingerprint of the training data; last: exported step, None for the newest.
    """
    tiny = recipe.model.tiny
    return model_card(
        name=recipe.run.name,
        base=f"a random-weight {tiny.architecture} model" if tiny is not None else str(recipe.model.path),
        algorithm=recipe.algorithm.name,
        recipe_yaml=dump(recipe),
        data_fingerprint=rows,
        metrics_path=metrics,
        library_versions=_versions(),
        last=last,
    )


def _versions() -> dict[str, str]:
    """Versions of the libraries that a result depends on."""
    return {name: version(name) for name in ("torch", "transformers", "deepspeed", "ray", "trl")}


def plan_run(
    recipe: Recipe, console: Console, hardware: Hardware | None = None, *, own_rewards: bool = False
) -> PlannedRun:
    """Reads the data and plans the run on `hardware` (default: this machine), without Ray and without model
    weights.

    own_rewards: the caller computes the rewards, so the recipe needs none.
    """
    if recipe.algorithm.name in ONLINE and not own_rewards:
        require_reward(recipe)
    return _plan_run(recipe, console, hardware or this_machine(), None)


def plan_sketch(recipe: Recipe, hardware: Hardware, lengths: Lengths) -> Plan:
    """The plan for made-up rows of these lengths. No data is read."""
    if recipe.algorithm.name in ONLINE:
        require_reward(recipe)
    plan = _plan_run(recipe, Console(quiet=True), hardware, lengths).plan
    return replace(
        plan,
        choices=(
            Choice("data", "synthetic", f"{lengths}: total steps are those of these rows only"),
            *plan.choices,
        ),
    )


def _plan_run(recipe: Recipe, console: Console, hardware: Hardware, lengths: Lengths | None) -> PlannedRun:
    algorithm = build(recipe.algorithm, recipe.rollouts)
    settled, reasons = settle(recipe, hardware)
    sized = _with_learner_count(settled, algorithm, hardware)
    automatic = recipe.learners.workers == "auto" and (
        recipe.rollouts.workers == "auto" or recipe.rollouts.placement == "separate"
    )
    plan_kind = _plan_offline if algorithm.online is None else _plan_online
    may_shrink = automatic and not sized.learners.gpus
    planned = plan_kind(sized, algorithm, hardware, lengths, console, may_shrink=may_shrink)
    choices = (*reasons, *planned.plan.choices)
    inputs = SanityInputs(
        planned.recipe,
        planned.data,
        planned.plan.data,
        planned.plan.total_steps,
        planned.schedule_steps,
        planned.plan.parameters,
    )
    return replace(
        planned,
        plan=replace(
            planned.plan, choices=choices, warnings=() if lengths is not None else sanity_warnings(inputs)
        ),
    )


def _plan_offline(
    recipe: Recipe,
    algorithm: AlgorithmSpec,
    hardware: Hardware,
    lengths: Lengths | None,
    console: Console,
    *,
    may_shrink: bool,
) -> PlannedRun:
    data = read_data(recipe, algorithm) if lengths is None else synthetic_data(recipe, algorithm, lengths)
    plan = _plan_that_fits(recipe, algorithm, data, hardware, may_shrink)
    return PlannedRun(plan.recipe, algorithm, data, None, plan, 1, console)


def _plan_online(
    recipe: Recipe,
    algorithm: AlgorithmSpec,
    hardware: Hardware,
    lengths: Lengths | None,
    console: Console,
    *,
    may_shrink: bool,
) -> PlannedRun:
    steps = check_batches(recipe, algorithm) * recipe.algorithm.epochs
    check_rewards(recipe.rewards)
    prompts, columns = None, None
    if lengths is None:
        prompts = read_prompts(recipe, algorithm)
        longest = prompts.longest
        columns = list(dict.fromkeys(name for prompt in prompts.batches.groups for name in prompt.columns))
    else:
        longest = synthetic_data(recipe, algorithm, lengths)
    try_user_code(recipe.rewards, recipe.rollouts.environment, columns)
    plan = _plan_that_fits(recipe, algorithm, longest, hardware, may_shrink)
    total = recipe.run.max_steps or (
        prompts.batches.steps_in(recipe.run.epochs) if prompts is not None else plan.total_steps
    )
    data = replace(plan.data, held_out=0 if prompts is None else len(prompts.held_out))
    plan = replace(
        plan,
        total_steps=total,
        data=data,
        choices=(*plan.choices, *_rollout_choices(plan.recipe, plan.sizes, steps)),
    )
    return PlannedRun(plan.recipe, algorithm, longest, prompts, plan, steps, console)


def require_reward(recipe: Recipe) -> None:
    """ConfigError if neither a reward function, an environment nor a replay gives rewards."""
    if (
        not recipe.rewards.functions
        and recipe.rollouts.environment is None
        and recipe.rollouts.replay is None
    ):
        raise ConfigError(
            "rewards.functions is empty: nothing gives a reward",
            why=f"{recipe.algorithm.name} learns from a number for each completion",
            fix="add e.g. rewards.functions=[{name: correct, function: last_number}] (exact_match, "
            "file.py:function, trl:NAME; a model or url), "
            "or set rollouts.environment",
        )


def _plan_that_fits(
    recipe: Recipe, algorithm: AlgorithmSpec, data: PlanInput, hardware: Hardware, may_shrink: bool
) -> Plan:
    """The plan. With `may_shrink` the workers are halved until the machine's RAM holds them."""
    while True:
        try:
            return _with_disk(make_plan(recipe, algorithm, data, hardware), algorithm)
        except NotEnoughResources:
            if not may_shrink or recipe.learners.count == 1:
                raise
        colocated = algorithm.online is not None and recipe.rollouts.placement == "colocated"
        recipe = recipe.with_workers(recipe.learners.count // 2)
        if colocated:
            recipe = recipe.model_copy(
                update={"rollouts": recipe.rollouts.model_copy(update={"workers": recipe.learners.count})}
            )


def _with_disk(plan: Plan, algorithm: AlgorithmSpec) -> Plan:
    return replace(
        plan, choices=(*plan.choices, Choice("disk", *disk.in_words(plan.recipe, algorithm, plan.sizes)))
    )


def _demands(recipe: Recipe, algorithm: AlgorithmSpec) -> tuple[WorkerGroup, ...]:
    online = algorithm.online
    return demands(
        recipe,
        critic=online is not None and online.critic,
        rollouts=online is not None and recipe.rollouts.replay is None,
    )


def _with_learner_count(recipe: Recipe, algorithm: AlgorithmSpec, hardware: Hardware) -> Recipe:
    """The recipe with a number for `learners.workers: auto`: as many as there is room for beside the other
    actors, at most one per example of an optimizer step. The number changes no result."""
    if recipe.learners.workers != "auto":
        return recipe
    if algorithm.online is not None and recipe.rollouts.placement == "colocated":
        return recipe.with_workers(recipe.rollouts.count)
    learners, *others = _demands(recipe.with_workers(1), algorithm)
    room = min(hardware.room_for(learners, others), recipe.batch.effective // algorithm.group_examples)
    if room < 1:
        each = f"{learners.cpus:g} CPUs" + (f" and {learners.gpus:g} GPUs" if learners.gpus else "")
        raise NotEnoughResources(
            f"the hardware has no room for a learner of {each}"
            + (f" beside {', '.join(f'{g.workers} {g.what}' for g in others)}" if others else ""),
            why=str(hardware),
            fix="set learners.gpus_per_worker or cpus_per_worker to what a machine has; to plan for other "
            "machines: plan --nodes N --gpu h100-80g",
        )
    return recipe.with_workers(room)


def _rollout_choices(recipe: Recipe, sizes: Sizes, steps: int) -> list[Choice]:
    """Lines of `orchestrator plan` about the rollouts."""
    rollouts = recipe.rollouts
    batch = (
        f"{rollouts.prompts} prompts x {rollouts.samples} samples = "
        f"{rollouts.prompts * rollouts.samples} completions"
    )
    ahead = (
        "strictly on-policy"
        if not rollouts.max_staleness
        else f"generation runs at most {rollouts.max_staleness} versions ahead of learning"
    )
    actors = (
        f"{rollouts.count} {rollouts.engine} actor{'s' if rollouts.count > 1 else ''}, {rollouts.placement}"
    )
    return [
        Choice("rollout batch", batch, f"{steps} optimizer step{'s' if steps > 1 else ''} from each"),
        Choice("rollouts", actors, ahead),
        Choice(
            "rollout memory",
            size(rollout_bytes(recipe, sizes)),
            f"per actor: weights, keys and values of {rollouts.rows} full rows",
        ),
    ]


def rollout_bytes(recipe: Recipe, sizes: Sizes) -> int:
    """Predicted bytes of a transformers rollout actor: its weights, and the keys and values of rollouts.rows
    full rows."""
    config = load_config(recipe.model).get_text_config()
    element = precision_of(recipe.learners.precision).wire_dtype.itemsize
    attention: int = getattr(config, "num_attention_heads", None) or 0  # a recurrent model has no keys
    heads = getattr(config, "num_key_value_heads", None) or attention
    width = getattr(config, "head_dim", None) or (config.hidden_size // attention if attention else 0)
    per_token = 2 * element * (getattr(config, "num_hidden_layers", None) or 0) * heads * width
    return element * sizes.all + per_token * recipe.rollouts.rows * recipe.data.max_length
