"""What each value of learners.precision means for the tensors of a learner and of its generators."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Precision:
    """One value of learners.precision, decoded. Master weights, moments and accumulated gradients are fp32 in
    all of them."""

    model_dtype: torch.dtype
    """Type of the parameters that the model computes with."""
    wire_dtype: torch.dtype
    """Type of matrix products, and of the weights that learners send and generators compute with: the same,
    so that log-probs agree."""
    autocast: bool = False
    """Whether torch.autocast casts the parameters for each product."""

    @property
    def exact(self) -> bool:
        """Whether nothing is rounded to fewer bits than fp32 has."""
        return self.wire_dtype is torch.float32

    @property
    def low(self) -> bool:
        """Whether the parameters themselves have 16 bits, with fp32 master weights beside them."""
        return self.model_dtype is not torch.float32

    @property
    def element_bytes(self) -> int:
        """Bytes of one parameter that the model computes with."""
        return self.model_dtype.itemsize


_PRECISIONS = {
    "fp32": Precision(torch.float32, torch.float32),
    "bf16": Precision(torch.bfloat16, torch.bfloat16),
    "fp16": Precision(torch.float16, torch.float16),
    "bf16_autocast": Precision(torch.float32, torch.bfloat16, autocast=True),
}


def precision_of(name: str) -> Precision:
    """The meaning of a value of learners.precision, once plan/settle.py has replaced `auto`."""
    return _PRECISIONS[name]
