"""Attention over one long row of many sequences: FlexAttention, compiled once, with masks built by blocks.

    segment, branch, positions --block_masks--> BlockMask
    BlockMask --transformers' layers--> attend --torch.compile--> one fused kernel

A row's length is a multiple of BLOCK (core/batches.ROW_MULTIPLE), so Dynamo sees one shape with one dynamic
size: a graph with gradients and one without serve a whole run. Work and memory grow with the visible blocks,
not with the square of the row.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental import _config as symbolic_sizes
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from orchestrator.core.batches import ROW_MULTIPLE as BLOCK
from orchestrator.core.errors import ConfigError
from orchestrator.models import ragged_attention
from orchestrator.models.attention import Capabilities
from orchestrator.models.ragged_attention import RAGGED

BLOCKS = "one_row_blocks"
"""Name of `attend` among transformers' attention functions."""
MAX_COMPILATIONS = 4
"""Most graphs that a model needs: with and without gradients, for one or two kinds of attention layers."""

Masks = BlockMask | dict[str, BlockMask]


def set_attention(model: PreTrainedModel, name: str | None) -> None:
    """Makes all layers of `model` compute attention with `name`: BLOCKS, RAGGED, or one of transformers' own.
    None changes nothing, for models with a single implementation."""
    own = {BLOCKS: attend, RAGGED: ragged_attention.attend}.get(name or "")
    if name is not None and own is not None and name not in ALL_ATTENTION_FUNCTIONS.valid_keys():
        ALL_ATTENTION_FUNCTIONS.register(name, own)
    if name is not None and model.config._attn_implementation != name:
        model.set_attn_implementation(name)


def block_masks(segment: Tensor, branch: Tensor, positions: Tensor, can: Capabilities) -> Masks:
    """The visibility rule of attention.attention_mask for one row. One mask per kind of layer if the model
    mixes kinds.

    segment, branch, positions: Int[1, T], T a multiple of BLOCK. Sequences lie one after the other, and the
    prompt of a sequence (branch 0) comes first.
    """
    if can.window is None or not can.kinds:
        return _block_mask(segment, branch, positions, can.window)
    return {
        kind: _block_mask(segment, branch, positions, can.window if kind == "sliding_attention" else None)
        for kind in can.kinds
    }


def _block_mask(segment: Tensor, branch: Tensor, positions: Tensor, window: int | None) -> BlockMask:
    visible_in_part, visible_in_full = _visible_blocks(segment[0], branch[0], positions[0], window)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (
            (j <= i)
            & (segment[b, i] == segment[b, j])
            & ((branch[b, j] == 0) | (branch[b, j] == branch[b, i]))
        )

    def near(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        assert window is not None
        return visible(b, h, i, j) & (positions[b, i] - positions[b, j] < window)

    length, rule = segment.shape[1], visible if window is None else near
    partial_count, partial_blocks = _ordered(visible_in_part & ~visible_in_full)
    full_count, full_blocks = _ordered(visible_in_full)
    return BlockMask.from_kv_blocks(
        partial_count,
        partial_blocks,
        full_count,
        full_blocks,
        BLOCK_SIZE=BLOCK,
        mask_mod=rule,
        seq_lengths=(length, length),
    )


def _visible_blocks(
    segment: Tensor, branch: Tensor, positions: Tensor, window: int | None
) -> tuple[Tensor, Tensor]:
    """Two Bool[B, B]: whether any token of query block i sees any token of key block j, and whether every
    token of i sees all of j. Computed from T values and B * B comparisons.

    Runs of equal (segment, branch) are numbered from left to right, so a block holds an interval of runs and
    an interval of segments. A query sees a key only within a run, or across runs of a segment if the key
    belongs to the prompt. With a window the first result may be true for a block in which the mask then
    allows nothing. That costs time, not correctness.
    """
    new_segment = torch.cat([segment.new_zeros(1), (segment[1:] != segment[:-1]).to(segment.dtype)])
    new_branch = torch.cat([segment.new_zeros(1), (branch[1:] != branch[:-1]).to(segment.dtype)])
    place, run = new_segment.cumsum(0), torch.maximum(new_segment, new_branch).cumsum(0)
    prompt = torch.where(branch == 0, place, -1)

    def ends(values: Tensor) -> tuple[Tensor, Tensor]:
        blocks = values.view(-1, BLOCK)
        return blocks.amin(1), blocks.amax(1)

    (first_place, last_place), (first_run, last_run), (low, high) = ends(place), ends(run), ends(positions)
    index = torch.arange(len(first_run), device=segment.device)
    query, key, before = index[:, None], index[None, :], index[:, None] >= index[None, :]
    any_visible = before & (
        (last_run[key] >= first_run[query]) | (ends(prompt)[1][key] >= first_place[query])
    )
    one_run = first_run[key] == last_run[query]
    one_segment = first_place[key] == last_place[query]
    only_prompt = branch.view(-1, BLOCK).amax(1)[key] == 0
    all_visible = (index[:, None] > index[None, :]) & (one_run | (one_segment & only_prompt))
    if window is not None:
        any_visible &= low[query] - high[key] < window
        all_visible &= high[query] - low[key] < window
    return any_visible, all_visible


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """(Int[1, 1, B], number of key blocks that each query block visits; Int[1, 1, B, B], their indices,
    followed by those of the other blocks)."""
    dense = blocks.to(torch.int32)
    order = torch.argsort(dense, dim=1, descending=True, stable=True)
    return dense.sum(1, dtype=torch.int32)[None, None], order.to(torch.int32)[None, None]


def _attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    """The function that is compiled. If Dynamo is off or skips the call, this code runs uncompiled and raises
    ConfigError, since it would be 10 to 50 times slower."""
    if not torch.compiler.is_dynamo_compiling():
        raise ConfigError(
            "FlexAttention would run uncompiled",
            why="torch.compile is off or skipped this call; the scores of every pair of tokens would be "
            "materialised",
            fix="unset TORCHDYNAMO_DISABLE and TORCH_COMPILE_DISABLE, or set batch.layout=padded",
        )
    return flex_attention(query, key, value, **options)


class CompiledAttention:
    """FlexAttention behind torch.compile.

    On a CPU torch has no kernel with a backward, so Dynamo's graph runs uncompiled there. That serves tests
    of masks, rows and the number of graphs.
    """

    def __init__(self) -> None:
        self.compilations = 0
        """Graphs that Dynamo has compiled in this process."""
        # each model of a process (in tests, or a critic of another size) has its own graphs; Dynamo's default
        # is 8
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        # dynamic=True is for lengths; it would make a scale or cap a tensor too, which Gemma 2's score_mod
        # cannot capture
        torch._dynamo.config.specialize_float = True
        # sizes that are equal by chance at the first call, e.g. numbers of blocks and heads, stay separate
        symbolic_sizes.use_duck_shape = False
        # fullgraph: the whole call must be in the graph
        self._on_gpu = torch.compile(
            _attention, backend=self._counted(_inductor), dynamic=True, fullgraph=True
        )
        self._on_cpu = torch.compile(
            _attention, backend=self._counted(_uncompiled), dynamic=True, fullgraph=True
        )

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        run = self._on_gpu if query.device.type == "cuda" else self._on_cpu
        return run(query, key, value, **options)

    def _counted(self, backend: Callable[..., Any]) -> Callable[..., Any]:
        def compiled(graph: Any, inputs: Any) -> Any:
            self.compilations += 1
            return backend(graph, inputs)

        return compiled


def _inductor(graph: Any, inputs: Any) -> Any:
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, inputs)


def _uncompiled(graph: Any, inputs: Any) -> Any:
    return graph.forward


@cache
def compiled_attention() -> CompiledAttention:
    """The instance of this process. Policy, reference and critic share its graphs."""
    return CompiledAttention()


def attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    softcap: float | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface. query: [1, heads, T, D]; key, value: [1, kv heads, T, D]; output:
    [1, T, heads, D]."""
    if not isinstance(attention_mask, BlockMask):
        raise TypeError(f"{type(module).__name__} got no BlockMask: this architecture builds its own masks")
    if any(unused.get(name) is not None for name in ("s_aux", "position_bias")):
        raise TypeError(
            f"{type(module).__name__} adds sinks or a bias to its attention, which blocks do not support"
        )
    if torch.is_autocast_enabled(query.device.type):  # rotary embeddings give query and key in fp32 there
        query, key, value = (t.to(torch.get_autocast_dtype(query.device.type)) for t in (query, key, value))
    if isinstance(query, FakeTensor):
        output = _FlashShapes.apply(query, key, value)
    else:
        score = None if softcap is None else _capped(softcap)
        output = compiled_attention()(
            query, key, value, score_mod=score, block_mask=attention_mask, scale=scaling, enable_gqa=True
        )
    return output.transpose(1, 2).contiguous(), None


@cache
def _capped(cap: float) -> Callable[..., Tensor]:
    """Gemma 2's cap of the attention logits. Cached, as Dynamo compiles again for a new function object."""

    def score_mod(score: Tensor, b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return score_mod


class _FlashShapes(torch.autograd.Function):
    """Makes the fused kernel's allocations, for tensors without storage: the output and fp32 log-sum-exps,
    and gradients of all three inputs."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(
            query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32)
        )
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, normaliser = ctx.saved_tensors
        torch.empty_like(normaliser)  # the row sums of gradient * output
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
