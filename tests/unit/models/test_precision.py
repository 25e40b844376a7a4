"""The meaning of each value of learners.precision."""

import pytest
import torch

from orchestrator.models.precision import precision_of

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("name", "model_dtype", "wire_dtype", "autocast", "element_bytes", "exact", "low"),
    [
        ("fp32", FP32, FP32, False, 4, True, False),
        ("bf16", BF16, BF16, False, 2, False, True),
        ("fp16", FP16, FP16, False, 2, False, True),
        ("bf16_autocast", FP32, BF16, True, 4, False, False),
    ],
)
def test_types_and_sizes(name, model_dtype, wire_dtype, autocast, element_bytes, exact, low):
    precision = precision_of(name)
    assert (precision.model_dtype, precision.wire_dtype) == (model_dtype, wire_dtype)
    assert (precision.autocast, precision.element_bytes) == (autocast, element_bytes)
    assert (precision.exact, precision.low) == (exact, low)


def test_auto_has_to_be_settled_first():
    with pytest.raises(KeyError):
        precision_of("auto")
