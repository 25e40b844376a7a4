"""The policy's weights, bucket by bucket, for the generators: gathered from ZeRO-3 shards, never the whole model at once.

LoRA sends its adapter only: the generators hold the base weights already.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from orchestrator.learner.learner import RankLearner, iterate_trainable
from orchestrator.models.buckets import Entry, fill, layout

WIRE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "bf16_autocast": torch.bfloat16}
"""What the generators compute with: the precision of the learners' own forward, so that log-probs agree."""


@dataclass(frozen=True, slots=True)
class BucketPlan:
    """One bucket: where each parameter lies in it, by Hugging Face name, and its bytes. The same on every rank and version."""

    entries: tuple[Entry, ...]
    size: int


def bucket_plans(learner: RankLearner, bucket_bytes: int) -> tuple[BucketPlan, ...]:
    """How the trainable parameters fall into buckets of at most `bucket_bytes` (a larger parameter has one of its own)."""
    return tuple(BucketPlan(*layout([(name, _shape(p)) for name, p in part], _wire(learner))) for part in _parts(learner, bucket_bytes))


def flat_buckets(learner: RankLearner, bucket_bytes: int) -> Iterator[tuple[BucketPlan, Tensor]]:
    """(plan, bytes UInt8 on the learner's device) of each bucket in turn. A collective at ZeRO-3: run it on all ranks."""
    for plan, part in zip(bucket_plans(learner, bucket_bytes), _parts(learner, bucket_bytes), strict=True):
        with learner.engine.full_parameters([p for _, p in part]):
            flat = fill(plan.entries, plan.size, {name: p.data for name, p in part}, learner.device)
        yield plan, flat


def _parts(learner: RankLearner, bucket_bytes: int) -> Iterator[list[tuple[str, nn.Parameter]]]:
    names, element = learner.scoring.hf_names(), _wire(learner).itemsize
    part: list[tuple[str, nn.Parameter]] = []
    held = 0
    for name, parameter in iterate_trainable(learner.engine.module):
        size = element * _numel(parameter)
        if part and held + size > bucket_bytes:
            yield part
            part, held = [], 0
        part.append((names[name], parameter))
        held += size
    if part:
        yield part


def _wire(learner: RankLearner) -> torch.dtype:
    return WIRE[learner.spec.recipe.learners.precision]


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Of the whole parameter; at ZeRO-3 a rank holds a part."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
