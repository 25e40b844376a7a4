"""A bf16 model equals the one that transformers loads. Its rotary frequencies stay in fp32; in bf16 they
would be off by a radian at position 1,000."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from orchestrator.core.batches import Branch, SequenceGroup
from orchestrator.data.packing import pack
from orchestrator.learner.reference import RankReference
from orchestrator.models.load import placed
from orchestrator.models.tiny import build, byte_tokenizer
from orchestrator.recipe.schema import Recipe, TinyModel
from orchestrator.rollout.engines.transformers_engine import TransformersEngine

CPU, LENGTH = torch.device("cpu"), 1200


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A small model with weights so large that attention concentrates on single tokens."""
    folder = str(tmp_path_factory.mktemp("model"))
    cfg = TinyModel(hidden_size=256, layers=4, heads=4, max_positions=2048)
    model = build(cfg, 0, AutoModelForCausalLM)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(4.0)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return Recipe.model_validate(
        {
            "model": {"path": folder},
            "data": {"train": "none"},
            "algorithm": {"name": "dpo"},
            "optimizer": {"learning_rate": 1e-3},
            "learners": {"precision": "bf16"},
        }
    )


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(0).integers(8, 200, LENGTH)


@torch.no_grad()
def logps_of(model: torch.nn.Module, ids: np.ndarray) -> np.ndarray:
    """Log-probs of the second half of the row."""
    row = torch.from_numpy(ids)[None]
    logits = model(input_ids=row, use_cache=False).logits[0].float()
    return (
        torch.log_softmax(logits[LENGTH // 2 - 1 : -1], -1)
        .gather(1, row[0, LENGTH // 2 :, None])[:, 0]
        .numpy()
    )


@pytest.fixture(scope="module")
def expected(recipe: Recipe, ids: np.ndarray) -> np.ndarray:
    return logps_of(
        AutoModelForCausalLM.from_pretrained(Path(recipe.model.path or ""), dtype=torch.bfloat16), ids
    )


def test_the_reference_is_the_model_that_transformers_loads(
    recipe: Recipe, ids: np.ndarray, expected: np.ndarray
) -> None:
    half = LENGTH // 2
    group = SequenceGroup(0, ids[:half], (Branch(ids[half:], np.ones(half, np.bool_)),))
    (logps,) = RankReference(recipe, CPU).token_logprobs([pack([group], "padded")])
    assert np.abs(logps - expected).mean() < 0.02  # our head rounds logits at another point


def test_the_generator_is_the_model_that_transformers_loads(
    recipe: Recipe, ids: np.ndarray, expected: np.ndarray
) -> None:
    assert np.abs(logps_of(TransformersEngine(recipe, CPU).model, ids) - expected).mean() < 1e-3


def test_buffers_in_bf16_would_be_seen(recipe: Recipe, ids: np.ndarray, expected: np.ndarray) -> None:
    model = AutoModelForCausalLM.from_pretrained(Path(recipe.model.path or ""), dtype=torch.float32)
    assert np.abs(logps_of(model.to(torch.bfloat16), ids) - expected).mean() > 0.05


def test_placing_changes_weights_and_no_buffer() -> None:
    class Both(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(2))
            self.register_buffer("frequencies", torch.ones(2))

    model = placed(Both(), CPU, torch.bfloat16)
    assert (model.weight.dtype, model.frequencies.dtype) == (torch.bfloat16, torch.float32)
