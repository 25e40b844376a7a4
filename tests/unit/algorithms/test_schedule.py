"""Learning rates by optimizer step, as literal values."""

import pytest
import torch
from transformers import get_scheduler

from orchestrator.algorithms.schedule import learning_rate
from orchestrator.recipe.schema import Optimizer


def rates(total, steps, **options):
    optimizer = Optimizer(learning_rate=1.0, **options)
    return [learning_rate(optimizer, step, total) for step in steps]


def test_constant_without_warm_up():
    assert rates(10, range(3)) == [1.0, 1.0, 1.0]


def test_warm_up_begins_at_zero_and_reaches_the_peak_after_its_end():
    assert rates(100, range(6), warmup_steps=4) == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]


@pytest.mark.parametrize(
    ("schedule", "name"), [("constant", "constant_with_warmup"), ("linear", "linear"), ("cosine", "cosine")]
)
@pytest.mark.parametrize("warmup", [0, 1, 3])
def test_every_rate_is_transformers(schedule, name, warmup):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs, found = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=9), []
    for _ in range(9):
        found.append(theirs.get_last_lr()[0])
        optimizer.step()
        theirs.step()
    assert rates(9, range(9), schedule=schedule, warmup_steps=warmup) == pytest.approx(found, abs=1e-12)


def test_linear_decay_to_the_floor():
    assert rates(
        12, [0, 1, 2, 7, 12], schedule="linear", warmup_steps=2, min_learning_rate=0.2
    ) == pytest.approx([0.0, 0.5, 1.0, 0.6, 0.2])


def test_cosine_decay_to_the_floor():
    found = rates(8, [0, 2, 4, 6, 8], schedule="cosine", min_learning_rate=0.1)
    assert found == pytest.approx([1.0, 0.1 + 0.9 * 0.8535533906, 0.55, 0.1 + 0.9 * 0.1464466094, 0.1])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_beyond_the_last_step_the_floor_stays(schedule):
    assert rates(5, [5, 6, 50], schedule=schedule, min_learning_rate=0.3) == pytest.approx([0.3] * 3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_warm_up_longer_than_the_run(schedule):
    assert rates(3, range(4), schedule=schedule, warmup_steps=3) == pytest.approx([0.0, 1 / 3, 2 / 3, 1.0])
