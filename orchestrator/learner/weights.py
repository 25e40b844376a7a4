"""The policy's weights in buckets for the generators, gathered from ZeRO-3 shards one bucket at a time.

With LoRA only the adapter is sent: the generators hold the base weights already.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from orchestrator.learner.rank_learner import RankLearner, iterate_trainable
from orchestrator.models.precision import precision_of
from orchestrator.models.weight_buckets import BucketPlan, Channel, ChannelBroken, fill, plan_bucket


def bucket_plans(learner: RankLearner, bucket_bytes: int) -> tuple[BucketPlan, ...]:
    """The buckets of the trainable parameters, of at most `bucket_bytes` each. A larger parameter has a
    bucket to itself."""
    return tuple(
        BucketPlan(*plan_bucket([(name, _shape(p)) for name, p in part], _wire(learner)))
        for part in _parts(learner, bucket_bytes)
    )


def flat_buckets(
    learner: RankLearner, bucket_bytes: int, *, keep: bool = True
) -> Iterator[tuple[BucketPlan, Tensor]]:
    """(plan, bytes UInt8 on the learner's device) of each bucket in turn. A collective at ZeRO-3: run it on
    all ranks, to its end.

    keep: False on a rank that only takes part in ZeRO-3's gathers. Nothing is yielded there.
    """
    for plan, part in zip(bucket_plans(learner, bucket_bytes), _parts(learner, bucket_bytes), strict=True):
        flat = None
        with learner.engine.full_parameters([p for _, p in part]):
            if keep:
                flat = fill(plan.entries, plan.size, {name: p.data for name, p in part}, learner.device)
        if flat is not None:
            yield plan, flat


def broadcast(learner: RankLearner, channel: Channel | None, bucket_bytes: int) -> str | None:
    """Sends the weights through the channel, which only rank 0 has. Returns the error of a broken channel."""
    if channel is None:
        return send_each(learner, bucket_bytes, None)
    try:
        broken = send_each(learner, bucket_bytes, lambda index, plan, flat: channel.send(flat))
    except BaseException:
        channel.close()  # a rank failed: the receivers stop waiting immediately
        raise
    if broken is not None:
        channel.close()
    return broken


def send_each(
    learner: RankLearner, bucket_bytes: int, send: Callable[[int, BucketPlan, Tensor], None] | None
) -> str | None:
    """Calls send(index, plan, bytes) for each bucket until one raises ChannelBroken, and returns that error's
    text. The gathers run to the end even then: at ZeRO-3 the other ranks wait in a collective."""
    broken = None
    for index, (plan, flat) in enumerate(flat_buckets(learner, bucket_bytes, keep=send is not None)):
        if send is not None and broken is None:
            try:
                send(index, plan, flat)
            except ChannelBroken as error:
                broken = str(error)
    return broken


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
    return precision_of(learner.spec.recipe.learners.precision).wire_dtype


def _shape(parameter: nn.Parameter) -> tuple[int, ...]:
    """Shape of the whole parameter, of which a rank holds a part at ZeRO-3."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _numel(parameter: nn.Parameter) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
