"""Predicted peak memory of a rank. A step on tensors without storage gives the activations,
plan/state_bytes.py the state of DeepSpeed.

    recipe --build_fake--> model without storage --largest micro-batch--> activations  ─┐
    parameter sizes, cut --state_bytes--> what DeepSpeed holds on the device and in RAM ─┴─> MemoryEstimate

Forward and backward of the largest micro-batch run on tensors without storage, and every new tensor is
counted. So architectures, layouts and the chunked head need no formulas. tests/invariants/test_memory.py and
benchmarks/seed_arithmetic.py compare the peak with a measured one, tests/invariants/test_state_bytes.py the
state with DeepSpeed's.
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
from orchestrator.plan.state_bytes import RankState, Sizes, element_bytes, state_bytes
from orchestrator.recipe.schema import Recipe

MALLOC_OVERHEAD = 0.4
"""Share of the tensors that glibc's malloc keeps in freed blocks between live ones: 1,533 MB were resident
for tensors of 1,103 MB. Returning each block immediately (MALLOC_MMAP_THRESHOLD_) measured 1,099 MB and took
1.4 times as long, so the overhead is accepted and counted."""
LIBRARY_BYTES = 8_000_000
"""Buffers of the maths libraries on a CPU, measured on the smallest micro-batches of
benchmarks/seed_arithmetic.py."""
CONTEXT_BYTES, NCCL_BYTES = 1_000_000_000, 1_000_000_000
"""Memory of a GPU that torch's allocator does not count: the CUDA context with its kernels (0.5 GB on H100)
and the workspaces of cuBLAS and Triton; with several ranks also the channels of NCCL (0.5 to 1.5 GB by
topology). Estimates, not measured by us."""
PROCESS_RAM = 4_000_000_000
"""RAM of a GPU process beside tensors: torch's CUDA libraries, pinned staging buffers, Python. An
estimate."""
DEPTHS = (2, 3, 4)
"""Numbers of layers from which a deeper model of equal layers is extrapolated."""


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Predicted bytes of one rank."""

    weights: int
    """Weights, without an offloaded part, as in StateBytes."""
    gradients: int
    """Gradients, as in StateBytes."""
    accumulators: int
    """fp32 sums of gradients, as in StateBytes."""
    master: int
    """fp32 master weights, as in StateBytes."""
    moments: int
    """Adam's moments, as in StateBytes."""
    activations: int
    """Activations of the largest micro-batch."""
    logits: int
    """Logits of the head's chunks."""
    gathered: int
    """Parameters that ZeRO-3 has gathered."""
    communication: int
    """Buckets and copies of reductions."""
    stepping: int
    """Memory of applying the step, beyond that of a backward."""
    reference: int
    """Live reference policy (TR-DPO)."""
    runtime: int
    """Memory of malloc, CUDA and NCCL beyond tensors."""
    offloaded: int
    """Offloaded state in RAM. Of a CPU learner it is part of the total."""
    loading: int
    """Peak of the device while the model is loaded and partitioned."""
    ram: int
    """Peak of a GPU learner in its machine's RAM; 0 for a CPU learner."""

    @property
    def parts(self) -> dict[str, int]:
        """Parts of the total by name."""
        apart = ("loading", "ram") if not self.ram else ("loading", "ram", "offloaded")
        return {name: value for name, value in asdict(self).items() if name not in apart}

    @property
    def total(self) -> int:
        """Peak of a step."""
        return sum(self.parts.values())

    @property
    def peak(self) -> int:
        """Peak at any time, which the device must have."""
        return max(self.total, self.loading)


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that a rank communicates in an optimizer step."""

    reduced: int
    """Gradient bytes in all reductions."""
    gathered: int
    """Parameter bytes gathered."""
    per_reduction: int
    """Gradient bytes in one reduction."""


def parameter_sizes(scoring: ScoringModel) -> Sizes:
    """Elements of the model's parameters."""
    parameters = list(scoring.parameters())
    return Sizes(
        tuple(p.numel() for p in parameters if not p.requires_grad),
        tuple(p.numel() for p in parameters if p.requires_grad),
    )


def fake_model(
    recipe: Recipe, algorithm: AlgorithmSpec, mode: FakeTensorMode, layers: int | None = None
) -> ScoringModel:
    """The scoring model in the training precision, without storage. layers: replaces its number of layers."""
    dtype = precision_of(recipe.learners.precision).model_dtype
    model = build_fake(
        recipe.model, algorithm.head, dtype, mode, layers=layers, longest=recipe.data.max_length
    )
    scoring = ScoringModel(model, head=algorithm.head, spec=algorithm.head_spec)
    if algorithm.head == "lm" and recipe.learners.gpus:
        scoring.head.computes_as = "cuda"
    return scoring


def model_sizes(recipe: Recipe, algorithm: AlgorithmSpec) -> Sizes:
    """Elements of the parameters of the recipe's model."""
    return parameter_sizes(fake_model(recipe, algorithm, FakeTensorMode(allow_non_fake_inputs=True)))


class MemoryModel:
    """Predictions for one recipe.

    A pass over a model without storage takes seconds, so each is made once. The result depends on the shape
    of the micro-batch and on the checkpointing, not on how state is partitioned.
    """

    def __init__(self, recipe: Recipe, algorithm: AlgorithmSpec) -> None:
        self.recipe, self.algorithm = recipe, algorithm
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.scoring = scoring = fake_model(recipe, algorithm, mode)
        """The whole model without storage."""
        self.sizes = parameter_sizes(scoring)
        self.checkpoints = bool(scoring.hugging_face.supports_gradient_checkpointing)
        """Whether the architecture can compute its layers again in the backward."""
        self.idle = unreached(scoring.model)
        """Names of the parameters that text does not use, such as those of an image tower."""
        self.pinned_rope = pinned(scoring)
        """Types of its rotary positions whose frequencies would depend on the batch, and are fixed
        instead."""
        self._vocabulary: int = scoring.head.vocabulary if algorithm.head == "lm" else 0
        self._shape = LayerShape.of(scoring)
        config = load_config(recipe.model).get_text_config()
        self.unpredicted = ""
        """Error of a step without storage, after which a formula gives the activations; "" without an
        error."""
        self._layers: int = getattr(config, "num_hidden_layers", None) or 1
        self._equal = _layers_are_equal(config)
        self._fakes: dict[int | None, tuple[ScoringModel, FakeTensorMode]] = {None: (scoring, mode)}
        """Models without storage by number of layers; None: all layers."""
        self._steps: dict[tuple[Any, ...], int] = {}

    def estimate(self, cut: Cut, micro_batch: MicroBatch, checkpointing: Checkpointing) -> MemoryEstimate:
        """The prediction for `micro_batch`, the largest that the cut makes."""
        learners = self.recipe.learners
        element = element_bytes(learners)
        state = state_bytes(self.sizes, learners, cut)
        step = self._step_bytes(micro_batch, checkpointing)
        gpu, logits = bool(learners.gpus), self._logits(micro_batch)
        runtime = (
            CONTEXT_BYTES + (NCCL_BYTES if cut.workers > 1 else 0)
            if gpu
            else int(MALLOC_OVERHEAD * max(step, logits)) + LIBRARY_BYTES
        )
        return MemoryEstimate(
            weights=state.device.weights,
            gradients=state.device.gradients,
            accumulators=state.device.accumulators,
            master=state.device.master,
            moments=state.device.moments,
            activations=max(0, step - logits),
            logits=logits,
            gathered=state.gathered,
            communication=state.device.buffers + state.reducing,
            stepping=max(0, state.stepping - max(step, logits) - state.gathered - state.reducing),
            reference=element * self.sizes.all if self.algorithm.keeps_reference(self.recipe) else 0,
            runtime=runtime,
            offloaded=state.host.total,
            loading=self._loading(cut, state, element) + (CONTEXT_BYTES if gpu else 0),
            ram=max(4 * self.sizes.all, state.host.total) + PROCESS_RAM if gpu else 0,
        )

    def _loading(self, cut: Cut, state: RankState, element: int) -> int:
        """Peak of loading. Every rank loads the whole model in fp32 at every stage. Then stages 1 and 2 copy
        the trainable weights into one flat tensor, and add the fp32 master weights and sums."""
        loaded = 4 * self.sizes.all
        if cut.zero_stage in (1, 2):
            early = state.device.accumulators if cut.zero_stage == 1 and element == 2 else 0
            return max(
                loaded,
                element * (self.sizes.all + self.sizes.learns),
                state.device.weights + state.device.master + early,
            )
        return loaded

    def _step_bytes(self, micro_batch: MicroBatch, checkpointing: Checkpointing) -> int:
        """Peak of forward and backward beyond parameters and their accumulated gradients.

        At any moment a pass holds a constant per layer whose output is still needed, plus a constant: a line
        over the number of layers. The steepest line is that of the moment when all layers are held. So if the
        peak grows by the same amount, above zero, from 2 to 3 and from 3 to 4 equal layers, it continues to
        grow by exactly that amount.
        """
        shape = (
            micro_batch.input_ids.shape,
            micro_batch.tokens,
            len(micro_batch.targets),
            len(micro_batch.last_at),
        )
        key = (checkpointing, micro_batch.layout, micro_batch.one_row, *shape)
        if key not in self._steps:
            self._steps[key] = self._predicted(micro_batch, checkpointing)
        return self._steps[key]

    def _predicted(self, micro_batch: MicroBatch, checkpointing: Checkpointing) -> int:
        """The peak by a step without storage, or by a formula if that step fails, as for loops over the
        choices of a router. The plan then reports it, and the probe step decides."""
        if not self.unpredicted:
            try:
                return self._extrapolated(micro_batch, checkpointing)
            except Exception as error:
                lines = str(error).strip().splitlines() or ["no message"]
                self.unpredicted = f"{type(error).__name__}: {lines[0][:160]}"
                self._fakes.clear()
        element = element_bytes(self.recipe.learners)
        activations = self._shape.bytes(micro_batch.input_ids.size, element, checkpointing)
        return activations + self._logits(micro_batch)

    def _logits(self, micro_batch: MicroBatch) -> int:
        """Bytes of a chunk of logits and its gradient; 0 for models with a scalar or value head."""
        chunk = chunk_logits("cuda" if self.recipe.learners.gpus else "cpu")
        return 2 * 4 * min(chunk, len(micro_batch.targets) * self._vocabulary)

    def _extrapolated(self, micro_batch: MicroBatch, checkpointing: Checkpointing) -> int:
        """The peak, extrapolated from DEPTHS if the layers are equal."""
        if self._equal and self._layers > DEPTHS[-1] + 1:
            two, three, four = (self._pass(layers, micro_batch, checkpointing) for layers in DEPTHS)
            if four - three == three - two > 0:
                return four + (self._layers - DEPTHS[-1]) * (four - three)
        return self._pass(None, micro_batch, checkpointing)

    def _pass(self, layers: int | None, micro_batch: MicroBatch, checkpointing: Checkpointing) -> int:
        """The peak of a step of the model with `layers` layers, without storage."""
        if layers not in self._fakes:
            mode = FakeTensorMode(allow_non_fake_inputs=True)
            self._fakes[layers] = fake_model(self.recipe, self.algorithm, mode, layers), mode
        scoring, mode = self._fakes[layers]
        scoring.checkpoint(checkpointing)
        return step_bytes(
            scoring, micro_batch, mode, autocast=precision_of(self.recipe.learners.precision).autocast
        )

    def traffic(self, cut: Cut, micro_batches: int) -> Traffic:
        """Traffic of a rank in one step of `micro_batches`. tests/invariants compare it with counted
        bytes."""
        return traffic(self.recipe, self.sizes, cut, micro_batches)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """Sizes of a model for the formula of activations. Example: LayerShape(layers=32, hidden=4096,
    inner=11008)."""

    layers: int
    """Number of layers."""
    hidden: int
    """Width of the residual stream."""
    inner: int
    """Width of the feed-forward layer, of all experts that a token uses."""

    @classmethod
    def of(cls, scoring: ScoringModel) -> "LayerShape":
        """The sizes in a model's configuration."""
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
        """Bytes of a step's activations, by a formula.

        none: the inputs of every product, norm and activation of a layer, about 14 times the residual stream
        and 4 times the inner width. selective: about half of them. full: the inputs of layers, and one
        layer's activations.
        """
        layer = 14 * self.hidden + 4 * self.inner
        elements = {
            "none": self.layers * layer,
            "selective": self.layers * layer // 2 + layer,
            "full": self.layers * self.hidden + layer,
        }
        return positions * element * elements[checkpointing]


def _layers_are_equal(config: Any) -> bool:
    """False if the layers differ in type, or may differ: mixtures of experts can have dense layers in
    between."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return len(kinds) <= 1 and not any(
        "expert" in name or name in ("mlp_only_layers", "sliding_window_pattern") for name in config.to_dict()
    )


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations made and that are still referenced. `peak`: the most at
    any time."""

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
        """Excludes tensors: their views and in-place results are not new memory."""
        self._live |= {t.untyped_storage()._cdata: (StorageWeakRef(t.untyped_storage()), 0) for t in tensors}

    def _add(self, storage: torch.UntypedStorage) -> None:
        entry = self._live.get(storage._cdata)
        if entry is not None and not entry[0].expired():
            return
        self._now += storage.nbytes() - (entry[1] if entry else 0)
        self._live[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        if self._now > self.peak:
            self._live = {key: entry for key, entry in self._live.items() if not entry[0].expired()}
            self._now = sum(size for _, size in self._live.values())
            self.peak = max(self.peak, self._now)


def step_bytes(
    scoring: ScoringModel, micro_batch: MicroBatch, mode: FakeTensorMode, *, autocast: bool
) -> int:
    """Peak of forward and backward beyond parameters and their accumulated gradients. scoring: a model made
    in `mode`."""
    as_used(scoring)
    scoring.dropout.at(0, 0)
    live = _LiveBytes()
    with mode:
        for parameter in scoring.parameters():  # as in a second micro-batch, whose gradients are added
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
