"""Stage 5: how the time of a step divides. Measurements without checks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from gpu_stages.bench import Bench
from gpu_stages.device import release, seconds, settle
from gpu_stages.local import join
from gpu_stages.pretend import compiled_flex
from gpu_stages.shapes import Shape, on_device, shapes
from gpu_stages.speed_ours import cut_of
from orchestrator.algorithms.losses.logprobs import HeadSpec, chunked_logprobs
from orchestrator.data.micro_batches import cut_step
from orchestrator.learner.rank_learner import LearnerSpec, RankLearner

TOP = 12


def run(bench: Bench) -> None:
    device = torch.device(bench.device)
    with bench.attempt("kernels of a step"):
        profile_step(bench, device)
    release(device)
    with bench.attempt("head by chunk"):
        head(bench, device)
    release(device)
    with bench.attempt("FlexAttention against SDPA"):
        attention(bench, device)


def profile_step(bench: Bench, device: torch.device) -> None:
    """Notes the kernels with most time in one forward and backward, and the share of time without a
    kernel."""
    shape = next((s for s in shapes(bench.device) if s.name.startswith("7B")), shapes(bench.device)[0])
    step = stepper(replace(shape, pairs=4), device)
    step()
    settle(device)
    kinds = [
        torch.profiler.ProfilerActivity.CPU,
        *([torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []),
    ]
    with torch.profiler.profile(activities=kinds) as profiler:
        wall = seconds(step, device, 1, warm=False)
    busy: list[tuple[float, int, str]] = []
    for event in profiler.key_averages():
        own: float = (
            getattr(event, "self_device_time_total", 0.0)
            if device.type == "cuda"
            else event.self_cpu_time_total
        )
        if device.type == "cpu" or event.device_type == torch.autograd.DeviceType.CUDA:
            busy.append((own / 1e6, event.count, event.key))
    total = sum(time for time, _, _ in busy)
    bench.note(
        f"*{shape.name}, one step profiled",
        f"{wall:.3f} s, {max(0.0, 1 - total / wall):.0%} of it without a kernel",
    )
    for time, count, name in sorted(busy, reverse=True)[:TOP]:
        bench.note("kernel", f"{time / total:6.1%} {1e3 * time:9.2f} ms {count:6d} x {name[:90]}")


def stepper(shape: Shape, device: torch.device) -> Callable[[], object]:
    """A function that runs one forward and backward of the learner and its optimizer step."""
    recipe = shape.recipe(device.type)
    cut = cut_of(recipe, 2)
    learner = RankLearner(LearnerSpec(recipe, cut, 4), join(device), device, loaded=on_device(recipe, device))
    batch = cut_step(shape.groups(), cut)
    batch = batch.with_reference((learner.token_logprobs(batch.micro_batches[0]),))

    def step() -> object:
        learner.forward_backward(batch.micro_batches[0], batch.units, 0)
        return learner.optim_step(0)

    return step


def head(bench: Bench, device: torch.device) -> None:
    """Times the head alone, forward and backward, by positions per chunk."""
    gpu = device.type == "cuda"
    count, hidden, vocabulary = (8192, 4096, 128256) if gpu else (256, 64, 8192)
    dtype = torch.bfloat16 if gpu else torch.float32
    rows = torch.randn(count, hidden, device=device, dtype=dtype).requires_grad_()
    weight = (torch.randn(vocabulary, hidden, device=device, dtype=dtype) * 0.02).requires_grad_()
    targets = torch.randint(vocabulary, (count,), device=device)
    times = []
    for chunk in (130, 1024, 4096, 8192) if gpu else (32, 256):
        spec = HeadSpec(chunk=chunk)

        def once(spec: HeadSpec = spec) -> None:
            chunked_logprobs(rows, weight, None, targets, spec).logps.sum().backward()

        times.append(f"{chunk}: {1e6 * seconds(once, device, 1) / count:.1f}")
    bench.note(f"*head, us per scored token at V={vocabulary} by positions per chunk", ", ".join(times))


def attention(bench: Bench, device: torch.device) -> None:
    """Measures causal attention, forward and backward: TFLOP/s of our compiled FlexAttention and of SDPA."""
    from torch.nn.attention.flex_attention import create_block_mask

    flex = compiled_flex(device)
    heads, wide, lengths = (32, 128, (4096, 8192)) if device.type == "cuda" else (2, 16, (512,))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for length in lengths:
        q, k, v = (
            torch.randn(1, heads, length, wide, device=device, dtype=dtype).requires_grad_() for _ in range(3)
        )
        mask = create_block_mask(causal, None, None, length, length, device=str(device))
        flops = 3 * 4 * heads * wide * length * (length + 1) / 2

        def flexed(mask: Any = mask, q: Any = q, k: Any = k, v: Any = v) -> None:
            flex(q, k, v, block_mask=mask).sum().backward()

        def plain(q: Any = q, k: Any = k, v: Any = v) -> None:
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

        rates = [flops / seconds(work, device) / 1e12 for work in (flexed, plain)]
        bench.note(
            f"*causal attention at {length}, TFLOP/s", f"FlexAttention {rates[0]:.3g}, SDPA {rates[1]:.3g}"
        )


def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
    return i >= j
