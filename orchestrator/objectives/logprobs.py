"""Token log-probs from hidden states without the logits of a whole row, and token weights."""

from typing import Any

import torch
from torch import Tensor, nn


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    *,
    chunk: int = 1024,
    soft_cap: float | None = None,
    scale: float = 1.0,
    want_wpo: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """log softmax(z)[target] for z = cap * tanh(scale * (hidden W^T + b) / cap), `chunk` positions at a time.

    hidden: [N, H], weight: [V, H], bias: [V], targets: Int[N]. Returns log-probs Float[N] in fp32 (fp64 for fp64
    input) and, if asked, log p(target) - log sum_v p(v)^2 (WPO, arXiv 2406.11827, eq. 2) without gradient.
    The backward recomputes each chunk, so at most two chunks of logits are alive; the weight's gradient is summed
    over chunks in fp32 and rounded once.
    """
    logps, wpo = _ChunkedLogProbs.apply(hidden, weight, bias, targets, chunk, soft_cap, scale, want_wpo)
    return logps, wpo if want_wpo else None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, soft_cap: float | None, scale: float, dtype: torch.dtype) -> Tensor:
    z = nn.functional.linear(hidden, weight, bias).to(dtype)
    if scale != 1.0:
        z = z * scale
    return z if soft_cap is None else soft_cap * torch.tanh(z / soft_cap)


class _ChunkedLogProbs(torch.autograd.Function):
    """Keeps the weight PARAMETER, not a copy: under ZeRO-3 its data is freed after the forward and gathered again."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        soft_cap: float | None,
        scale: float,
        want_wpo: bool,
    ) -> tuple[Tensor, Tensor]:
        ctx.compute = torch.get_autocast_dtype(hidden.device.type) if torch.is_autocast_enabled(hidden.device.type) else hidden.dtype
        accurate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logps = torch.empty(len(hidden), dtype=accurate, device=hidden.device)
        wpo = torch.empty_like(logps) if want_wpo else logps.new_empty(0)
        w, b = weight.to(ctx.compute), None if bias is None else bias.to(ctx.compute)
        for i in range(0, len(hidden), chunk):
            part = slice(i, i + chunk)
            z = _logits(hidden[part].to(ctx.compute), w, b, soft_cap, scale, accurate)
            norm = z.logsumexp(1)
            logps[part] = z.gather(1, targets[part, None])[:, 0] - norm
            if want_wpo:
                wpo[part] = logps[part] - ((2.0 * z).logsumexp(1) - 2.0 * norm)
        ctx.save_for_backward(hidden, targets)
        ctx.weight, ctx.bias = weight, bias
        ctx.chunk, ctx.soft_cap, ctx.scale = chunk, soft_cap, scale
        ctx.mark_non_differentiable(wpo)
        return logps, wpo

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        hidden, targets = ctx.saved_tensors
        weight, bias = ctx.weight, ctx.bias
        accurate = grad.dtype
        w, b = weight.to(ctx.compute), None if bias is None else bias.to(ctx.compute)
        grad_hidden = torch.empty_like(hidden)
        learns_head = weight.requires_grad
        grad_weight = torch.zeros(weight.shape, dtype=accurate, device=hidden.device) if learns_head else None
        grad_bias = torch.zeros(bias.shape, dtype=accurate, device=hidden.device) if bias is not None else None
        for i in range(0, len(hidden), ctx.chunk):
            part = slice(i, i + ctx.chunk)
            rows = hidden[part].to(ctx.compute)
            z = _logits(rows, w, b, ctx.soft_cap, ctx.scale, accurate)
            slope = None if ctx.soft_cap is None else 1.0 - (z / ctx.soft_cap).square()
            d = torch.softmax(z, 1).neg_()
            d[torch.arange(len(rows), device=d.device), targets[part]] += 1.0
            d *= grad[part, None] * ctx.scale
            if slope is not None:
                d *= slope
            low = d.to(ctx.compute)
            grad_hidden[part] = (low @ w).to(hidden.dtype)
            if grad_weight is not None:
                grad_weight += (low.t() @ rows).to(accurate) if accurate == ctx.compute else low.t().to(accurate) @ rows.to(accurate)
            if grad_bias is not None:
                grad_bias += d.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            *(None,) * 5,
        )


def ld_weights(sequence: Tensor, examples: int, branches: int, alpha: float) -> Tensor:
    """LD-DPO's token weights Float[N] (arXiv 2409.06411, eq. 10): 1 up to the shorter branch's length, alpha beyond.

    sequence: Int[N], tokens of a sequence in order of position.
    """
    ones = torch.ones_like(sequence)
    lengths = torch.zeros(examples * branches, dtype=sequence.dtype, device=sequence.device).index_add(0, sequence, ones)
    shorter = lengths.view(examples, branches).min(1).values.repeat_interleave(branches)
    order = torch.argsort(sequence, stable=True)
    starts = torch.cumsum(lengths, 0) - lengths
    rank = torch.empty_like(sequence)
    rank[order] = torch.arange(len(sequence), device=sequence.device) - starts[sequence[order]]
    return torch.where(rank < shorter[sequence], 1.0, alpha)
