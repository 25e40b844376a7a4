"""One long row under masks of blocks gives the same log-probs and gradients as padded rows, with few
compilations.

torch has no FlexAttention kernel with a backward for CPUs and refuses to run one. That check is patched away
here, so that Dynamo's graph runs uncompiled. This proves masks, padding, rows and the number of graphs.
benchmarks/gpu.py proves the kernel, on a GPU.
"""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.attention.flex_attention as flex
from transformers import AutoModelForCausalLM

from orchestrator.core.batches import ROW_MULTIPLE, SHORTEST_ROW, MicroBatch, SequenceGroup
from orchestrator.core.errors import ConfigError
from orchestrator.data.packing import pack
from orchestrator.models.attention import attention_mask, capabilities
from orchestrator.models.block_attention import _visible_blocks, block_masks, compiled_attention
from orchestrator.models.forward import MicroBatchTensors, ScoringModel, head_gap, run_forward
from orchestrator.models.tiny import build
from orchestrator.recipe.schema import TinyModel
from tests.invariants.test_layouts import CASES, SHARING, TOLERANCE, Case, branch, in_padded_order, tensors

BLOCKS = [case for case in CASES if case.architecture not in ("gpt2", "falcon")]
DEFAULT = [case for case in BLOCKS if str(case) in ("llama", "gemma2", "qwen3-mixed-window")]
WINDOWS = [case for case in BLOCKS if case.options.get("sliding_window")]


@pytest.fixture(autouse=True)
def backward_on_a_cpu(monkeypatch):
    monkeypatch.setattr(flex, "_validate_device", lambda *tensors: None)


def model(case: Case) -> ScoringModel:
    cfg = TinyModel(
        architecture=case.architecture,
        hidden_size=64,
        layers=2,
        heads=4,
        kv_heads=case.kv_heads,
        max_positions=1024,
    )
    return ScoringModel(
        build(cfg, 0, AutoModelForCausalLM, initializer_range=0.1, **case.options).eval(), head="lm"
    )


def groups(seed: int, longest: int) -> list[SequenceGroup]:
    """Pairs of very different lengths: prompts longer than a block, answers across blocks, some of one
    token."""
    draw = np.random.default_rng(seed)
    shapes = [
        (longest, longest // 2, 7),
        (1, 20, longest),
        (3, 1, 1),
        *(tuple(draw.integers(1, longest, 3)) for _ in range(3)),
    ]
    return [
        SequenceGroup(n, draw.integers(0, 256, p), (branch(draw, c), branch(draw, r)))
        for n, (p, c, r) in enumerate(shapes)
    ]


def learned(model: ScoringModel, mb: MicroBatch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    values = in_padded_order(mb, run_forward(model, tensors(mb)).values)
    weights = torch.randn(len(values), generator=torch.Generator().manual_seed(1)) / len(values)
    model.zero_grad()
    (weights * values).sum().backward()
    return values.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


@pytest.mark.parametrize("layout", SHARING)
@pytest.mark.parametrize(
    "case", [c if c in DEFAULT else pytest.param(c, marks=pytest.mark.slow) for c in BLOCKS], ids=str
)
def test_one_row_gives_the_log_probs_and_gradients_of_padded_rows(case, layout):
    policy, examples = model(case), groups(0, 150)
    want, want_gradients = learned(policy, pack(examples, "padded"))
    row = pack(examples, layout, one_row=True)
    got, gradients = learned(policy, row)
    assert row.input_ids.shape[0] == 1 and row.input_ids.shape[1] % ROW_MULTIPLE == 0
    assert float((got - want).abs().max()) <= TOLERANCE
    norm = torch.stack([g.norm() for g in want_gradients.values()]).norm()
    assert gradients.keys() == want_gradients.keys()
    assert max(float((gradients[name] - g).norm() / norm) for name, g in want_gradients.items()) <= TOLERANCE


def test_a_row_that_sees_its_neighbours_would_be_noticed():
    """Control: with one segment instead of six, log-probs change by far more than the tolerance."""
    policy = model(DEFAULT[0])
    right = tensors(pack(groups(0, 150), "prefix_shared", one_row=True))
    wrong = replace(right, segment=torch.zeros_like(right.segment), branch=torch.zeros_like(right.branch))
    with torch.no_grad():
        assert (
            float((run_forward(policy, right).values - run_forward(policy, wrong).values).abs().max())
            > 100 * TOLERANCE
        )


@pytest.mark.parametrize("case", [c for c in DEFAULT if c.architecture != "gemma2"], ids=str)
def test_all_phases_of_a_run_need_few_compilations(case):
    """A reference pass, checks, training, evaluation and generation need a graph with gradients and one
    without, per kind of layer.

    A call that Dynamo ran uncompiled would have raised an error: the attention is one complete graph.
    """
    policy = model(case)
    torch._dynamo.reset()
    compiled_attention.cache_clear()

    def rows(seed: int, longest: int, one_row: bool = True) -> MicroBatchTensors:
        return tensors(pack(groups(seed, longest), "prefix_shared" if one_row else "padded", one_row=one_row))

    with torch.no_grad():
        for seed, longest in enumerate((20, 90, 160)):
            run_forward(policy, rows(seed, longest))
        run_forward(policy, rows(3, 40, one_row=False))
        head_gap(policy, rows(3, 40, one_row=False))
    for seed, longest in enumerate((50, 30, 200, 9, 140)):
        run_forward(policy, rows(seed, longest)).values.sum().backward()
    with torch.no_grad():
        run_forward(policy, rows(7, 60))
        policy.generate([[1, 2, 3], [4, 5, 6, 7, 8]], 12, eos=0, synced=False)
    run_forward(policy, rows(8, 70)).values.sum().backward()
    assert (
        2
        <= compiled_attention().compilations
        <= (4 if policy.capabilities.kinds == ("full_attention", "sliding_attention") else 2)
    )


def test_an_uncompiled_call_is_an_error():
    policy = model(DEFAULT[0])
    row = tensors(pack(groups(0, 4), "packed", one_row=True))
    with torch.compiler.set_stance("force_eager"), pytest.raises(ConfigError, match="uncompiled"):
        run_forward(policy, row)


@pytest.mark.parametrize("mode", ["selective", "full"])
def test_checkpointed_layers_run_again_under_the_same_mask(mode):
    policy, examples = model(DEFAULT[0]), groups(0, 150)
    row = pack(examples, "prefix_shared", one_row=True)
    want, want_gradients = learned(policy, row)
    policy.checkpoint(mode)
    policy.train()
    got, gradients = learned(policy, row)
    assert torch.equal(got, want)
    assert all(torch.allclose(gradients[name], g, atol=1e-7) for name, g in want_gradients.items())


@pytest.mark.parametrize("layout", SHARING)
@pytest.mark.parametrize("window", [None, 5, 100, 300])
@pytest.mark.parametrize("longest", [8, 60, 200])
def test_blocks_are_skipped_only_where_nothing_is_visible(longest, window, layout):
    """Compared with the dense rule at every pair of tokens, no visible pair lies in a skipped block, and no
    invisible pair in a block without a mask. Without a window no block is visited in vain either."""
    rows = tensors(pack(groups(longest, longest), layout, one_row=True))
    can = replace(capabilities(model(CASES[0]).hugging_face.config), window=window)
    dense = attention_mask(rows.segment, rows.branch, rows.position_ids, layout, can, torch.float32)
    assert isinstance(dense, torch.Tensor)
    size = rows.segment.shape[1] // ROW_MULTIPLE
    pairs = (dense[0, 0] == 0).view(size, ROW_MULTIPLE, size, ROW_MULTIPLE).transpose(1, 2).flatten(2)
    in_part, in_full = _visible_blocks(rows.segment[0], rows.branch[0], rows.position_ids[0], window)
    assert not (pairs.any(2) & ~in_part).any()
    assert not (in_full & ~pairs.all(2)).any()
    if window is None:
        assert torch.equal(in_part, pairs.any(2))
        below = torch.ones(size, size).tril(-1).bool()
        assert torch.equal(in_full & below, pairs.all(2) & below)


@pytest.mark.parametrize("case", [BLOCKS[0], *WINDOWS], ids=str)
def test_the_rule_within_a_block_is_that_of_dense_masks(case):
    can = capabilities(model(case).hugging_face.config.get_text_config())
    rows = tensors(pack(groups(0, 60), "prefix_shared", one_row=True))
    dense = attention_mask(rows.segment, rows.branch, rows.position_ids, "prefix_shared", can, torch.float32)
    blocks = block_masks(rows.segment, rows.branch, rows.position_ids, can)
    pairs = [(blocks[kind], dense[kind]) for kind in dense] if isinstance(dense, dict) else [(blocks, dense)]
    assert len(pairs) == (2 if can.kinds == ("full_attention", "sliding_attention") else 1)
    b, i, j = torch.meshgrid(
        *(torch.arange(n) for n in (*rows.segment.shape, rows.segment.shape[1])), indexing="ij"
    )
    for block, mask in pairs:
        assert torch.equal(block.mask_mod(b, torch.zeros_like(b), i, j), mask[:, 0] == 0)


def test_work_grows_with_the_visible_blocks_and_not_with_the_square_of_the_row():
    """64 pairs in one row visit few of its blocks."""
    draw = np.random.default_rng(0)
    pairs = [
        SequenceGroup(n, draw.integers(0, 256, 100), (branch(draw, 100), branch(draw, 100)))
        for n in range(64)
    ]
    rows = tensors(pack(pairs, "prefix_shared", one_row=True))
    visible, _ = _visible_blocks(rows.segment[0], rows.branch[0], rows.position_ids[0], None)
    assert rows.segment.shape[1] == 64 * 300
    assert int(visible.sum()) <= 4 * len(visible)


def test_the_shortest_row_and_architectures_without_blocks():
    assert pack(groups(0, 4), "packed", one_row=True).positions == SHORTEST_ROW
    assert not capabilities(model(Case("gpt2")).hugging_face.config).blocks


def test_a_layer_without_our_mask_is_an_error():
    policy = model(DEFAULT[0])
    run_forward(policy, tensors(pack(groups(0, 4), "packed", one_row=True)))
    with pytest.raises(TypeError, match="no BlockMask"):
        policy.hugging_face(input_ids=torch.ones(1, 8, dtype=torch.long), use_cache=False)
