"""Each `auto` of a recipe gets a value and a reason on each kind of machine."""

import itertools
from typing import Any

import pytest

from orchestrator.plan.hardware import Hardware, Machine
from orchestrator.plan.settle import settle
from orchestrator.recipe.schema import Recipe

CPU = Hardware((Machine(8, 0, 1),))
GPUS = Hardware((Machine(64, 4, 1, 80_000_000_000),))
OLD = Hardware((Machine(8, 1, 1, 16_000_000_000, bf16=False),))
AUTO = {"workers": "auto", "gpus_per_worker": "auto"}


def recipe(
    name: str = "dpo", learners: dict[str, Any] | None = None, rollouts: dict[str, Any] | None = None
) -> Recipe:
    return Recipe.model_validate(
        {
            "model": {"path": "x"},
            "data": {"train": "x"},
            "algorithm": {"name": name},
            "optimizer": {"learning_rate": 1},
            "learners": {**AUTO, "precision": "auto", **(learners or {})},
            "rollouts": {**AUTO, **(rollouts or {})} if name == "grpo" else {},
        }
    )


@pytest.mark.parametrize(
    ("hardware", "learners", "wanted"),
    [
        (CPU, {}, (0.0, "fp32")),
        (GPUS, {}, (1.0, "bf16")),
        (OLD, {}, (1.0, "fp32")),
        (GPUS, {"zero_stage": 0}, (1.0, "bf16_autocast")),
        (GPUS, {"gpus_per_worker": 0}, (0, "fp32")),
        (GPUS, {"precision": "fp32"}, (1.0, "fp32")),
    ],
)
def test_gpus_and_precision(hardware: Hardware, learners: dict[str, Any], wanted: tuple[float, str]) -> None:
    settled, notes = settle(recipe(learners=learners), hardware)
    assert (settled.learners.gpus, settled.learners.precision) == wanted
    names = {note.name for note in notes}
    assert ("precision" in names) == ("precision" not in learners) and ("GPUs per worker" in names) == (
        "gpus_per_worker" not in learners
    )
    assert all(note.reason and note.value for note in notes)


def test_nothing_is_settled_that_was_set() -> None:
    mine = recipe(learners={"workers": 2, "gpus_per_worker": 0.5, "precision": "fp16"})
    assert settle(mine, CPU) == (mine, ())


@pytest.mark.parametrize(
    ("hardware", "placement"), list(itertools.product((CPU, GPUS, OLD), ("separate", "colocated")))
)
def test_actors_and_learners_share_the_machine(hardware: Hardware, placement: str) -> None:
    settled, notes = settle(recipe("grpo", rollouts={"placement": placement}), hardware)
    learners, rollouts = settled.learners, settled.rollouts
    assert rollouts.count >= 1 and (learners.gpus > 0) == (rollouts.gpus > 0) == hardware.has_gpus
    if hardware.has_gpus:
        assert learners.gpus + rollouts.gpus == (1.0 if placement == "colocated" else 2.0)
    if placement == "colocated":
        assert rollouts.count == {CPU: 4, GPUS: 4, OLD: 1}[hardware]
    assert {"actors", "GPUs per actor"} <= {note.name for note in notes}


def test_an_actor_takes_what_the_learner_leaves_and_there_are_as_many() -> None:
    settled, _ = settle(
        recipe("grpo", learners={"workers": 3, "gpus_per_worker": 0.75}, rollouts={"placement": "colocated"}),
        GPUS,
    )
    assert (settled.rollouts.gpus, settled.rollouts.count) == (0.25, 3)
