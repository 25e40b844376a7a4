"""Annotated shapes are checked under pytest: a wrong shape raises before any number is computed."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from jaxtyping import TypeCheckError
from transformers import LlamaConfig

from orchestrator.algorithms.losses.interface import LossSum, TokenScores
from orchestrator.algorithms.losses.kl import k1
from orchestrator.algorithms.losses.logprobs import HeadSpec, chunked_logprobs
from orchestrator.core.batches import Branch, SequenceGroup
from orchestrator.data.packing import pack
from orchestrator.models.attention import attention_mask, capabilities
from orchestrator.models.rows import MicroBatchTensors

CPU = torch.device("cpu")


def test_a_loss_refuses_columns_that_would_broadcast() -> None:
    column = torch.zeros(3)
    assert k1(column, column).shape == (3,)
    with pytest.raises(TypeCheckError, match="ref_logps"):
        k1(column, torch.zeros(1))  # torch alone would broadcast it


def test_the_head_refuses_targets_of_another_length_or_type() -> None:
    hidden, weight = torch.zeros(4, 2), torch.zeros(5, 2)
    for targets in (torch.zeros(3, dtype=torch.long), torch.zeros(4)):
        with pytest.raises(TypeCheckError, match="targets"):
            chunked_logprobs(hidden, weight, None, targets, HeadSpec())


def test_a_record_refuses_a_column_of_another_length() -> None:
    column, sequence = torch.zeros(3), torch.zeros(3, dtype=torch.long)
    assert TokenScores(column, sequence, 1, 1, ref_logps=column).ref_sums().shape == (1, 1)
    with pytest.raises(TypeCheckError, match="ref_logps"):
        TokenScores(column, sequence, 1, 1, ref_logps=torch.zeros(4))
    with pytest.raises(TypeCheckError, match="total"):
        LossSum(torch.zeros(2), {})


def test_a_mask_refuses_a_row_of_another_length() -> None:
    can, rows = capabilities(LlamaConfig()), torch.zeros(2, 6, dtype=torch.int32)
    mask = attention_mask(rows, rows, rows, "packed", can, torch.float32)
    assert isinstance(mask, torch.Tensor) and mask.shape == (2, 1, 6, 6)
    with pytest.raises(TypeCheckError, match="branch"):
        attention_mask(rows, rows[:1], rows, "packed", can, torch.float32)  # torch alone would broadcast it


def test_rows_refuse_a_column_of_another_length() -> None:
    branch = Branch(np.arange(3), np.ones(3, np.bool_))
    rows = pack([SequenceGroup(0, np.arange(2), (branch,))], "packed")
    assert MicroBatchTensors.of(rows, CPU).targets.shape == (3,)
    with pytest.raises(TypeCheckError, match="targets"):
        MicroBatchTensors.of(replace(rows, targets=rows.targets[:2]), CPU)
