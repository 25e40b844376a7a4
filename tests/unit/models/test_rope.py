"""Rotary frequencies that transformers derives from the longest position of a batch are fixed for all
batches."""

import copy
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from orchestrator.models.rope import pin, pinned

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 64,
    "vocab_size": 100,
}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": (
        "phi3",
        {
            "max_position_embeddings": 64,
            "original_max_position_embeddings": 16,
            "pad_token_id": 0,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 4,
                "long_factor": [1.0, 2.0, 4.0, 8.0],
                "original_max_position_embeddings": 16,
            },
        },
    ),
    "dynamic": (
        "llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0},
        },
    ),
}


def model(kind: str) -> Any:
    name, options = KINDS[kind]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(name, **SIZES, **options, initializer_range=0.2)
    ).eval()


@torch.no_grad()
def logits(decoder: Any, length: int) -> torch.Tensor:
    """Logits of the first 12 tokens in a row of `length`."""
    ids = torch.arange(length)[None] % 90 + 5
    return decoder(input_ids=ids, use_cache=False).logits[0, :12]


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_row_in_the_batch_changes_nothing(kind):
    free, fixed = model(kind), model(kind)
    pin(fixed, 40)
    assert pinned(fixed) == (kind,)
    assert (logits(free, 40) - logits(free, 12)).abs().max() > 1e-3, "unpinned, the batch matters"
    torch.testing.assert_close(logits(fixed, 40), logits(fixed, 12), rtol=0.0, atol=1e-5)
    torch.testing.assert_close(logits(fixed, 40), logits(model(kind), 40), rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_pinning_within_the_models_own_length_changes_nothing(kind):
    fixed = model(kind)
    before = logits(copy.deepcopy(fixed), 12)
    pin(fixed, 16)
    torch.testing.assert_close(logits(fixed, 12), before, rtol=0.0, atol=0.0)


def test_a_model_without_such_frequencies_is_not_changed():
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    pin(plain, 4096)
    assert pinned(plain) == ()
