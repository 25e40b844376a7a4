"""Token log-probs from hidden states without the logits of a whole row, and token weights."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """How logits are made of hidden states and what is wanted beside log-probs.

    z = (cap * tanh(scale * (hidden W^T + b) / cap)) / temperature. temperature: of the distribution that
    rollouts are drawn from, so that log-probs are those of the sampled policy. chunk: positions whose logits
    are alive at once.
    """

    chunk: int = 1024
    soft_cap: float | None = None
    scale: float = 1.0
    temperature: float = 1.0
    want_wpo: bool = False
    want_entropy: bool = False


@dataclass(frozen=True, slots=True)
class HeadOutput:
    """logps: Float[N], log softmax(z)[target]; wpo: Float[N], log p(target) - log sum_v p(v)^2 (WPO, arXiv
    2406.11827, eq. 2) without gradient; entropy: Float[N], -sum_v p(v) log p(v)."""

    logps: Tensor
    wpo: Tensor | None = None
    entropy: Tensor | None = None


def chunked_logprobs(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, spec: HeadSpec
) -> HeadOutput:
    """Log-probs of `targets` (and what else `spec` wants), spec.chunk positions at a time.

    hidden: [N, H], weight: [V, H], bias: [V], targets: Int[N]; results in fp32 (fp64 for fp64 input). The
    backward recomputes each chunk, so at most two chunks of logits are alive; the weight's gradient is summed
    over chunks in fp32 and rounded once.
    """
    logps, wpo, entropy = _ChunkedLogProbs.apply(hidden, weight, bias, targets, spec)
    return HeadOutput(logps, wpo if spec.want_wpo else None, entropy if spec.want_entropy else None)


def _widens(tensor: Tensor, accurate: torch.dtype) -> bool:
    """True where a product of these low-precision values can be had as the fp32 sums that it is made of:
    NVIDIA's from Ampere on."""
    return (
        tensor.is_cuda
        and tensor.dtype != accurate
        and torch.get_device_module(tensor.device).get_device_capability(tensor.device)[0] >= 8
    )


def _logits(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, spec: HeadSpec, accurate: torch.dtype
) -> Tensor:
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


def _below_top(z: Tensor) -> Tensor:
    """The largest logit of each row, Float[n]; z is left with what is below it. A log-prob is then a
    difference of small numbers, as in torch.log_softmax: taken from whole logits it would lose what fp32
    cannot hold beside a logit of 40 (4e-6 nat)."""
    top = z.amax(1, keepdim=True)
    z.sub_(top)
    return top[:, 0]


def _spent(z: Tensor) -> Tensor:
    """log sum_v exp z_v: Float[n], of z below its top, without the second [n, V] tensor that torch.logsumexp
    takes. z is overwritten."""
    return z.exp_().sum(1).log_()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left^T right in place: [V, H] += [n, V]^T [n, H], summed in total's precision. Where no
    product of low precision adds up in fp32 (a CPU's), both sides are made fp32."""
    if _widens(left, total.dtype):
        torch.addmm(total, left.t(), right, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(left.t().to(total.dtype), right.to(total.dtype))


class _ChunkedLogProbs(torch.autograd.Function):
    """Keeps the weight PARAMETER, not a copy: under ZeRO-3 its data is freed after the forward and gathered
    again."""

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
        norm = torch.empty_like(logps)  # log sum_v exp z_v: kept, so that the backward has no sums to make
        wpo = torch.empty_like(logps) if spec.want_wpo else logps.new_empty(0)
        entropy = torch.empty_like(logps) if spec.want_entropy else logps.new_empty(0)
        w, b = weight.to(ctx.compute), None if bias is None else bias.to(ctx.compute)
        for i in range(0, len(hidden), spec.chunk):
            part = slice(i, i + spec.chunk)
            z = _logits(hidden[part].to(ctx.compute), w, b, spec, accurate)
            top = _below_top(z)
            picked = z.gather(1, targets[part, None])[:, 0]
            below = z.logsumexp(1) if spec.want_wpo or spec.want_entropy else _spent(z)
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
                _at(entropy, part),
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


def _at(values: Tensor | None, part: slice) -> Tensor | None:
    return None if values is None else values[part, None]


def _logits_gradient(
    z: Tensor,
    targets: Tensor,
    norm: Tensor,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    entropy: Tensor | None,
) -> Tensor:
    """d/dz of grad . log p(target) + grad_entropy . H. z: [n, V], overwritten; norm = log sum exp z,
    gradients and entropy: [n, 1]."""
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


def ld_weights(sequence: Tensor, examples: int, branches: int, alpha: float) -> Tensor:
    """LD-DPO's token weights Float[N] (arXiv 2409.06411, eq. 10): 1 up to the shorter branch's length, alpha
    beyond.

    sequence: Int[N], tokens of a sequence in order of position.
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
