"""The chunked head against torch's log_softmax, and LD-DPO's token weights literally."""

import pytest
import torch
from torch import Tensor

from orchestrator.algorithms.losses.logprobs import HeadSpec, chunked_logprobs, ld_weights
from orchestrator.models.forward import ScoredHead

N, H, V = 13, 5, 17


def inputs(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden, weight, bias, targets, incoming gradient. Logits are a few units large, so that a cap acts."""
    draw = torch.Generator().manual_seed(0)
    hidden, weight, bias = (
        torch.randn(shape, generator=draw, dtype=dtype) for shape in ((N, H), (V, H), (V,))
    )
    return (
        hidden,
        weight,
        bias,
        torch.randint(V, (N,), generator=draw),
        torch.randn(N, generator=draw, dtype=dtype),
    )


def plain(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    cap: float | None,
    scale: float,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    z = scale * torch.nn.functional.linear(hidden, weight, bias)
    if cap is not None:
        z = cap * torch.tanh(z / cap)
    z = z / temperature
    everything = torch.log_softmax(z, -1)
    logps = everything.gather(1, targets[:, None])[:, 0]
    return logps, logps - everything.exp().square().sum(1).log()


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("scale", [1.0, 0.25, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_equal_log_softmax(chunk, cap, scale, with_bias):
    hidden, weight, bias, targets, back = inputs()
    leaves = [t.requires_grad_() for t in ((hidden, weight, bias) if with_bias else (hidden, weight))]
    used = bias if with_bias else None
    want, want_wpo = plain(hidden, weight, used, targets, cap, scale)
    output = chunked_logprobs(
        hidden, weight, used, targets, HeadSpec(chunk=chunk, soft_cap=cap, scale=scale, want_wpo=True)
    )
    got, wpo = output.logps, output.wpo
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(wpo, want_wpo, rtol=1e-12, atol=1e-12)
    assert not wpo.requires_grad
    for a, b in zip(
        torch.autograd.grad(got, leaves, back), torch.autograd.grad(want, leaves, back), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("chunk", [1, 4, 64])
@pytest.mark.parametrize("cap", [None, 1.5])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_entropy_and_temperature_equal_log_softmax(chunk, cap, temperature):
    hidden, weight, bias, targets, back = inputs()
    leaves = [t.requires_grad_() for t in (hidden, weight, bias)]
    z = 3.0 * torch.nn.functional.linear(hidden, weight, bias)
    z = (z if cap is None else cap * torch.tanh(z / cap)) / temperature
    logs = torch.log_softmax(z, -1)
    want, want_entropy = logs.gather(1, targets[:, None])[:, 0], -(logs.exp() * logs).sum(1)
    output = chunked_logprobs(
        hidden,
        weight,
        bias,
        targets,
        HeadSpec(chunk=chunk, soft_cap=cap, scale=3.0, temperature=temperature, want_entropy=True),
    )
    got, entropy = output.logps, output.entropy
    assert entropy is not None
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, want_entropy, rtol=1e-11, atol=1e-11)
    mixtures = (
        lambda lp, h: (lp * back).sum(),
        lambda lp, h: (h * back).sum(),
        lambda lp, h: (lp * back).sum() + 0.3 * (h * back.flip(0)).sum(),
    )
    for mix in mixtures:
        ours = torch.autograd.grad(mix(got, entropy), leaves, retain_graph=True)
        for a, b in zip(
            ours, torch.autograd.grad(mix(want, want_entropy), leaves, retain_graph=True), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cap", [None, 1.5])
def test_gradients_equal_finite_differences(cap):
    hidden, weight, bias, targets, _ = inputs()
    leaves = tuple(t.requires_grad_() for t in (hidden, weight, bias))
    assert torch.autograd.gradcheck(
        lambda *x: chunked_logprobs(*x, targets, HeadSpec(chunk=4, soft_cap=cap, scale=0.7)).logps, leaves
    )


def test_fp32_stays_fp32_and_close():
    hidden, weight, bias, targets, _ = inputs(torch.float32)
    output = chunked_logprobs(hidden, weight, bias, targets, HeadSpec(chunk=4))
    got = output.logps
    assert got.dtype == torch.float32 and output.wpo is None and output.entropy is None
    torch.testing.assert_close(got, plain(hidden, weight, bias, targets, None, 1.0)[0])


def test_bf16_gives_fp32_log_probs_and_sums_the_weight_gradient_in_fp32():
    hidden, weight, bias, targets, back = inputs(torch.float32)
    low = [t.bfloat16().requires_grad_() for t in (hidden, weight, bias)]
    exact = [t.detach().double().requires_grad_() for t in low]
    got = chunked_logprobs(*low, targets, HeadSpec(chunk=1)).logps
    want, _ = plain(*exact, targets, None, 1.0)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)
    gradients = torch.autograd.grad(got, low, back.float())
    for a, b in zip(gradients, torch.autograd.grad(want, exact, back.double()), strict=True):
        assert a.dtype == torch.bfloat16
        assert float((a.double() - b).norm() / b.norm()) < 1e-2


def test_a_frozen_head_passes_a_gradient_on_and_gets_none():
    hidden, weight, _, targets, _ = inputs()
    hidden.requires_grad_()
    logps = chunked_logprobs(hidden, weight, None, targets, HeadSpec(chunk=4)).logps
    logps.sum().backward()
    assert weight.grad is None and float(hidden.grad.abs().sum()) > 0


def test_no_positions():
    hidden, weight, bias, targets, _ = inputs()
    leaves = [hidden.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()]
    logps = chunked_logprobs(hidden[:0], weight, bias, targets[:0], HeadSpec()).logps
    assert logps.shape == (0,)
    assert all(float(g.abs().sum()) == 0.0 for g in torch.autograd.grad(logps.sum(), leaves))


def test_at_most_a_chunk_of_logits_is_alive():
    """Nothing of the size of all logits is saved for the backward."""
    hidden, weight, bias, targets, _ = inputs()
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t.numel()), t)[1], lambda t: t):
        chunked_logprobs(hidden.requires_grad_(), weight.requires_grad_(), bias, targets, HeadSpec(chunk=2))
    assert max(saved) < N * V


@pytest.mark.parametrize("device_type", ["cpu", "cuda"])
def test_the_chunks_of_a_device_equal_fp64_at_a_vocabulary_of_128k(device_type):
    """A CPU takes 130 positions at a time, a GPU 4,185. Here a head on the CPU makes the chunks of either."""
    vocabulary, positions, width = 128_256, 150, 8
    draw = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(width, vocabulary, bias=False)
    linear.weight.data = torch.randn(vocabulary, width, generator=draw)
    hidden = torch.randn(positions, width, generator=draw).requires_grad_()
    targets, back = (
        torch.randint(vocabulary, (positions,), generator=draw),
        torch.randn(positions, generator=draw),
    )
    head = ScoredHead(linear, HeadSpec())
    head.computes_as = device_type
    got = head(hidden, targets)[0]
    gradients = torch.autograd.grad(got, [hidden, linear.weight], back)

    exact = [t.detach().double().requires_grad_() for t in (hidden, linear.weight)]
    want = torch.log_softmax(exact[0] @ exact[1].t(), -1).gather(1, targets[:, None])[:, 0]
    assert torch.allclose(got.double(), want, rtol=0, atol=1e-5)
    for mine, theirs in zip(gradients, torch.autograd.grad(want, exact, back.double()), strict=True):
        assert (mine - theirs).norm() <= 1e-6 * theirs.norm()


def test_ld_weights_literally():
    """Lengths (3, 1) and (2, 4): tokens beyond the first 1 and 2 of their branch weigh 0.25."""
    sequence = torch.tensor([0, 0, 0, 1, 2, 2, 3, 3, 3, 3])
    want = [1.0, 0.25, 0.25, 1.0, 1.0, 1.0, 1.0, 1.0, 0.25, 0.25]
    assert ld_weights(sequence, 2, 2, 0.25).tolist() == want


def test_ld_weights_with_sequences_in_any_order_of_rows():
    """Packed rows start with the longest sequence: a sequence's tokens are adjacent, sequences unsorted."""
    sequence = torch.tensor([3, 3, 3, 3, 0, 0, 0, 2, 2, 1])
    want = [1.0, 1.0, 0.25, 0.25, 1.0, 0.25, 0.25, 1.0, 1.0, 1.0]
    assert ld_weights(sequence, 2, 2, 0.25).tolist() == want
