"""Means for each source of the data: sums and counts of a micro-batch, which add up exactly over any cut."""

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from orchestrator.algorithms.losses.interface import Means, PerExample
from orchestrator.core.reports import SOURCE


def by_source(per_example: PerExample, source: Int[Tensor, " n"], present: Sequence[int]) -> Means:
    """`NAME/source K` for every metric and every source K in `present`.

    source: source of each example, on the metrics' device.
    """
    means: Means = {}
    for number in present:
        of_source = source == number
        for name, (sums, counts) in per_example.items():
            count = of_source.sum() if counts is None else torch.where(of_source, counts, 0.0).sum()
            means[f"{name}{SOURCE}{number}"] = (torch.where(of_source, sums.double(), 0.0).sum(), count)
    return means
