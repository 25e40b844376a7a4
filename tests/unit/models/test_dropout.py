"""LoRA's dropout depends on the token and not on the rows. A model's own noise is off."""

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.core.batches import Branch, Layout, MicroBatch, SequenceGroup
from orchestrator.core.errors import ConfigError
from orchestrator.data.packing import pack
from orchestrator.models.dropout import Draws, KeyedDropout, as_used, kept
from orchestrator.models.forward import MicroBatchTensors, ScoringModel, run_forward
from orchestrator.models.load import load
from orchestrator.models.tiny import build
from orchestrator.recipe.schema import Lora, Model, TinyModel

CPU = torch.device("cpu")
LAYOUTS: tuple[Layout, ...] = ("prefix_shared", "packed", "padded")
TOKENS, FEATURES = 600, 500


def groups(count: int = 5, branches: int = 2) -> list[SequenceGroup]:
    draw = np.random.default_rng(0)

    def branch() -> Branch:
        size = int(draw.integers(1, 12))
        return Branch(draw.integers(0, 256, size), np.ones(size, np.bool_))

    return [
        SequenceGroup(
            7 * i - 3,
            draw.integers(0, 256, int(draw.integers(1, 9))),
            tuple(branch() for _ in range(branches)),
        )
        for i in range(count)
    ]


# ---- masks


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_masks_have_the_expected_density_in_every_row_and_column(p):
    identity = torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63 - 1, TOKENS))
    mask = kept(identity, 12345 << 40, FEATURES, p).double()
    error = math.sqrt(p * (1 - p))
    assert abs(float(mask.mean()) - (1 - p)) < 5 * error / math.sqrt(mask.numel())
    assert float((mask.mean(0) - (1 - p)).abs().max()) < 5 * error / math.sqrt(TOKENS)
    assert float((mask.mean(1) - (1 - p)).abs().max()) < 5 * error / math.sqrt(FEATURES)


def test_masks_of_other_tokens_layers_and_features_do_not_correlate():
    identity = torch.arange(TOKENS)  # neighbours differ in their last bits only
    mask = kept(identity, 1, FEATURES, 0.5).double().numpy()
    limit = 5 / math.sqrt(mask.size)
    others = [
        np.roll(mask, 1, 0),
        np.roll(mask, 1, 1),
        *(kept(identity, key, FEATURES, 0.5).double().numpy() for key in (2, 1 << 32, 3 << 33)),
    ]
    for other in others:
        assert abs(float(np.corrcoef(mask.ravel(), other.ravel())[0, 1])) < limit


def test_a_tokens_mask_does_not_depend_on_the_tokens_beside_it():
    identity = torch.from_numpy(np.random.default_rng(0).integers(-(2**63), 2**63 - 1, TOKENS))
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))[:100]
    assert torch.equal(kept(identity, 99, FEATURES, 0.3)[order], kept(identity[order], 99, FEATURES, 0.3))


def by_token(rows: MicroBatch) -> dict[int, int]:
    """Identity -> token id."""
    real = rows.segment >= 0
    return dict(zip(rows.identity[real].tolist(), rows.input_ids[real].tolist(), strict=True))


def test_a_token_has_one_identity_in_every_layout_order_and_cut():
    examples = groups()
    identities = by_token(pack(examples, "prefix_shared"))
    assert len(identities) == sum(g.shared_tokens for g in examples)  # no two tokens share an identity
    for layout in LAYOUTS:
        assert by_token(pack(examples[::-1], layout)) == identities
        parts = [by_token(pack([group], layout)) for group in examples]
        assert {key: value for part in parts for key, value in part.items()} == identities
    assert by_token(pack(examples, "prefix_shared", one_row=True)) == identities


# ---- the model


def adapted(dropout: float, architecture: str = "llama") -> ScoringModel:
    """A LoRA model whose adapters are not zero."""
    shape = TinyModel(architecture=architecture, layers=2, kv_heads=2 if architecture == "llama" else None)
    cfg = Model(tiny=shape, lora=Lora(rank=4, dropout=dropout))
    model: Any = load(cfg, seed=0, head="lm").model
    draw = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=draw)
    return ScoringModel(model, head="lm")


def gradients(scoring: ScoringModel, batches: list[MicroBatch], step: int = 3) -> dict[str, torch.Tensor]:
    """Gradients of a sum over all tokens with different weights."""
    as_used(scoring)
    scoring.zero_grad(set_to_none=True)
    for rows in batches:
        scoring.dropout.at(11, step)
        values = run_forward(scoring, MicroBatchTensors.of(rows, CPU)).values
        (values * torch.from_numpy(1.0 + rows.targets % 5)).sum().backward()
    scoring.dropout.off()
    return {name: p.grad.clone() for name, p in scoring.named_parameters() if p.grad is not None}


def relative_gap(expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]) -> float:
    gap = sum(float((expected[n] - actual[n]).square().sum()) for n in expected)
    return math.sqrt(gap / sum(float(v.square().sum()) for v in expected.values()))


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_no_layout_cut_order_or_recomputation_changes_the_gradient(architecture):
    examples, scoring = groups(), adapted(0.3, architecture)
    padded = [pack(examples, "padded")]
    want = gradients(scoring, padded)
    for layout in LAYOUTS:
        for cut in ([examples[::-1]], [examples[:2], examples[2:]], [[g] for g in examples]):
            scoring.checkpoint("none" if len(cut) == 2 else "full" if layout == "padded" else "selective")
            gap = relative_gap(want, gradients(scoring, [pack(part, layout) for part in cut]))
            assert gap < 1e-5, (layout, len(cut))
    scoring.checkpoint("none")
    renumbered = [pack([replace(g, id=g.id + 100) for g in examples], "padded")]
    assert relative_gap(want, gradients(scoring, padded, step=4)) > 0.1
    assert relative_gap(want, gradients(scoring, renumbered)) > 0.1
    assert relative_gap(want, gradients(adapted(0.0, architecture), padded)) > 0.1


def test_layers_have_different_masks_and_nothing_is_dropped_elsewhere():
    scoring, rows = adapted(0.3), MicroBatchTensors.of(pack(groups(), "padded"), CPU)
    layers = [module for module in scoring.modules() if isinstance(module, KeyedDropout)]
    assert len(layers) == len({layer.name for layer in layers}) == 2 * 7
    scoring.dropout.at(0, 0)
    scoring.dropout.identity = rows.identity.flatten()
    ones = torch.ones(*rows.input_ids.shape, 64)
    masks = [layer(ones) for layer in layers]
    assert masks[0].unique().tolist() == pytest.approx([0.0, 1 / 0.7])
    assert all(not torch.equal(masks[0], mask) for mask in masks[1:])
    scoring.dropout.off()
    scoring.eval()
    same = [run_forward(scoring, rows).values for _ in range(2)]
    assert torch.equal(*same)


def test_a_layer_that_receives_only_some_tokens_is_refused():
    draws = Draws((0, 0), torch.arange(10))
    with pytest.raises(ConfigError, match=r"model\.lora\.dropout: experts\.3 "):
        KeyedDropout(0.1, "experts.3", draws)(torch.ones(7, 5))


NOISY = {
    "opt": {"dropout": 0.4, "attention_dropout": 0.4},
    "gpt2": {"resid_pdrop": 0.4, "embd_pdrop": 0.4, "attn_pdrop": 0.4},
    "falcon": {
        "hidden_dropout": 0.4,
        "attention_dropout": 0.4,
        "parallel_attn": False,
        "new_decoder_architecture": False,
    },
    "gpt_neox": {"hidden_dropout": 0.4, "attention_dropout": 0.4},
    "llama": {"attention_dropout": 0.4},
    "mixtral": {"router_jitter_noise": 0.4, "num_local_experts": 4, "sliding_window": None},
    "phimoe": {"input_jitter_noise": 0.4, "num_local_experts": 4},
}
"""Noise in modules, in functions of a layer, from the configuration, in routers, and in experts that are
sampled."""


@pytest.mark.parametrize("mode", ["none", "full"])
@pytest.mark.parametrize("architecture", NOISY)
def test_a_models_own_noise_is_off_while_it_learns(architecture, mode):
    cfg = TinyModel(architecture=architecture, hidden_size=32, layers=2, heads=4, max_positions=128)
    model = build(cfg, 0, AutoModelForCausalLM, initializer_range=0.2, **NOISY[architecture])
    rows = MicroBatchTensors.of(pack(groups(), "padded"), CPU)
    model.train()
    assert not torch.equal(*(model(rows.input_ids).logits for _ in range(2)))  # plain training mode is noisy
    scoring = ScoringModel(model, head="lm")
    scoring.checkpoint(mode)
    as_used(scoring)
    learned = run_forward(scoring, rows).values
    learned.sum().backward()
    scoring.eval()
    with torch.no_grad():
        used = run_forward(scoring, rows).values
    torch.testing.assert_close(learned, used, rtol=0, atol=0)
    assert all(bool(p.grad.isfinite().all()) for p in scoring.parameters() if p.grad is not None)
