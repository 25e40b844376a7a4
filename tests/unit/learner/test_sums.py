"""Sums of a step on the device are exact and read once, whether counts are on the host or on the device."""

import torch

from orchestrator.algorithms.losses.interface import LossSum
from orchestrator.core.reports import Mean
from orchestrator.learner.rank_learner import Sums


def loss(total: float, value: float, count: float | torch.Tensor, largest: float) -> LossSum:
    return LossSum(
        torch.tensor(total),
        {"rewards": (torch.tensor(value), count), "kl": (torch.tensor(0.5), 1.0)},
        {"ratio": torch.tensor(largest)},
    )


def test_counts_of_the_host_and_of_the_device_add_up_alike():
    for make in (float, torch.tensor):
        sums = Sums()
        sums.add(loss(0.25, 3.0, make(2), 1.0), 1.0)
        sums.add(loss(0.5, 5.0, make(3), 4.0), 1.0)
        sums.add(loss(9.0, 9.0, make(9), 9.0), 0.0)  # a filler
        total, means, maxima = sums.read()
        assert total == 0.75
        assert means == {"rewards": Mean(8.0, 5.0), "kl": Mean(1.0, 2.0)}
        assert maxima == {"ratio": 4.0}


def test_a_large_count_on_the_device_is_exact():
    sums = Sums()
    for count in (2**24, 1):
        sums.add(loss(0.0, 0.0, torch.tensor(count), 0.0), 1.0)
    assert sums.read()[1]["rewards"].count == 2**24 + 1


def test_sums_without_micro_batches_are_empty():
    assert Sums().read() == (0.0, {}, {})
