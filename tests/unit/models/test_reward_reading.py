"""A reward is read where AutoModelForSequenceClassification reads it, also if eos is the pad token."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from orchestrator.core.batches import Branch, SequenceGroup
from orchestrator.data.packing import pack
from orchestrator.models.forward import ScoringModel, head_gap, run_forward
from orchestrator.models.rows import MicroBatchTensors

EOS, PAD = 7, 0
SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 100,
    "num_labels": 1,
}


def model(pad: int) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model("llama", **SIZES, pad_token_id=pad, eos_token_id=EOS, initializer_range=0.2)
    return AutoModelForSequenceClassification.from_config(config).eval()


def groups() -> list[SequenceGroup]:
    """Answers that end in one eos, in two, or in none, one that is only eos, and a prompt with eos inside."""

    def branch(*ids: int) -> Branch:
        return Branch(np.array(ids), np.ones(len(ids), np.bool_))

    return [
        SequenceGroup(0, np.array([20, EOS, 21]), (branch(30, 31, EOS), branch(40, EOS, EOS))),
        SequenceGroup(1, np.array([22]), (branch(EOS), branch(41, 42, 43, 44))),
    ]


@torch.no_grad()
def own_rewards(classifier: Any, pad: int) -> torch.Tensor:
    """Rewards of the model's own forward, for one batch padded on the right."""
    sequences = [[*g.prompt.tolist(), *b.ids.tolist()] for g in groups() for b in g.branches]
    width = max(map(len, sequences))
    ids = torch.tensor([s + [pad] * (width - len(s)) for s in sequences])
    mask = torch.tensor([[1] * len(s) + [0] * (width - len(s)) for s in sequences])
    return classifier(input_ids=ids, attention_mask=mask, use_cache=False).logits.view(-1, 2)


@pytest.mark.parametrize("pad", [PAD, EOS], ids=["its own pad token", "eos is the pad token"])
@pytest.mark.parametrize("layout", ["padded", "packed", "prefix_shared"])
def test_rewards_are_transformers_own(layout, pad):
    classifier = model(pad)
    expected = own_rewards(classifier, pad)
    rows = MicroBatchTensors.of(pack(groups(), layout), torch.device("cpu"))
    with torch.no_grad():
        rewards = run_forward(ScoringModel(classifier, head="scalar"), rows).rewards
    assert rewards is not None
    torch.testing.assert_close(rewards, expected, rtol=0.0, atol=1e-5)


def test_the_start_up_check_sees_a_reward_that_is_read_elsewhere():
    scoring = ScoringModel(model(EOS), head="scalar")
    rows = MicroBatchTensors.of(pack(groups(), "padded"), torch.device("cpu"))
    assert head_gap(scoring, rows).abs().max() < 1e-5
    scoring._pad = None  # now the reward is read at the last token
    assert head_gap(scoring, rows).abs().max() > 1e-3
