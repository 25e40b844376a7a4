"""Learning rates by optimizer step, as literal values."""

import pytest

from orchestrator.config import Optimizer
from orchestrator.learner.schedule import learning_rate


def rates(total, steps, **options):
    optimizer = Optimizer(learning_rate=1.0, **options)
    return [learning_rate(optimizer, step, total) for step in steps]


def test_constant_without_warm_up():
    assert rates(10, range(3)) == [1.0, 1.0, 1.0]


def test_warm_up_begins_above_zero_and_reaches_the_peak_at_its_end():
    assert rates(100, range(6), warmup_steps=4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_linear_decay_to_the_floor():
    assert rates(12, [0, 1, 2, 7, 12], schedule="linear", warmup_steps=2, min_learning_rate=0.2) == pytest.approx([0.5, 1.0, 1.0, 0.6, 0.2])


def test_cosine_decay_to_the_floor():
    found = rates(8, [0, 2, 4, 6, 8], schedule="cosine", min_learning_rate=0.1)
    assert found == pytest.approx([1.0, 0.1 + 0.9 * 0.8535533906, 0.55, 0.1 + 0.9 * 0.1464466094, 0.1])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_beyond_the_last_step_the_floor_stays(schedule):
    assert rates(5, [5, 6, 50], schedule=schedule, min_learning_rate=0.3) == pytest.approx([0.3] * 3)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_warm_up_longer_than_the_run(schedule):
    assert rates(3, range(4), schedule=schedule, warmup_steps=3) == pytest.approx([1 / 3, 2 / 3, 1.0, 1.0])
