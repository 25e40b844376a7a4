"""Bytes that DeepSpeed 0.19.8 holds for a model in training, by class and way to partition.

    parameter sizes, (stage, sync, precision, offload), ranks -> StateBytes on the device and in RAM

Every formula was checked against the live storages of real engines (tests/invariants/test_state_bytes.py).
They differ from DeepSpeed's documents: some state is held twice, in another dtype, or whole instead of
partitioned.
"""

from dataclasses import asdict, dataclass
from itertools import accumulate

from orchestrator.core.batches import Cut
from orchestrator.core.zero import (
    ALL_REDUCE_ELEMENTS,
    PERSISTENT_ELEMENTS,
    SUB_GROUP_ELEMENTS,
    bucket_elements,
    overlaps,
)
from orchestrator.models.precision import precision_of
from orchestrator.recipe.schema import Learners


@dataclass(frozen=True, slots=True)
class Sizes:
    """Elements of the parameters of a model, tensor by tensor in their order.

    Example: a linear layer with a LoRA of rank 2: Sizes(frozen=(4096,), trainable=(128, 128)).
    """

    frozen: tuple[int, ...]
    """Elements of each tensor that does not learn."""
    trainable: tuple[int, ...]
    """Elements of each tensor that learns."""

    @property
    def all(self) -> int:
        """Elements of all tensors."""
        return sum(self.frozen) + self.learns

    @property
    def learns(self) -> int:
        """Elements of all tensors that learn."""
        return sum(self.trainable)

    @property
    def largest(self) -> int:
        """Elements of the largest tensor."""
        return max((*self.frozen, *self.trainable))

    def bucket(self, learners: Learners) -> int:
        """Elements of a bucket of a reduction (deepspeed_config in learner/engine.py)."""
        return min(bucket_elements(bool(learners.gpus)), self.learns)

    @property
    def partitioned(self) -> int:
        """Elements of all tensors that ZeRO-3 partitions."""
        return sum(n for n in (*self.frozen, *self.trainable) if n > PERSISTENT_ELEMENTS)

    def overlap(self, workers: int) -> int:
        """Elements of all trainable tensors that overlap a rank's partition, of the rank with the most.
        Gradients that are kept as views keep a tensor on the border of two partitions whole on both ranks."""
        share = -(-self.learns // workers)
        ends = list(accumulate(self.trainable))
        spans = [(end - n, end) for n, end in zip(self.trainable, ends, strict=True)]
        return max(
            sum(e - s for s, e in spans if s < (rank + 1) * share and e > rank * share)
            for rank in range(workers)
        )


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes of state in one place, by class."""

    weights: int = 0
    """Weights that the model computes with."""
    gradients: int = 0
    """Whole `.grad` tensors in the model's dtype."""
    accumulators: int = 0
    """fp32 sums of gradients, whole or partitioned."""
    master: int = 0
    """The optimizer's fp32 weights, if they are not the model's."""
    moments: int = 0
    """Adam's two moments."""
    buffers: int = 0
    """Buckets of reductions, and buffers of copies to the CPU."""

    @property
    def total(self) -> int:
        """Bytes of all classes."""
        return sum(asdict(self).values())


@dataclass(frozen=True, slots=True)
class RankState:
    """State of one rank in the last backward of a step, when all of it exists. Numbers are bytes."""

    device: StateBytes
    """State on the device."""
    host: StateBytes
    """Offloaded state in RAM."""
    reducing: int = 0
    """Copies that live while gradients are reduced in the backward."""
    stepping: int = 0
    """Memory beyond `device` while the step is applied, when no activation is alive."""
    gathered: int = 0
    """Parameters that ZeRO-3 has gathered."""


def element_bytes(learners: Learners) -> int:
    """Bytes of a parameter as the model computes with it."""
    return precision_of(learners.precision).element_bytes


def state_bytes(sizes: Sizes, learners: Learners, cut: Cut) -> RankState:
    """The state of one rank of `cut.workers` at `cut.zero_stage` with `cut.sync`."""
    element = element_bytes(learners)
    if cut.zero_stage == 0:
        state = StateBytes(weights=element * sizes.all, gradients=4 * sizes.learns, moments=8 * sizes.learns)
        return RankState(
            state, StateBytes(), stepping=4 * min(sizes.learns, ALL_REDUCE_ELEMENTS) if cut.workers > 1 else 0
        )
    if cut.zero_stage == 3:
        return _stage_3(sizes, learners, cut, element)
    if learners.precision == "bf16" and cut.zero_stage == 1 and learners.offload.optimizer == "none":
        return _bf16_optimizer(sizes, cut)
    return _stage_1_and_2(sizes, learners, cut, element)


def _bf16_optimizer(sizes: Sizes, cut: Cut) -> RankState:
    """DeepSpeed's BF16_Optimizer keeps bf16 gradients and their fp32 sums whole on every rank, unlike ZeRO-1
    in its documents."""
    share = -(-sizes.learns // cut.workers)
    state = StateBytes(2 * sizes.all, 2 * sizes.learns, 4 * sizes.learns, 4 * share, 8 * share)
    return RankState(
        state, StateBytes(), stepping=4 * min(sizes.learns, ALL_REDUCE_ELEMENTS) if cut.workers > 1 else 0
    )


def _stage_1_and_2(sizes: Sizes, learners: Learners, cut: Cut, element: int) -> RankState:
    """DeepSpeedZeroOptimizer. Stage 1 in a low precision sums whole gradients in fp32 (`grad_accum`). Stage 2
    sums the partition, in fp32 as views of whole gradients. A sync policy that holds gradients back keeps the
    whole `.grad`.
    """
    learns, share, low = sizes.learns, -(-sizes.learns // cut.workers), element == 2
    offloaded = learners.offload.optimizer != "none"
    whole = cut.zero_stage == 1 or cut.sync == "coalesced"
    partition = 4 * (share if low else sizes.overlap(cut.workers))
    count = 2 if overlaps(bool(learners.gpus), cut.zero_stage) else 1
    bucket = count * sizes.bucket(learners) * (4 if cut.zero_stage == 1 else element)
    accumulators = 4 * learns if whole and low else 0 if whole else partition
    sums_on_host = offloaded and not whole and not low
    device = StateBytes(
        weights=element * sizes.all,
        gradients=4 * learns if whole and not low else 0,
        accumulators=0 if sums_on_host else accumulators,
        master=0 if offloaded else 4 * share,
        moments=0 if offloaded else 8 * share,
        buffers=(0 if cut.sync == "coalesced" else bucket)
        + (element * max(sizes.trainable) if offloaded else 0),
    )
    host = StateBytes(
        accumulators=4 * share + (accumulators if sums_on_host else 0),
        master=4 * share,
        moments=8 * share,
        buffers=element * (share + max(sizes.trainable)),
    )
    return RankState(
        device,
        host if offloaded else StateBytes(),
        reducing=_fp32_copies(sizes, learners) if low and cut.zero_stage == 2 else 0,
        stepping=(bucket if cut.sync == "coalesced" else 0) + (0 if offloaded else 4 * share),
    )


def _stage_3(sizes: Sizes, learners: Learners, cut: Cut, element: int) -> RankState:
    """DeepSpeedZeroOptimizer_Stage3 partitions each tensor by itself. Small tensors are kept whole as well;
    with one rank they share the storage of their partition, if it is on the device."""
    workers, offload = cut.workers, learners.offload
    share = sum(-(-n // workers) for n in sizes.trainable)
    partitions = element * (share + sum(-(-n // workers) for n in sizes.frozen))
    on_host, optimizer_on_host = offload.parameters != "none", offload.optimizer != "none"
    same = workers == 1 and not (on_host and learners.gpus)
    persistent = 0 if same else element * (sizes.all - sizes.partitioned)
    device = StateBytes(
        weights=persistent + (0 if on_host else partitions),
        gradients=element * sizes.learns if cut.sync == "coalesced" else 0,
        accumulators=0 if optimizer_on_host else 4 * share,
        master=0 if optimizer_on_host else 4 * share,
        moments=0 if optimizer_on_host else 8 * share,
        buffers=4 * sizes.bucket(learners),
    )
    host = StateBytes(
        weights=partitions if on_host else 0,
        accumulators=8 * share if optimizer_on_host else 0,
        master=4 * share if optimizer_on_host else 0,
        moments=8 * share if optimizer_on_host else 0,
    )
    ahead = bucket_elements(True) + sizes.largest if learners.gpus else 0
    return RankState(
        device,
        host,
        reducing=_fp32_copies(sizes, learners),
        stepping=0 if optimizer_on_host else 4 * min(share, SUB_GROUP_ELEMENTS),
        gathered=element * (sizes.largest + ahead),
    )


def _fp32_copies(sizes: Sizes, learners: Learners) -> int:
    """Bytes of the fp32 copy of a bucket, or of a tensor that is larger than a bucket, for a reduction."""
    return 4 * max(sizes.bucket(learners), *sizes.trainable)
