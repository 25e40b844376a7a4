"""Predicted peak memory of a rank: the step's tensors followed without computing them, DeepSpeed's buffers by formula.

Forward and backward of the largest micro-batch run on tensors without storage while every new one is counted, so that
each architecture, layout and the chunked head are counted as they are. Checked against the measured peak by
tests/invariants/test_memory.py and benchmarks/seed_arithmetic.py.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from orchestrator.algorithms import Algorithm
from orchestrator.config import Recipe
from orchestrator.models.load import build_fake
from orchestrator.models.scoring import MicroBatchTensors, ScoringModel, chunk_logits, scored
from orchestrator.records import Cut, MicroBatch

PERSISTENT_ELEMENTS = 100_000
"""ZeRO-3 keeps tensors up to this size whole on every rank (stage3_param_persistence_threshold in learner/engine.py)."""
MALLOC_OVERHEAD = 0.4
"""glibc's malloc keeps freed blocks between live ones: 1,533 MB resident where the tensors are 1,103 MB. Giving each
block back at once (MALLOC_MMAP_THRESHOLD_) measures 1,099 MB and takes 1.4 times as long, so this is accepted and counted."""
LIBRARY_BYTES = 8_000_000
"""Buffers that the maths libraries keep on a CPU, as measured on the smallest micro-batches of the same benchmark."""
BUCKET_BYTES = 100_000_000
"""Communication buffers are bounded by the reduce bucket of learner/engine.py (25 M fp32 elements)."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one rank. weights: what the model computes with; master: the optimizer's fp32 copy where that is not
    the weights themselves; optimizer: Adam's moments; gradients: the fp32 accumulation buffer and what is reduced from;
    activations: the largest micro-batch; logits: chunks of the head; reference: a live copy (TR-DPO); allocator: what
    malloc holds beyond that on a CPU."""

    weights: int
    master: int
    optimizer: int
    gradients: int
    activations: int
    logits: int
    communication: int
    reference: int
    allocator: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes per rank and optimizer step: gradients into reductions, parameters gathered; per_reduction: of one of them."""

    reduced: int
    gathered: int
    per_reduction: int


@dataclass(frozen=True, slots=True)
class Sizes:
    """Parameter counts: all, those that learn, and those in tensors that ZeRO-3 partitions instead of keeping whole."""

    parameters: int
    trainable: int
    partitioned: int


def parameter_counts(scoring: ScoringModel) -> Sizes:
    sizes = [(p.numel(), p.requires_grad) for p in scoring.parameters()]
    return Sizes(
        sum(n for n, _ in sizes), sum(n for n, learns in sizes if learns), sum(n for n, _ in sizes if n > PERSISTENT_ELEMENTS)
    )


def estimate(recipe: Recipe, algorithm: Algorithm, cut: Cut, micro_batch: MicroBatch) -> MemoryEstimate:
    """The prediction for `micro_batch`, the largest that the cut makes."""
    low = recipe.learners.precision in ("bf16", "fp16")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    scoring = fake_model(recipe, algorithm, mode)
    sizes = parameter_counts(scoring)
    step = _step_bytes(scoring, micro_batch, mode, autocast=recipe.learners.precision == "bf16_autocast")
    vocabulary = scoring.hugging_face.config.get_text_config().vocab_size
    element = 2 if low else 4
    on_gpu, logits = bool(recipe.learners.gpus_per_worker), 0
    if algorithm.head == "lm":
        logits = 2 * 4 * min(chunk_logits("cuda" if on_gpu else "cpu"), len(micro_batch.targets) * vocabulary)
    return MemoryEstimate(
        weights=element * (sizes.parameters // (cut.workers if cut.zero_stage == 3 else 1)),
        activations=max(0, step - logits),
        logits=logits,
        reference=element * sizes.parameters if algorithm.keeps_reference(recipe) else 0,
        allocator=0 if on_gpu else int(MALLOC_OVERHEAD * max(step, logits)) + LIBRARY_BYTES,
        **_optimizer_bytes(recipe, cut, sizes.trainable, element),
    )


def fake_model(recipe: Recipe, algorithm: Algorithm, mode: FakeTensorMode) -> ScoringModel:
    """The scoring model in the training precision, without storage."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(recipe.learners.precision, torch.float32)
    scoring = ScoringModel(build_fake(recipe.model, algorithm.head, dtype, mode), head=algorithm.head, spec=algorithm.scores)
    if algorithm.head == "lm" and recipe.learners.gpus_per_worker:
        scoring.head.computes_as = "cuda"
    if recipe.learners.activation_checkpointing:
        scoring.enable_activation_checkpointing()
    return scoring


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages made by operations and still referenced; `peak` is the most at any time."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._now = 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leaves these out: views and in-place results of them are no new memory."""
        self._live |= {t.untyped_storage()._cdata: (StorageWeakRef(t.untyped_storage()), 0) for t in tensors}

    def _add(self, storage: torch.UntypedStorage) -> None:
        known = self._live.get(storage._cdata)
        if known is not None and not known[0].expired():
            return
        self._now += storage.nbytes() - (known[1] if known else 0)
        self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if self._now > self.peak:
            self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
            self._now = sum(size for _, size in self._live.values())
            self.peak = max(self.peak, self._now)


def _step_bytes(scoring: ScoringModel, micro_batch: MicroBatch, mode: FakeTensorMode, *, autocast: bool) -> int:
    """Peak of forward + backward beyond parameters and their accumulated gradients."""
    scoring.train()
    live = _LiveBytes()
    with mode:
        for parameter in scoring.parameters():  # a second micro-batch: gradients exist and are added to
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        live.ignore(p for owner in scoring.parameters() for p in (owner, owner.grad) if p is not None)
        with live, torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            scored(scoring, MicroBatchTensors.of(micro_batch, torch.device("cpu"))).values.sum().backward()
    return live.peak


def _optimizer_bytes(recipe: Recipe, cut: Cut, trainable: int, element: int) -> dict[str, int]:
    """DeepSpeed's state per rank. Stage 0 keeps everything whole; stages 1-3 partition master, moments and, from 2 on,
    the accumulated gradient; a coalesced policy holds whole gradients until its one reduction."""
    stage, workers = cut.zero_stage, cut.workers
    share = trainable // workers if stage else trainable
    offloaded = recipe.learners.offload.optimizer != "none"
    whole_gradients = stage < 2 or cut.sync == "coalesced"
    gradients = element * trainable if whole_gradients else 0
    if stage:
        gradients += 4 * share
    bucket = min(BUCKET_BYTES, 4 * trainable)
    return {
        "master": 0 if stage == 0 or offloaded else 4 * share,
        "optimizer": 0 if offloaded else 8 * share,
        "gradients": gradients,
        "communication": bucket if workers > 1 or stage else 0,
    }


def traffic(recipe: Recipe, algorithm: Algorithm, cut: Cut, micro_batches: int) -> Traffic:
    """What a rank sends in one step of `micro_batches`; compared with the counted bytes by tests/invariants."""
    if cut.workers == 1:
        return Traffic(0, 0, 0)
    sizes = parameter_counts(fake_model(recipe, algorithm, FakeTensorMode(allow_non_fake_inputs=True)))
    element = 2 if recipe.learners.precision in ("bf16", "fp16") else 4
    reductions = micro_batches if cut.sync == "per_micro_batch" else 1
    gathered = {0: 0, 1: sizes.trainable, 2: sizes.trainable, 3: sizes.trainable - sizes.partitioned + 2 * micro_batches * sizes.partitioned}
    return Traffic(4 * sizes.trainable * reductions, element * gathered[cut.zero_stage], 4 * sizes.trainable)
