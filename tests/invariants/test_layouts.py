"""For every allow-listed architecture, prefix-shared and packed rows give the log-probs and gradients of
padded rows.

Initial weights have a wide distribution, so that attention is far from uniform. A control shows that a wrong
mask would be seen.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from orchestrator.core.batches import Branch, Layout, MicroBatch, SequenceGroup
from orchestrator.data.packing import pack
from orchestrator.models.attention import capabilities
from orchestrator.models.forward import HeadOutputs, MicroBatchTensors, ScoringModel, head_gap, run_forward
from orchestrator.models.tiny import build
from orchestrator.recipe.schema import TinyModel

SHARING: tuple[Layout, ...] = ("prefix_shared", "packed")
TOLERANCE = 1e-5


@dataclass(frozen=True, slots=True)
class Case:
    """An architecture, with options under which its peculiarities matter on short rows."""

    architecture: str
    name: str = ""
    kv_heads: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name or self.architecture


MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
CASES = [
    Case("llama", kv_heads=2),
    Case("qwen2", kv_heads=2),
    Case("qwen2", "qwen2-mixed-window", options={**MIXED, "use_sliding_window": True}),
    Case("gpt2"),
    Case("gemma", kv_heads=1),
    Case("mistral", "mistral", kv_heads=2, options={"sliding_window": None}),
    Case("mistral", "mistral-window-5", options={"sliding_window": 5}),
    Case("mistral", "mistral-window-40", options={"sliding_window": 40}),
    Case("phi"),
    Case("phi3", kv_heads=2, options={"sliding_window": None}),
    Case("phi3", "phi3-window-5", options={"sliding_window": 5}),
    Case("gemma2", options={**MIXED, "final_logit_softcapping": 2.0}),
    Case("gemma3_text", options=MIXED),
    Case("qwen3", kv_heads=2),
    Case("qwen3", "qwen3-mixed-window", options={**MIXED, "use_sliding_window": True}),
    Case("gpt_neox"),
    Case("olmo2"),
    Case("granite", options={"logits_scaling": 4.0}),
    Case("cohere", options={"logit_scale": 0.25}),
    Case("falcon"),
    Case("mixtral", options={"num_local_experts": 4, "sliding_window": None}),
    Case(
        "qwen2_moe",
        options={
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
]
PADDED_ONLY = [
    Case("opt"),
    Case("bloom"),
    Case("gptj", options={"rotary_dim": 4}),
    Case("stablelm"),
    Case("mamba"),
    Case("falcon", "falcon-alibi", options={"alibi": True}),
    Case("recurrent_gemma", options={"logits_soft_cap": 2.0}),
    Case("hyperclovax", options={"logits_scaling": 0.5}),
    Case("llama4_text", options={"head_dim": 8, "num_key_value_heads": 4}),
]
"""Unusual architectures: no position ids, ALiBi, recurrent layers, another name for the backbone, unusual
logit transforms."""


def make(case: Case, auto: type = AutoModelForCausalLM, **options: Any) -> torch.nn.Module:
    cfg = TinyModel(
        architecture=case.architecture,
        hidden_size=32,
        layers=2,
        heads=4,
        kv_heads=case.kv_heads,
        max_positions=128,
    )
    return build(cfg, 0, auto, initializer_range=0.2, **{**case.options, **options}).eval()


def branch(draw: np.random.Generator, size: int, unscored: int = 0) -> Branch:
    return Branch(draw.integers(0, 256, size), np.arange(size) >= unscored)


def groups() -> list[SequenceGroup]:
    """Pairs with answers of very different lengths, prompts of one token, and an unscored start."""
    draw = np.random.default_rng(0)
    shapes = [(12, 3, 25), (1, 20, 2), (7, 1, 1), (1, 1, 6), (19, 9, 8)]
    pairs = []
    for number, (prompt, chosen, rejected) in enumerate(shapes):
        answers = (branch(draw, chosen, unscored=2 if chosen > 5 else 0), branch(draw, rejected))
        pairs.append(SequenceGroup(number, draw.integers(0, 256, prompt), answers))
    return pairs


def tensors(mb: MicroBatch) -> MicroBatchTensors:
    return MicroBatchTensors.of(mb, torch.device("cpu"))


def in_padded_order(mb: MicroBatch, values: torch.Tensor) -> torch.Tensor:
    """Scored tokens sorted by sequence. The order of sequences depends on the layout."""
    return values[torch.from_numpy(np.argsort(mb.sequence, kind="stable"))]


def run(
    model: ScoringModel, layout: Layout, row_tokens: int | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probs in sequence order, and gradients of a sum with a different weight for each token."""
    mb = pack(groups(), layout, row_tokens=row_tokens)
    result = run_forward(model, tensors(mb))
    values = in_padded_order(mb, result.values) if result.rewards is None else result.values.flatten()
    weights = torch.randn(len(values), generator=torch.Generator().manual_seed(1)) / len(values)
    model.zero_grad()
    (weights * values).sum().backward()
    return values.detach(), {
        name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_same(model: ScoringModel, layout: Layout, row_tokens: int | None) -> None:
    want, want_gradients = run(model, "padded")
    got, gradients = run(model, layout, row_tokens)
    assert float((got - want).abs().max()) <= TOLERANCE
    assert gradients.keys() == want_gradients.keys()
    assert len(gradients) > 5
    norm = torch.stack([g.norm() for g in want_gradients.values()]).norm()
    for name, gradient in gradients.items():
        assert float((gradient - want_gradients[name]).norm() / norm) <= TOLERANCE, name


@pytest.mark.parametrize("row_tokens", [None, 64, 200])
@pytest.mark.parametrize("layout", SHARING)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_layouts_give_the_log_probs_and_gradients_of_padded_rows(case, layout, row_tokens):
    """Rows as short as possible, with a few sequences each, and one row for everything."""
    model = ScoringModel(make(case), head="lm")
    assert model.capabilities.layouts == {"prefix_shared", "packed", "padded"}, model.capabilities.reason
    assert_same(model, layout, row_tokens)


@pytest.mark.parametrize("case", [*CASES, *PADDED_ONLY], ids=str)
def test_padded_rows_give_the_models_own_log_probs(case):
    model = ScoringModel(make(case), head="lm")
    assert float(head_gap(model, tensors(pack(groups(), "padded"))).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("case", [*CASES, *PADDED_ONLY], ids=str)
def test_padded_rows_give_the_log_probs_of_each_sequence_alone(case):
    """The model's own forward, one sequence at a time, without padding, positions or masks."""
    hugging_face = make(case)
    mb = pack(groups(), "padded")
    with torch.no_grad():
        got = in_padded_order(mb, run_forward(ScoringModel(hugging_face, head="lm"), tensors(mb)).values)
        want = []
        for group in groups():
            for answer in group.branches:
                ids = torch.from_numpy(np.concatenate([group.prompt, answer.ids]))
                logps = torch.log_softmax(
                    hugging_face(input_ids=ids[None], use_cache=False).logits[0, :-1], -1
                )
                counted = torch.from_numpy(
                    np.concatenate([np.zeros(len(group.prompt), np.bool_), answer.loss_mask])
                )[1:]
                want.append(logps.gather(1, ids[1:, None])[counted, 0])
    assert float((got - torch.cat(want)).abs().max()) <= TOLERANCE


@pytest.mark.parametrize("case", PADDED_ONLY, ids=str)
def test_other_architectures_are_held_to_padded_rows(case):
    can = capabilities(make(case).config)
    assert can.layouts == {"padded"} and case.architecture in can.reason


@pytest.mark.parametrize("layout", SHARING)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_wrong_mask_would_be_seen(case, layout):
    """Control: if tokens see all earlier ones of the row, log-probs change by far more than the tolerance."""
    model = ScoringModel(make(case), head="lm")
    mb = pack(groups(), layout, row_tokens=200)
    right = tensors(mb)
    wrong = replace(right, segment=torch.zeros_like(right.segment), branch=torch.zeros_like(right.branch))
    with torch.no_grad():
        gap = (run_forward(model, right).values - run_forward(model, wrong).values).abs().max()
    assert float(gap) > 100 * TOLERANCE


@pytest.mark.parametrize("case", [c for c in CASES if c.options.get("sliding_window")], ids=str)
def test_the_window_matters_on_these_rows(case):
    """Control: without its window the model gives other log-probs if the window is shorter than the rows."""
    model = ScoringModel(make(case), head="lm")
    rows = tensors(pack(groups(), "prefix_shared", row_tokens=200))
    with torch.no_grad():
        windowed = run_forward(model, rows).values
        model.capabilities = replace(model.capabilities, window=10_000)
        gap = float((windowed - run_forward(model, rows).values).abs().max())
    assert gap == 0.0 if case.options["sliding_window"] >= 40 else gap > 100 * TOLERANCE


@pytest.mark.parametrize("layout", SHARING)
@pytest.mark.parametrize("case", [CASES[0], CASES[3], Case("gemma"), Case("qwen2")], ids=str)
def test_rewards_do_not_depend_on_the_layout(case, layout):
    hugging_face = make(case, AutoModelForSequenceClassification, num_labels=1)
    assert_same(ScoringModel(hugging_face, head="scalar"), layout, 64)


def test_rewards_equal_the_models_own():
    """The classification model gets one sequence at a time, and reads its last token."""
    hugging_face = make(CASES[0], AutoModelForSequenceClassification, num_labels=1)
    mb = pack(groups(), "prefix_shared")
    rows = [[torch.from_numpy(np.concatenate([g.prompt, b.ids]))[None] for b in g.branches] for g in groups()]
    with torch.no_grad():
        own = [[float(hugging_face(input_ids=ids).logits) for ids in row] for row in rows]
        got: HeadOutputs = run_forward(ScoringModel(hugging_face, head="scalar"), tensors(mb))
    assert got.rewards.tolist() == [pytest.approx(row, abs=TOLERANCE) for row in own]


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.architecture not in ("gpt2", "falcon", "gemma2")], ids=str
)
def test_layers_see_no_padding(case):
    """Without gpt2 and falcon, which need a mask of another size, and gemma2, whose attention is eager."""
    seen = []
    model = ScoringModel(make(case), head="lm")
    model.hugging_face.get_input_embeddings().register_forward_hook(
        lambda layer, given, out: seen.append(out[..., 0].numel())
    )
    for layout in SHARING:
        mb = pack(groups(), layout)
        assert mb.tokens < mb.positions
        run_forward(model, tensors(mb))
        assert seen.pop() == mb.tokens


def test_a_mask_without_rows_is_refused():
    """Otherwise another model's rows would be computed as one sequence."""
    model = ScoringModel(make(CASES[0]), head="lm")
    run_forward(model, tensors(pack(groups(), "packed")))
    with pytest.raises(TypeError, match="mask without rows"):
        model.hugging_face(input_ids=torch.zeros(1, 4, dtype=torch.long))
