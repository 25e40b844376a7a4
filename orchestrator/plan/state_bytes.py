"""Bytes that DeepSpeed 0.19.8 holds for a model in training, by class, for every way to partition it: pure
arithmetic.

    parameter sizes, (stage, sync, precision, offload), ranks  ->  StateBytes on the device, StateBytes in the host's RAM

Every line was counted from the live storages of real engines (tests/invariants/test_state_bytes.py): two
ranks that hold the same state by the documents hold it twice, in another dtype, or whole where it is said to
be partitioned.
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
    """Elements of a model's parameters, each tensor once, in order. frozen, trainable: of each tensor that
    does not learn, or does."""

    frozen: tuple[int, ...]
    trainable: tuple[int, ...]

    @property
    def all(self) -> int:
        return sum(self.frozen) + self.learns

    @property
    def learns(self) -> int:
        return sum(self.trainable)

    @property
    def largest(self) -> int:
        return max((*self.frozen, *self.trainable))

    def bucket(self, learners: Learners) -> int:
        """Elements of a reduction's bucket (deepspeed_config in learner/engine.py)."""
        return min(bucket_elements(bool(learners.gpus)), self.learns)

    @property
    def partitioned(self) -> int:
        """Elements in tensors that ZeRO-3 partitions instead of keeping them whole."""
        return sum(n for n in (*self.frozen, *self.trainable) if n > PERSISTENT_ELEMENTS)

    def overlap(self, workers: int) -> int:
        """Elements of all trainable tensors that reach into one rank's partition, of the rank that has most:
        where gradients are kept as views, a tensor on the border of two partitions stays whole on both."""
        share = -(-self.learns // workers)
        ends = list(accumulate(self.trainable))
        spans = [(end - n, end) for n, end in zip(self.trainable, ends, strict=True)]
        return max(
            sum(e - s for s, e in spans if s < (rank + 1) * share and e > rank * share)
            for rank in range(workers)
        )


@dataclass(frozen=True, slots=True)
class StateBytes:
    """weights: what the model computes with; gradients: whole `.grad` tensors in the model's dtype;
    accumulators: fp32 sums of gradients, whole or partitioned; master: the optimizer's fp32 weights where
    they are not the model's; moments: Adam's two; buffers: buckets of reductions, and what is copied through
    on the way to the CPU."""

    weights: int = 0
    gradients: int = 0
    accumulators: int = 0
    master: int = 0
    moments: int = 0
    buffers: int = 0

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True, slots=True)
class Held:
    """What a rank holds in the last backward of a step, when everything exists: on its device, and in RAM for
    an offloaded part. reducing: copies that live while gradients are reduced in the backward; stepping: while
    the step is applied, beyond `device` and with no activation alive; gathered: parameters that ZeRO-3 has
    fetched."""

    device: StateBytes
    host: StateBytes
    reducing: int = 0
    stepping: int = 0
    gathered: int = 0


def element_bytes(learners: Learners) -> int:
    """Bytes of a parameter as the model computes with it."""
    return precision_of(learners.precision).element_bytes


def state_bytes(sizes: Sizes, learners: Learners, cut: Cut) -> Held:
    """The state of one rank of `cut.workers` at `cut.zero_stage` with `cut.sync`."""
    element = element_bytes(learners)
    if cut.zero_stage == 0:
        state = StateBytes(weights=element * sizes.all, gradients=4 * sizes.learns, moments=8 * sizes.learns)
        return Held(
            state, StateBytes(), stepping=4 * min(sizes.learns, ALL_REDUCE_ELEMENTS) if cut.workers > 1 else 0
        )
    if cut.zero_stage == 3:
        return _stage_3(sizes, learners, cut, element)
    if learners.precision == "bf16" and cut.zero_stage == 1 and learners.offload.optimizer == "none":
        return _bf16_optimizer(sizes, cut)
    return _stage_1_and_2(sizes, learners, cut, element)


def _bf16_optimizer(sizes: Sizes, cut: Cut) -> Held:
    """DeepSpeed's BF16_Optimizer: bf16 gradients and their fp32 sums stay whole on every rank, whatever its
    documents say of ZeRO-1."""
    share = -(-sizes.learns // cut.workers)
    state = StateBytes(2 * sizes.all, 2 * sizes.learns, 4 * sizes.learns, 4 * share, 8 * share)
    return Held(
        state, StateBytes(), stepping=4 * min(sizes.learns, ALL_REDUCE_ELEMENTS) if cut.workers > 1 else 0
    )


def _stage_1_and_2(sizes: Sizes, learners: Learners, cut: Cut, element: int) -> Held:
    """DeepSpeedZeroOptimizer. Stage 1 in a low precision sums whole gradients in fp32 (`grad_accum`); stage 2
    sums the partition, in fp32 as views of whole gradients; a policy that holds back keeps the whole `.grad`.
    """
    learns, share, low = sizes.learns, -(-sizes.learns // cut.workers), element == 2
    offloaded = learners.offload.optimizer != "none"
    whole = cut.zero_stage == 1 or cut.sync == "coalesced"
    kept = 4 * (share if low else sizes.overlap(cut.workers))  # of the partition
    count = 2 if overlaps(bool(learners.gpus), cut.zero_stage) else 1
    bucket = count * sizes.bucket(learners) * (4 if cut.zero_stage == 1 else element)
    accumulators = 4 * learns if whole and low else 0 if whole else kept
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
    return Held(
        device,
        host if offloaded else StateBytes(),
        reducing=_fp32_copies(sizes, learners) if low and cut.zero_stage == 2 else 0,
        stepping=(bucket if cut.sync == "coalesced" else 0) + (0 if offloaded else 4 * share),
    )


def _stage_3(sizes: Sizes, learners: Learners, cut: Cut, element: int) -> Held:
    """DeepSpeedZeroOptimizer_Stage3: all of it partitioned, each tensor by itself; small ones are whole as
    well, in the same storage where the one rank's partition is the whole and lies where it is needed."""
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
    return Held(
        device,
        host,
        reducing=_fp32_copies(sizes, learners),
        stepping=0 if optimizer_on_host else 4 * min(share, SUB_GROUP_ELEMENTS),
        gathered=element * (sizes.largest + ahead),
    )


def _fp32_copies(sizes: Sizes, learners: Learners) -> int:
    """A bucket, or a tensor that is larger than one, is copied to fp32 for the wire."""
    return 4 * max(sizes.bucket(learners), *sizes.trainable)
