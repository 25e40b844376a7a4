"""What a recipe leaves to the machines: GPUs of a worker, rollout actors and precision where it says `auto`.

recipe, hardware --settle--> recipe without these words, and why; learners.workers is counted after that (run/planned_run.py)
"""

from dataclasses import dataclass
from typing import Any

from orchestrator.core.errors import ConfigError
from orchestrator.core.resources import WorkerGroup
from orchestrator.plan.hardware import Hardware
from orchestrator.recipe.schema import ONLINE, Recipe


@dataclass(frozen=True, slots=True)
class Settled:
    """One key that was `auto`. Example: Settled("precision", "bf16", "the GPUs compute in it …")."""

    name: str
    value: str
    reason: str


def settle(recipe: Recipe, hardware: Hardware) -> tuple[Recipe, tuple[Settled, ...]]:
    """The recipe with a value for every `auto` of gpus_per_worker, precision and rollouts.workers, each with
    its reason."""
    learners, rollouts, notes = dict[str, Any](), dict[str, Any](), list[Settled]()
    online = recipe.algorithm.name in ONLINE
    if recipe.learners.gpus_per_worker == "auto":
        learners["gpus_per_worker"] = gpus = (
            _gpus(recipe, hardware, recipe.rollouts.gpus_per_worker) if hardware.has_gpus else 0.0
        )
        notes.append(Settled("GPUs per worker", f"{gpus:g}", _why(gpus)))
    has = learners.get("gpus_per_worker", recipe.learners.gpus_per_worker)
    if online and recipe.rollouts.gpus_per_worker == "auto":
        rollouts["gpus_per_worker"] = gpus = _gpus(recipe, hardware, has) if hardware.has_gpus else 0.0
        notes.append(Settled("GPUs per actor", f"{gpus:g}", _why(gpus)))
    if recipe.learners.precision == "auto":
        learners["precision"], reason = _precision(recipe, hardware, on_gpu=has > 0)
        notes.append(Settled("precision", learners["precision"], reason))
    recipe = _with(recipe, learners, rollouts)
    if online and recipe.rollouts.workers == "auto":
        count, reason = _actors(recipe, hardware)
        recipe = _with(recipe, {}, {"workers": count})
        notes.append(Settled("actors", str(count), reason))
    return recipe, tuple(notes)


def _with(recipe: Recipe, learners: dict[str, Any], rollouts: dict[str, Any]) -> Recipe:
    changed = {
        "learners": recipe.learners.model_copy(update=learners),
        "rollouts": recipe.rollouts.model_copy(update=rollouts),
    }
    return recipe.model_copy(update=changed)


def _gpus(recipe: Recipe, hardware: Hardware, beside: float | str) -> float:
    """Of a learner or an actor: a whole GPU, or what the other one of its bundle leaves of it."""
    if recipe.algorithm.name not in ONLINE or recipe.rollouts.placement == "separate":
        return 1.0
    return 0.5 if beside == "auto" or not 0 < float(beside) < 1 else 1.0 - float(beside)


def _why(gpus: float) -> str:
    return (
        ("a whole one" if gpus == 1 else "shared by a learner and an actor")
        if gpus
        else "the machines have none: on the CPU"
    )


def _precision(recipe: Recipe, hardware: Hardware, *, on_gpu: bool) -> tuple[str, str]:
    if not on_gpu:
        return "fp32", "on a CPU, where bf16 is no quicker"
    if not all(m.bf16 for m in hardware.machines if m.gpus):
        return "fp32", "not every GPU computes in bf16 (compute capability below 8.0)"
    if recipe.learners.zero_stage == 0:
        return (
            "bf16_autocast",
            "the GPUs compute in bf16, and at ZeRO stage 0 only autocast accumulates in fp32",
        )
    return "bf16", "the GPUs compute in it; master weights and accumulation stay in fp32"


def _actors(recipe: Recipe, hardware: Hardware) -> tuple[int, str]:
    """Rollout actors: colocated as many as there are learners, or pairs; separate half of what there is room
    for, one at least."""
    learners, rollouts = recipe.learners, recipe.rollouts
    at_most = rollouts.prompts  # an actor without a prompt has nothing to do
    if rollouts.placement == "colocated":
        if learners.workers != "auto":
            return learners.workers, "one beside each learner"
        pair = WorkerGroup(
            "pairs", 0, learners.cpus_per_worker + rollouts.cpus_per_worker, learners.gpus + rollouts.gpus
        )
        share = max(1, recipe.batch.effective // rollouts.samples)
        return max(
            1, min(hardware.room_for(pair), at_most, share)
        ), "as many pairs of a learner and an actor as there is room for"
    alone = WorkerGroup("rollouts", 0, rollouts.cpus_per_worker, rollouts.gpus)
    return max(
        1, min(hardware.room_for(alone) // 2, at_most)
    ), "half of what there is room for: the other half learns"


def one_gpu_each(recipe: Recipe) -> None:
    """ConfigError where a process is given more than the one GPU that it computes on: the rest would be
    reserved and lie idle."""
    asked = {
        "learners.gpus_per_worker": recipe.learners.gpus,
        "critic.gpus_per_worker": recipe.critic.gpus_per_worker,
        "rollouts.gpus_per_worker": recipe.rollouts.gpus,
        **{
            f"rewards.functions, gpus of {function.name}": function.gpus
            for function in recipe.rewards.functions
        },
    }
    for key, gpus in asked.items():
        if gpus > 1:
            raise ConfigError(
                f"{key} is {gpus:g}, and a worker computes on one GPU",
                why="each worker is one process on one device; what is beyond it would be reserved and lie "
                "idle",
                fix="set it to 1, or to a part of a GPU such as 0.5, and take more workers: the effective "
                "batch stays as it is",
            )
    beside = recipe.rollouts.gpus if recipe.rollouts.placement == "colocated" else 0.0
    learners, critic = recipe.learners, recipe.critic
    ranks = (
        ("learners", learners.count, learners.gpus, beside),
        ("critic", critic.workers, critic.gpus_per_worker, 0.0),
    )
    for section, workers, gpus, others in ranks:
        if workers > 1 and gpus > 0 and gpus + others <= 0.5:
            raise ConfigError(
                f"{section}.gpus_per_worker={gpus:g} puts two of {workers} workers on one GPU",
                why="NCCL takes one rank per GPU",
                fix=f"set {section}.gpus_per_worker above 0.5, or {section}.workers=1",
            )
