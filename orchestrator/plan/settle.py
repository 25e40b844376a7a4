"""Values for `auto`: GPUs of a worker, number of rollout actors, and precision, as the hardware allows.

    recipe, hardware --settle--> recipe with values, and their reasons

run/planned_run.py counts learners.workers after that.
"""

from typing import Any

from orchestrator.core.resources import WorkerGroup
from orchestrator.plan.choice import Choice
from orchestrator.plan.hardware import Hardware
from orchestrator.recipe.schema import ONLINE, Recipe


def settle(recipe: Recipe, hardware: Hardware) -> tuple[Recipe, tuple[Choice, ...]]:
    """The recipe with a value for each `auto` of gpus_per_worker, precision and rollouts.workers, and the
    reasons."""
    learners, rollouts, notes = dict[str, Any](), dict[str, Any](), list[Choice]()
    online = recipe.algorithm.name in ONLINE
    if recipe.learners.gpus_per_worker == "auto":
        learners["gpus_per_worker"] = gpus = (
            _gpus(recipe, hardware, recipe.rollouts.gpus_per_worker) if hardware.has_gpus else 0.0
        )
        notes.append(Choice("GPUs per worker", f"{gpus:g}", _why(gpus)))
    learner_gpus = learners.get("gpus_per_worker", recipe.learners.gpus_per_worker)
    if online and recipe.rollouts.gpus_per_worker == "auto":
        rollouts["gpus_per_worker"] = gpus = (
            _gpus(recipe, hardware, learner_gpus) if hardware.has_gpus else 0.0
        )
        notes.append(Choice("GPUs per actor", f"{gpus:g}", _why(gpus)))
    if recipe.learners.precision == "auto":
        learners["precision"], reason = _precision(recipe, hardware, on_gpu=learner_gpus > 0)
        notes.append(Choice("precision", learners["precision"], reason))
    recipe = _with(recipe, learners, rollouts)
    if online and recipe.rollouts.workers == "auto":
        count, reason = _actors(recipe, hardware)
        recipe = _with(recipe, {}, {"workers": count})
        notes.append(Choice("actors", str(count), reason))
    return recipe, tuple(notes)


def _with(recipe: Recipe, learners: dict[str, Any], rollouts: dict[str, Any]) -> Recipe:
    changed = {
        "learners": recipe.learners.model_copy(update=learners),
        "rollouts": recipe.rollouts.model_copy(update=rollouts),
    }
    return recipe.model_copy(update=changed)


def _gpus(recipe: Recipe, hardware: Hardware, beside: float | str) -> float:
    """GPUs of a learner or an actor: 1, or the rest that the other of its bundle leaves. beside: GPUs of the
    other."""
    if recipe.algorithm.name not in ONLINE or recipe.rollouts.placement == "separate":
        return 1.0
    return 0.5 if beside == "auto" or not 0 < float(beside) < 1 else 1.0 - float(beside)


def _why(gpus: float) -> str:
    return (
        ("a whole GPU" if gpus == 1 else "shared by a learner and an actor")
        if gpus
        else "the machines have none: it runs on the CPU"
    )


def _precision(recipe: Recipe, hardware: Hardware, *, on_gpu: bool) -> tuple[str, str]:
    """(precision, reason)."""
    if not on_gpu:
        return "fp32", "on a CPU bf16 is not quicker"
    if not all(m.bf16 for m in hardware.machines if m.gpus):
        return "fp32", "a GPU does not compute in bf16 (its compute capability is below 8.0)"
    if recipe.learners.zero_stage == 0:
        return (
            "bf16_autocast",
            "the GPUs compute in bf16, and at ZeRO stage 0 only autocast accumulates in fp32",
        )
    return "bf16", "the GPUs compute in it; master weights and accumulation stay in fp32"


def _actors(recipe: Recipe, hardware: Hardware) -> tuple[int, str]:
    """(number of rollout actors, reason). Colocated: as many as learners, or as pairs fit. Separate: half of
    those that fit. At least one."""
    learners, rollouts = recipe.learners, recipe.rollouts
    at_most = rollouts.prompts  # each actor has at least one prompt
    if rollouts.placement == "colocated":
        if learners.workers != "auto":
            return learners.workers, "one beside each learner"
        pair = WorkerGroup(
            "pairs", 0, learners.cpus_per_worker + rollouts.cpus_per_worker, learners.gpus + rollouts.gpus
        )
        share = max(1, recipe.batch.effective // rollouts.samples)
        count = max(1, min(hardware.room_for(pair), at_most, share))
        return count, "as many pairs of a learner and an actor as there is room for"
    alone = WorkerGroup("rollouts", 0, rollouts.cpus_per_worker, rollouts.gpus)
    count = max(1, min(hardware.room_for(alone) // 2, at_most))
    return count, "half of what there is room for; the other half is for learners"
