"""Means for each source of the data: sums and counts of a micro-batch, so that they add up exactly over any
cut."""

from collections.abc import Sequence

import torch
from torch import Tensor

from orchestrator.algorithms.losses.interface import Means, PerExample
from orchestrator.core.reports import SOURCE


def by_source(per_example: PerExample, source: Tensor, present: Sequence[int]) -> Means:
    """`NAME/source K` for every metric and every source K that is present. source: Int[n] of each example, on
    the metrics' device."""
    means: Means = {}
    for number in present:
        mine = source == number
        for name, (sums, counts) in per_example.items():
            count = mine.sum() if counts is None else torch.where(mine, counts, 0.0).sum()
            means[f"{name}{SOURCE}{number}"] = (torch.where(mine, sums.double(), 0.0).sum(), count)
    return means
