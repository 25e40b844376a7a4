"""AdamW for ZeRO stage 0, and what the plain-torch baseline shares with it."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

NORM_CHUNK = 1 << 12
"""Values whose squares are added in fp32; the sums of chunks are added in double."""


def global_norm(gradients: Sequence[Tensor]) -> Tensor:
    """L2 norm over all tensors, in fp32. torch's own norm adds millions of fp32 squares in a row, which is
    1e-3 off at 25 M values."""
    norms = []
    for flat in (gradient.flatten() for gradient in gradients):
        in_chunks = len(flat) - len(flat) % NORM_CHUNK
        norms += [
            torch.linalg.vector_norm(flat[:in_chunks].view(-1, NORM_CHUNK), dim=1),
            torch.linalg.vector_norm(flat[in_chunks:])[None],
        ]
    return torch.linalg.vector_norm(torch.cat(norms).double()).float()


def zero_missing(parameters: Iterable[nn.Parameter]) -> None:
    """Gives parameters that no token of the step reached (of an expert, say) a gradient of zeros. Without it,
    whether their moments and weights decay in the step would depend on the cut."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW that clips and refuses a non-finite step itself. For ZeRO stage 0, where DeepSpeed does
    neither safely.

    DeepSpeed reads `overflow` and `_global_grad_norm` from the optimizer after each step.
    """

    def __init__(self, params: Any, *, max_norm: float, **options: Any) -> None:
        super().__init__(params, fused=True, **options)
        self.max_norm = max_norm
        self.overflow = False
        self._global_grad_norm = 0.0

    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        parameters = [p for group in self.param_groups for p in group["params"]]
        zero_missing(parameters)  # like the partitioned stages
        norm = global_norm([p.grad for p in parameters])
        self._global_grad_norm = float(norm)
        self.overflow = not bool(torch.isfinite(norm))
        if self.overflow:
            return
        if self.max_norm > 0:
            torch.nn.utils.clip_grads_with_norm_(parameters, self.max_norm, norm)
        super().step(closure)
