"""Losses that couple examples (AOT's sort, KTO's KL term), over the EFFECTIVE batch in two passes.

pass 1  token log-probs of all micro-batches, no gradient
        the loss once over the whole effective batch  ->  d loss / d log-prob of every token
pass 2  micro-batch by micro-batch: gradient of sum(coefficient * log-prob), exactly that of one large batch
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from orchestrator.algorithms.losses.interface import LossSum, TokenScores
from orchestrator.algorithms.losses.sources import by_source
from orchestrator.algorithms.losses.whole_batch import coefficients
from orchestrator.algorithms.table import AlgorithmSpec
from orchestrator.core.batches import Floats, PackedBatch
from orchestrator.core.errors import DataError
from orchestrator.core.reports import LearnReport, Mean
from orchestrator.core.roles import Learner, PerMicroBatch


@dataclass(frozen=True, slots=True)
class WholeLoss:
    """Loss and metrics of pass 1. They are those of the step: pass 2 only carries the gradient."""

    loss: float
    means: dict[str, Mean]

    def merged_into(self, report: LearnReport) -> LearnReport:
        return replace(report, loss=self.loss, means=self.means)


def with_coefficients(
    batch: PackedBatch, policy: Learner, algorithm: AlgorithmSpec, step: int, precision: str = "fp32"
) -> tuple[PackedBatch, WholeLoss]:
    """Pass 1: (the batch with d loss / d log-prob in every micro-batch, the loss of the effective batch).

    step: the optimizer step whose dropout pass 2 will draw, so that both passes see the same network.
    precision: learners.precision.
    """
    scores = replace(whole_scores(batch, policy.token_logprobs(batch, step=step)), precision=precision)
    loss, gradient = coefficients(algorithm.objective, scores, batch.units)
    return batch.with_coefficients(_split(batch, gradient.float().numpy())), _whole(loss, batch)


def whole_scores(batch: PackedBatch, logprobs: PerMicroBatch) -> TokenScores:
    """All examples of the effective batch as one TokenScores, in the order of the micro-batches, without
    fillers."""
    parts = [
        (mb, lp)
        for rank, values in zip(batch.micro_batches, logprobs, strict=True)
        for mb, lp in zip(rank, values, strict=True)
    ]
    parts = [(mb, lp) for mb, lp in parts if mb.weight]
    offset, sequences = 0, []
    for mb, _ in parts:
        sequences.append(mb.sequence + offset)
        offset += len(mb) * mb.branches
    return TokenScores(
        logps=torch.from_numpy(np.concatenate([lp for _, lp in parts])).double(),
        ref_logps=_column([mb.ref_logprobs for mb, _ in parts], "reference log-probs"),
        sequence=torch.from_numpy(np.concatenate(sequences)),
        examples=sum(len(mb) for mb, _ in parts),
        branches=parts[0][0].branches,
        label=_column([mb.label for mb, _ in parts], "label"),
        margin=_column([mb.margin for mb, _ in parts], "margin"),
    )


def _column(values: list[Floats | None], name: str) -> torch.Tensor | None:
    """A column of all micro-batches; None if none has it. DataError if only a part of them has it."""
    present = [v for v in values if v is not None]
    if not present:
        return None
    if len(present) < len(values):
        raise DataError(
            f"{len(values) - len(present)} of {len(values)} micro-batches of a step have no {name}",
            why="the others have it, and the loss reads a column from all examples or from none",
            fix="give every row the column, or leave it out with data.columns",
        )
    return torch.from_numpy(np.concatenate(present)).double()


def _split(batch: PackedBatch, gradient: Floats) -> PerMicroBatch:
    start, ranks = 0, []
    for rank in batch.micro_batches:
        values = []
        for mb in rank:
            values.append(
                gradient[start : start + len(mb.targets)]
                if mb.weight
                else np.zeros(len(mb.targets), np.float32)
            )
            start += len(mb.targets) if mb.weight else 0
        ranks.append(tuple(values))
    assert start == len(gradient)
    return tuple(ranks)


def _whole(loss: LossSum, batch: PackedBatch) -> WholeLoss:
    source = np.concatenate(
        [mb.source for rank in batch.micro_batches for mb in rank if mb.weight and mb.source is not None]
    )
    present = sorted({int(number) for number in source})
    means = loss.means | (
        by_source(loss.per_example, torch.from_numpy(source), present) if len(present) > 1 else {}
    )
    return WholeLoss(
        float(loss.total), {name: Mean(float(total), float(count)) for name, (total, count) in means.items()}
    )
