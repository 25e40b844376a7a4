"""Requirements of a planned run: its worker groups, the size of its checkpoints, the origin of its
weights."""

from dataclasses import replace
from pathlib import Path

from rich.console import Console

from orchestrator.cluster.doctor.facts import ModelSource
from orchestrator.core.resources import WorkerGroup
from orchestrator.models.load import load as load_model
from orchestrator.recipe.loading import load
from orchestrator.recipe.schema import Model, RewardFunction, TinyModel
from orchestrator.run.planned_run import PlannedRun, plan_run
from orchestrator.run.preflight import model_sources, run_requirements

TINY = TinyModel(hidden_size=32, layers=1, heads=2)  # pyright: ignore[reportCallIssue]


def planned_run(name: str, *overrides: str) -> PlannedRun:
    """The last stage of a recipe, planned with a model that needs no earlier stage."""
    stages = load(name).stages
    prefix = f"{stages[-1].name}:" if len(stages) > 1 else ""
    recipe = load(name, [prefix + o for o in (*overrides, "data.eval=null")]).stages[-1].recipe
    model = recipe.model.model_copy(update={"path": None, "tiny": TINY})
    return plan_run(recipe.model_copy(update={"model": model}), Console(quiet=True))


def parameters(model: Model, head: str = "lm") -> tuple[int, int]:
    """(all, trainable) of the real model."""
    loaded = load_model(model, seed=0, head=head).model  # pyright: ignore[reportArgumentType]
    return sum(p.numel() for p in loaded.parameters()), sum(
        p.numel() for p in loaded.parameters() if p.requires_grad
    )


def test_a_checkpoint_holds_master_weights_and_two_moments() -> None:
    planned = planned_run("tiny/dpo", "learners.workers=2", "checkpoint.keep=3", "tracking.wandb=online")
    need = run_requirements(planned)
    assert need.checkpoint_bytes == 12 * parameters(planned.recipe.model)[1]
    assert need.groups == (WorkerGroup("learners", 2, planned.recipe.learners.cpus_per_worker, 0),)
    assert (need.keep, need.wandb, need.gpus, need.libraries) == (3, "online", False, ())


def test_lora_and_a_moving_reference_change_the_checkpoint_size() -> None:
    moving, adapter = (
        planned_run("tiny/dpo", "algorithm.reference_sync_every=2"),
        planned_run("tiny/dpo", "model.lora={rank: 4}"),
    )
    every, trainable = parameters(moving.recipe.model)
    assert run_requirements(moving).checkpoint_bytes == 12 * trainable + 4 * every
    assert run_requirements(adapter).checkpoint_bytes == 12 * parameters(adapter.recipe.model)[1] < trainable


def test_ppo_needs_a_critic_and_its_checkpoint() -> None:
    planned = planned_run("tiny/ppo", "learners.gpus_per_worker=1", "learners.precision=bf16")
    need = run_requirements(planned)
    policy, critic = parameters(planned.recipe.model)[1], parameters(planned.recipe.model, "value")[1]
    assert need.checkpoint_bytes == 12 * (policy + critic)
    assert [g.what for g in need.groups] == ["learners", "critic", "rollouts"] and need.gpus


def test_the_object_store_holds_published_weights_twice_and_once_per_version_of_staleness() -> None:
    planned = planned_run("tiny/ppo", "learners.precision=bf16", "rollouts.max_staleness=1")
    trainable = parameters(planned.recipe.model)[1]
    assert run_requirements(planned).object_store == 3 * 2 * trainable
    assert run_requirements(planned_run("tiny/ppo", "rollouts.transport=broadcast")).object_store == 0
    assert run_requirements(planned_run("tiny/dpo")).object_store == 0


def test_reward_models_and_vllm_are_required() -> None:
    planned = planned_run("tiny/ppo")
    judge = RewardFunction(name="judge", model="/models/judge", gpus=0.5)  # pyright: ignore[reportCallIssue]
    recipe = planned.recipe
    rewards, rollouts = (
        recipe.rewards.model_copy(update={"functions": [judge]}),
        recipe.rollouts.model_copy(update={"engine": "vllm"}),
    )
    need = run_requirements(
        replace(planned, recipe=recipe.model_copy(update={"rewards": rewards, "rollouts": rollouts}))
    )
    assert need.groups[-1] == WorkerGroup("reward judge", 1, 0.0, 0.5)
    assert need.libraries == ("vllm",)
    assert need.models == (ModelSource("/models/judge", None, hub=False),)


def test_weights_come_from_folders_and_from_the_hub(tmp_path: Path) -> None:
    recipe = load("tiny/dpo").stages[-1].recipe
    assert model_sources(recipe) == ()
    model = Model.model_validate({"path": str(tmp_path), "reference": "org/model", "revision": "abc"})
    sources = model_sources(recipe.model_copy(update={"model": model}))
    assert sources == (ModelSource(str(tmp_path), "abc", hub=False), ModelSource("org/model", None, hub=True))
