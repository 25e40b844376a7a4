"""Token log-probs from hidden states, a chunk of logits at a time; LD-DPO's token weights."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """How logits are computed from hidden states, and what is wanted beside log-probs.

    z = (cap * tanh(scale * (hidden W^T + b) / cap)) / temperature
    """

    chunk: int = 1024
    """Positions whose logits are alive at the same time."""
    soft_cap: float | None = None
    scale: float = 1.0
    temperature: float = 1.0
    """Temperature that rollouts are drawn at, so that log-probs are those of the sampled policy."""
    want_wpo: bool = False
    want_entropy: bool = False


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """Scores of N target tokens."""

    logps: Float[Tensor, " N"]
    """log softmax(z)[target]."""
    wpo: Float[Tensor, " N"] | None = None
    """log p(target) - log sum_v p(v)^2 (WPO, arXiv 2406.11827, eq. 2), without gradient."""
    entropy: Float[Tensor, " N"] | None = None
    """-sum_v p(v) log p(v)."""


def chunked_logprobs(
    hidden: Float[Tensor, "N H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    targets: Int[Tensor, " N"],
    spec: HeadSpec,
) -> HeadOutput:
    """Log-probs of `targets` (and what else `spec` wants), spec.chunk positions at a time.

    Results are fp32 (fp64 for fp64 input). The backward computes each chunk again, so at most two chunks of
    logits are alive. The weight's gradient is summed over chunks in fp32 and rounded once.
    """
    logps, wpo, entropy = _ChunkedLogProbs.apply(hidden, weight, bias, targets, spec)
    return HeadOutput(logps, wpo if spec.want_wpo else None, entropy if spec.want_entropy else None)


def _widens(tensor: Tensor, accurate: torch.dtype) -> bool:
    """True if the device returns a product of these low-precision values as its fp32 sums: NVIDIA from Ampere
    on."""
    return (
        tensor.is_cuda
        and tensor.dtype != accurate
        and torch.get_device_module(tensor.device).get_device_capability(tensor.device)[0] >= 8
    )


def _logits(
    hidden: Float[Tensor, "n H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None,
    spec: HeadSpec,
    accurate: torch.dtype,
) -> Float[Tensor, "n V"]:
    if _widens(hidden, accurate):
        z = torch.mm(hidden, weight.t(), out_dtype=accurate)  # never rounded to bf16
        z = z if bias is None else z.add_(bias)
    else:
        z = nn.functional.linear(hidden, weight, bias).to(accurate)
    if spec.scale != 1.0:
        z = z * spec.scale
    if spec.soft_cap is not None:
        z = spec.soft_cap * torch.tanh(z / spec.soft_cap)
    return z if spec.temperature == 1.0 else z / spec.temperature


def _below_top(z: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """The largest logit of each row, subtracted from z in place.

    A log-prob is then a difference of small numbers, as in torch.log_softmax. Taken from the logits
    themselves it would lose what fp32 cannot hold beside a logit of 40 (4e-6 nat).
    """
    top = z.amax(1, keepdim=True)
    z.sub_(top)
    return top[:, 0]


def _logsumexp_in_place(z: Float[Tensor, "n V"]) -> Float[Tensor, " n"]:
    """log sum_v exp z_v of z below its top; overwrites z.

    torch.logsumexp would allocate a second [n, V] tensor.
    """
    return z.exp_().sum(1).log_()


def _add_product(
    total: Float[Tensor, "V H"], left: Float[Tensor, "n V"], right: Float[Tensor, "n H"]
) -> None:
    """total += left^T right in place, summed in total's precision.

    If the device cannot sum low-precision products in fp32 (a CPU), both sides are converted to fp32.
    """
    if _widens(left, total.dtype):
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.t().to(total.dtype), right.to(total.dtype))


class _ChunkedLogProbs(torch.autograd.Function):
    """Keeps the weight PARAMETER, no copy: ZeRO-3 frees its data after the forward and gathers it again."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, spec: HeadSpec
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.compute = (
            torch.get_autocast_dtype(hidden.device.type)
            if torch.is_autocast_enabled(hidden.device.type)
            else hidden.dtype
        )
        accurate = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        logps = torch.empty(len(hidden), dtype=accurate, device=hidden.device)
        norm = torch.empty_like(logps)  # log sum_v exp z_v, kept for the backward
        wpo = torch.empty_like(logps) if spec.want_wpo else logps.new_empty(0)
        entropy = torch.empty_like(logps) if spec.want_entropy else logps.new_empty(0)
        w, b = weight.to(ctx.compute), None if bias is None else bias.to(ctx.compute)
        for i in range(0, len(hidden), spec.chunk):
            part = slice(i, i + spec.chunk)
            z = _logits(hidden[part].to(ctx.compute), w, b, spec, accurate)
            top = _below_top(z)
            picked = z.gather(1, targets[part, None])[:, 0]
            below = z.logsumexp(1) if spec.want_wpo or spec.want_entropy else _logsumexp_in_place(z)
            norm[part] = below + top
            logps[part] = picked - below
            if spec.want_wpo:
                wpo[part] = logps[part] - ((2.0 * z).logsumexp(1) - 2.0 * below)
            if spec.want_entropy:
                entropy[part] = below - (z - below[:, None]).exp_().mul_(z).sum(1)
        ctx.save_for_backward(hidden, targets, norm, entropy)
        ctx.weight, ctx.bias, ctx.spec = weight, bias, spec
        ctx.mark_non_differentiable(wpo)
        ctx.set_materialize_grads(False)
        return logps, wpo, entropy

    @staticmethod
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad: Tensor | None, _: Tensor | None, grad_entropy: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        hidden, targets, norm, entropy = ctx.saved_tensors
        weight, bias, spec = ctx.weight, ctx.bias, ctx.spec
        w, b = weight.to(ctx.compute), None if bias is None else bias.to(ctx.compute)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = (
            torch.zeros(weight.shape, dtype=norm.dtype, device=hidden.device)
            if weight.requires_grad
            else None
        )
        grad_bias = (
            torch.zeros(bias.shape, dtype=norm.dtype, device=hidden.device) if bias is not None else None
        )
        factor = spec.scale / spec.temperature  # dz/d(hidden W^T + b), but for the cap's slope
        grad = None if grad is None else grad * factor
        grad_entropy = None if grad_entropy is None else grad_entropy * factor
        for i in range(0, len(hidden), spec.chunk):
            part = slice(i, i + spec.chunk)
            rows = hidden[part].to(ctx.compute)
            z = _logits(rows, w, b, spec, norm.dtype)
            slope = None if spec.soft_cap is None else 1.0 - (z * spec.temperature / spec.soft_cap).square()
            d = _logits_gradient(
                z,
                targets[part],
                norm[part, None],
                _at(grad, part),
                _at(grad_entropy, part),
                None if grad_entropy is None else _at(entropy, part),
            )
            if slope is not None:
                d *= slope
            low = d.to(ctx.compute)
            grad_hidden[part] = (low @ w).to(hidden.dtype)
            if grad_weight is not None:
                _add_product(grad_weight, low, rows)
            if grad_bias is not None:
                grad_bias += d.sum(0)
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None or bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def _at(values: Float[Tensor, " N"] | None, part: slice) -> Float[Tensor, "n 1"] | None:
    return None if values is None else values[part, None]


def _logits_gradient(
    z: Float[Tensor, "n V"],
    targets: Int[Tensor, " n"],
    norm: Float[Tensor, "n 1"],
    grad: Float[Tensor, "n 1"] | None,
    grad_entropy: Float[Tensor, "n 1"] | None,
    entropy: Float[Tensor, "n 1"] | None,
) -> Float[Tensor, "n V"]:
    """d/dz of grad . log p(target) + grad_entropy . H; overwrites z. norm = log sum exp z."""
    if grad_entropy is not None:
        assert entropy is not None
        logp = z.sub_(norm)
        slope = grad_entropy * (logp + entropy)  # dH/dz = -p (log p + H)
        d = logp.exp().mul_(-(slope if grad is None else slope + grad))
    else:
        d = z.sub_(norm).exp_().mul_(torch.zeros_like(norm) if grad is None else -grad)
    if grad is not None:
        d.scatter_add_(1, targets[:, None], grad.to(d.dtype))  # d log p(target)/dz = onehot - p
    return d


def ld_weights(
    sequence: Int[Tensor, " N"], examples: int, branches: int, alpha: float
) -> Float[Tensor, " N"]:
    """LD-DPO's token weights (arXiv 2409.06411, eq. 10).

    1 up to the length of the shorter branch, alpha beyond it. The tokens of a sequence stand in order of
    their positions.
    """
    ones = torch.ones_like(sequence)
    lengths = torch.zeros(examples * branches, dtype=sequence.dtype, device=sequence.device).index_add(
        0, sequence, ones
    )
    shorter = lengths.view(examples, branches).min(1).values.repeat_interleave(branches)
    order = torch.argsort(sequence, stable=True)
    starts = torch.cumsum(lengths, 0) - lengths
    rank = torch.empty_like(sequence)
    rank[order] = torch.arange(len(sequence), device=sequence.device) - starts[sequence[order]]
    return torch.where(rank < shorter[sequence], 1.0, alpha)
