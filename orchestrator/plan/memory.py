"""Predicted peak memory of a rank: the step's tensors followed without computing them, DeepSpeed's state by
plan/state_bytes.py.

    recipe --build_fake--> model without storage --largest micro-batch--> activations  ─┐
    parameter sizes, cut --state_bytes--> what DeepSpeed holds on the device and in RAM ─┴─> MemoryEstimate

Forward and backward of the largest micro-batch run on tensors without storage while every new one is counted,
so that each architecture, layout and the chunked head are counted as they are. Checked against the measured
peak by tests/invariants/test_memory.py and benchmarks/seed_arithmetic.py, its state against DeepSpeed's by
tests/invariants/test_state_bytes.py.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from orchestrator.algorithms.table import AlgorithmSpec
from orchestrator.core.batches import Cut, MicroBatch
from orchestrator.core.zero import PERSISTENT_ELEMENTS
from orchestrator.models.dropout import as_used
from orchestrator.models.forward import (
    Checkpointing,
    MicroBatchTensors,
    ScoringModel,
    chunk_logits,
    run_forward,
)
from orchestrator.models.load import build_fake, load_config, unreached
from orchestrator.models.precision import precision_of
from orchestrator.models.rope import pinned
from orchestrator.models.unused import GroupedShapes
from orchestrator.plan.state_bytes import Held, Sizes, element_bytes, state_bytes
from orchestrator.recipe.schema import Recipe

MALLOC_OVERHEAD = 0.4
"""glibc's malloc keeps freed blocks between live ones: 1,533 MB resident where the tensors are 1,103 MB.
Giving each block back at once (MALLOC_MMAP_THRESHOLD_) measures 1,099 MB and takes 1.4 times as long, so this
is accepted and counted."""
LIBRARY_BYTES = 8_000_000
"""Buffers that the maths libraries keep on a CPU, as measured on the smallest micro-batches of the same
benchmark."""
CONTEXT_BYTES, NCCL_BYTES = 1_000_000_000, 1_000_000_000
"""Of a GPU, and counted by no allocator of torch: the CUDA context with its kernels (0.5 GB on H100) and the
workspaces of cuBLAS and Triton; and, where ranks speak, the channels of NCCL (0.5 to 1.5 GB by topology).
Estimates: not measured by us."""
PROCESS_RAM = 4_000_000_000
"""RAM of a process that drives a GPU, beside tensors: torch's CUDA libraries, pinned staging buffers, Python.
An estimate."""
DEPTHS = (2, 3, 4)
"""Layers of the models from which a deeper one of equal layers is extrapolated."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one rank. weights, gradients, accumulators, master, moments: see StateBytes, without what is
    offloaded; activations: the largest micro-batch's; logits: chunks of the head; gathered: parameters that
    ZeRO-3 has fetched; communication: buckets and the copies that reductions make; stepping: what applying
    the step takes beyond a backward; reference: a live copy (TR-DPO); runtime: what malloc, CUDA and NCCL
    hold beyond tensors.

    offloaded: state kept in RAM (of a GPU learner; a CPU learner's is memory like any other and part of the
    total); loading: the most of the device while the model is loaded and partitioned; ram: the most of the
    machine's RAM that a GPU learner takes.
    """

    weights: int
    gradients: int
    accumulators: int
    master: int
    moments: int
    activations: int
    logits: int
    gathered: int
    communication: int
    stepping: int
    reference: int
    runtime: int
    offloaded: int
    loading: int
    ram: int

    @property
    def parts(self) -> dict[str, int]:
        """What adds up to the total."""
        apart = ("loading", "ram") if not self.ram else ("loading", "ram", "offloaded")
        return {name: value for name, value in asdict(self).items() if name not in apart}

    @property
    def total(self) -> int:
        """The most in a step."""
        return sum(self.parts.values())

    @property
    def peak(self) -> int:
        """The most at any time: what the device must have."""
        return max(self.total, self.loading)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes per rank and optimizer step: gradients into reductions, parameters gathered; per_reduction: of
    one of them."""

    reduced: int
    gathered: int
    per_reduction: int


def parameter_sizes(scoring: ScoringModel) -> Sizes:
    parameters = list(scoring.parameters())
    return Sizes(
        tuple(p.numel() for p in parameters if not p.requires_grad),
        tuple(p.numel() for p in parameters if p.requires_grad),
    )


def fake_model(
    recipe: Recipe, algorithm: AlgorithmSpec, mode: FakeTensorMode, layers: int | None = None
) -> ScoringModel:
    """The scoring model in the training precision, without storage; layers: instead of its own number."""
    dtype = precision_of(recipe.learners.precision).model_dtype
    model = build_fake(
        recipe.model, algorithm.head, dtype, mode, layers=layers, longest=recipe.data.max_length
    )
    scoring = ScoringModel(model, head=algorithm.head, spec=algorithm.head_spec)
    if algorithm.head == "lm" and recipe.learners.gpus:
        scoring.head.computes_as = "cuda"
    return scoring


def model_sizes(recipe: Recipe, algorithm: AlgorithmSpec) -> Sizes:
    return parameter_sizes(fake_model(recipe, algorithm, FakeTensorMode(allow_non_fake_inputs=True)))


class MemoryModel:
    """The predictions for one recipe. Passes over models without storage take seconds, so each is made once:
    what a micro-batch keeps alive depends on its shape and on the checkpointing, not on how state is
    partitioned."""

    def __init__(self, recipe: Recipe, algorithm: AlgorithmSpec) -> None:
        self.recipe, self.algorithm = recipe, algorithm
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.scoring = scoring = fake_model(recipe, algorithm, mode)
        """The whole model without storage."""
        self.sizes = parameter_sizes(scoring)
        self.checkpoints = bool(scoring.hugging_face.supports_gradient_checkpointing)
        """Whether the architecture can compute its layers again in the backward."""
        self.idle = unreached(scoring.model)
        """Names of the parameters that text does not reach."""
        self.pinned_rope = pinned(scoring)
        """Kinds of its rotary positions whose frequencies would follow the batch, had they not been fixed."""
        self._vocabulary: int = scoring.head.vocabulary if algorithm.head == "lm" else 0
        self._shape = LayerShape.of(scoring)
        config = load_config(recipe.model).get_text_config()
        self.unpredicted = ""
        """Why activations are a formula's: what following a step without computing it raised."""
        self._layers: int = getattr(config, "num_hidden_layers", None) or 1
        self._equal = _layers_are_equal(config)
        self._fakes: dict[int | None, tuple[ScoringModel, FakeTensorMode]] = {None: (scoring, mode)}
        """By number of layers; None: all of them."""
        self._steps: dict[tuple[Any, ...], int] = {}

    def estimate(self, cut: Cut, micro_batch: MicroBatch, checkpointing: Checkpointing) -> MemoryEstimate:
        """The prediction for `micro_batch`, the largest that the cut makes."""
        learners = self.recipe.learners
        element = element_bytes(learners)
        held = state_bytes(self.sizes, learners, cut)
        step = self._step_bytes(micro_batch, checkpointing)
        gpu, logits = bool(learners.gpus), self._logits(micro_batch)
        runtime = (
            CONTEXT_BYTES + (NCCL_BYTES if cut.workers > 1 else 0)
            if gpu
            else int(MALLOC_OVERHEAD * max(step, logits)) + LIBRARY_BYTES
        )
        return MemoryEstimate(
            weights=held.device.weights,
            gradients=held.device.gradients,
            accumulators=held.device.accumulators,
            master=held.device.master,
            moments=held.device.moments,
            activations=max(0, step - logits),
            logits=logits,
            gathered=held.gathered,
            communication=held.device.buffers + held.reducing,
            stepping=max(0, held.stepping - max(step, logits) - held.gathered - held.reducing),
            reference=element * self.sizes.all if self.algorithm.keeps_reference(self.recipe) else 0,
            runtime=runtime,
            offloaded=held.host.total,
            loading=self._loading(cut, held, element) + (CONTEXT_BYTES if gpu else 0),
            ram=max(4 * self.sizes.all, held.host.total) + PROCESS_RAM if gpu else 0,
        )

    def _loading(self, cut: Cut, held: Held, element: int) -> int:
        """The model comes whole and in fp32 to every rank, whatever the stage; then stages 1 and 2 copy what
        learns into one flat tensor, and the fp32 master and sums are made beside it."""
        whole = 4 * self.sizes.all
        if cut.zero_stage in (1, 2):
            early = held.device.accumulators if cut.zero_stage == 1 and element == 2 else 0
            return max(
                whole,
                element * (self.sizes.all + self.sizes.learns),
                held.device.weights + held.device.master + early,
            )
        return whole

    def _step_bytes(self, micro_batch: MicroBatch, checkpointing: Checkpointing) -> int:
        """Peak of forward + backward beyond parameters and their accumulated gradients.

        At any moment a pass holds so much per layer whose output is still needed, and so much besides: a line
        over the number of layers. The steepest line is that of the moment when all layers are held. So where
        the peak grows by the same step, above zero, from 2 to 3 to 4 equal layers, it goes on like that
        exactly.
        """
        shape = (
            micro_batch.input_ids.shape,
            micro_batch.tokens,
            len(micro_batch.targets),
            len(micro_batch.last_at),
        )
        key = (checkpointing, micro_batch.layout, micro_batch.one_row, *shape)
        if key not in self._steps:
            self._steps[key] = self._followed(micro_batch, checkpointing)
        return self._steps[key]

    def _followed(self, micro_batch: MicroBatch, checkpointing: Checkpointing) -> int:
        """A prediction is advice: what cannot be followed without computing it (loops over what a router
        chose, say) is estimated, the plan says so, and the probe step decides."""
        if not self.unpredicted:
            try:
                return self._extrapolated(micro_batch, checkpointing)
            except Exception as error:
                self.unpredicted = (
                    f"{type(error).__name__}: "
                    f"{str(error).strip().splitlines()[0][:160] if str(error).strip() else 'no message'}"
                )
                self._fakes.clear()
        element = element_bytes(self.recipe.learners)
        return self._shape.bytes(micro_batch.input_ids.size, element, checkpointing) + self._logits(
            micro_batch
        )

    def _logits(self, micro_batch: MicroBatch) -> int:
        """Of the head; none where the model has another one."""
        chunk = chunk_logits("cuda" if self.recipe.learners.gpus else "cpu")
        return 2 * 4 * min(chunk, len(micro_batch.targets) * self._vocabulary)

    def _extrapolated(self, micro_batch: MicroBatch, checkpointing: Checkpointing) -> int:
        if self._equal and self._layers > DEPTHS[-1] + 1:
            two, three, four = (self._pass(layers, micro_batch, checkpointing) for layers in DEPTHS)
            if four - three == three - two > 0:
                return four + (self._layers - DEPTHS[-1]) * (four - three)
        return self._pass(None, micro_batch, checkpointing)

    def _pass(self, layers: int | None, micro_batch: MicroBatch, checkpointing: Checkpointing) -> int:
        if layers not in self._fakes:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            self._fakes[layers] = fake_model(self.recipe, self.algorithm, mode, layers), mode
        scoring, mode = self._fakes[layers]
        scoring.checkpoint(checkpointing)
        return step_bytes(
            scoring, micro_batch, mode, autocast=precision_of(self.recipe.learners.precision).autocast
        )

    def traffic(self, cut: Cut, micro_batches: int) -> Traffic:
        """What a rank sends in one step of `micro_batches`; compared with the counted bytes by
        tests/invariants."""
        return traffic(self.recipe, self.sizes, cut, micro_batches)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What a formula for activations needs. layers: of the model; hidden: width of the residual stream;
    inner: of what a layer computes for a token between its inputs and outputs, from the weights that it
    multiplies."""

    layers: int
    hidden: int
    inner: int

    @classmethod
    def of(cls, scoring: ScoringModel) -> "LayerShape":
        config: Any = scoring.hugging_face.config.get_text_config()
        embedding: Any = scoring.hugging_face.get_input_embeddings()
        hidden = int(embedding.weight.shape[-1])
        sizes = (
            getattr(config, name, None) for name in ("intermediate_size", "moe_intermediate_size", "ffn_dim")
        )
        inner = max((s for s in sizes if isinstance(s, int)), default=4 * hidden)
        chosen = getattr(config, "num_experts_per_tok", None)
        return cls(
            getattr(config, "num_hidden_layers", None) or 1,
            hidden,
            inner * (chosen if isinstance(chosen, int) else 1),
        )

    def bytes(self, positions: int, element: int, checkpointing: Checkpointing) -> int:
        """Of a step's activations: inputs of every product, norm and activation of a layer (about 14 times
        the residual stream and 4 times the inner width), about half of them where only products are kept, one
        layer's where only its inputs are."""
        layer = 14 * self.hidden + 4 * self.inner
        kept = {
            "none": self.layers * layer,
            "selective": self.layers * layer // 2 + layer,
            "full": self.layers * self.hidden + layer,
        }
        return positions * element * kept[checkpointing]


def _layers_are_equal(config: Any) -> bool:
    """False where layers differ in kind, or may (mixtures of experts have dense layers in between)."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return len(kinds) <= 1 and not any(
        "expert" in name or name in ("mlp_only_layers", "sliding_window_pattern") for name in config.to_dict()
    )


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


def step_bytes(
    scoring: ScoringModel, micro_batch: MicroBatch, mode: FakeTensorMode, *, autocast: bool
) -> int:
    """Peak of forward + backward beyond parameters and their accumulated gradients. scoring: tensors of
    `mode`."""
    as_used(scoring)
    scoring.dropout.at(0, 0)
    live = _LiveBytes()
    with mode:
        for parameter in scoring.parameters():  # a second micro-batch: gradients exist and are added to
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        live.ignore(p for owner in scoring.parameters() for p in (owner, owner.grad) if p is not None)
        with live, GroupedShapes(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            run_forward(
                scoring, MicroBatchTensors.of(micro_batch, torch.device("cpu"))
            ).values.sum().backward()
    return live.peak


def traffic(recipe: Recipe, sizes: Sizes, cut: Cut, micro_batches: int) -> Traffic:
    """See MemoryModel.traffic."""
    if cut.workers == 1:
        return Traffic(0, 0, 0)
    element = element_bytes(recipe.learners)
    reductions = micro_batches if cut.sync == "per_micro_batch" else 1
    persistent = sum(n for n in sizes.trainable if n <= PERSISTENT_ELEMENTS)
    gathered = {0: 0, 1: sizes.learns, 2: sizes.learns, 3: persistent + 2 * micro_batches * sizes.partitioned}
    return Traffic(4 * sizes.learns * reductions, element * gathered[cut.zero_stage], 4 * sizes.learns)
