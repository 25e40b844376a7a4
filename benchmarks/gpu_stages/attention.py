"""Stage 1: one row under block masks gives the log-probs and gradients of padded rows, with few graphs, and
the head is as exact as its type.

On a CPU Dynamo's graphs run eagerly: that proves masks, rows, gradients and the number of graphs, but not the
kernel.
"""

import random
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from gpu_stages.bench import Bench
from gpu_stages.device import release
from gpu_stages.pretend import allow_backward
from orchestrator.algorithms.losses.logprobs import HeadSpec
from orchestrator.core.batches import Branch, MicroBatch, SequenceGroup
from orchestrator.data.packing import by_branch, pack
from orchestrator.models.block_attention import MAX_COMPILATIONS, compiled_attention
from orchestrator.models.forward import MicroBatchTensors, ScoredHead, ScoringModel, run_forward
from orchestrator.models.load import placed
from orchestrator.models.tiny import build
from orchestrator.recipe.schema import TinyModel

MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 50}
MODELS = {"llama": {}, "qwen3": {**MIXED, "use_sliding_window": True}, "gemma2": MIXED}
EXACT, NOISE = 1e-5, 2.0
"""EXACT: largest difference in fp32, of log-probs in nat and of gradients in norm. NOISE: largest error in
bf16, as a multiple of the error of padded rows in bf16."""
MICRO_BATCHES = 30
VOCABULARY = 128256
HEAD = {torch.float32: (1e-5, 1e-5), torch.bfloat16: (3e-2, 1e-2)}
"""Largest error of the head against fp64 on the same inputs: log-probs in nat, gradients in norm. In bf16 a
logit of 4 is rounded by 8e-3."""


def run(bench: Bench) -> None:
    device = torch.device(bench.device)
    if bench.small:
        allow_backward()
    for architecture in MODELS:
        with bench.attempt(architecture):
            equal(bench, architecture, device)
        release(device)
    for architecture in ("llama", "qwen3"):
        with bench.attempt(f"{architecture}, ragged rows"):
            ragged(bench, architecture, device)
        release(device)
    for dtype in HEAD:
        with bench.attempt(f"head, {dtype}"):
            head(bench, dtype, device)
        release(device)


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a model computes for a micro-batch."""

    logps: Tensor
    """Float[N], log-probs of all scored tokens, sequence after sequence."""
    gradient: Tensor
    """Gradients of all parameters, flat."""

    def apart(self, other: "Outputs") -> tuple[float, float]:
        """(largest difference of log-probs, relative difference of the gradients in norm)."""
        gap = float((self.logps - other.logps).abs().max())
        return gap, float((self.gradient - other.gradient).norm() / other.gradient.norm())


def model_of(architecture: str, device: torch.device) -> ScoringModel:
    """A random model with wide weights, so that attention is far from uniform."""
    sizes = {"architecture": architecture, "hidden_size": 128, "layers": 2, "heads": 4, "kv_heads": 2}
    cfg = TinyModel.model_validate(sizes)
    model = build(cfg, 0, AutoModelForCausalLM, **MODELS[architecture])
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(3.0)
    return ScoringModel(model, head="lm").to(device).train()


def pairs(draw: random.Random, count: int, prompt: int, answer: int) -> list[SequenceGroup]:
    def tokens(most: int) -> np.ndarray:
        return np.array([draw.randrange(8, 200) for _ in range(draw.randint(max(1, most // 2), most))])

    def branch() -> Branch:
        ids = tokens(answer)
        return Branch(ids, np.ones(len(ids), np.bool_))

    return [SequenceGroup(i, tokens(prompt), (branch(), branch())) for i in range(count)]


def outputs(model: ScoringModel, rows: MicroBatch, device: torch.device) -> Outputs:
    """Log-probs, and gradients of a sum in which every sequence has a different weight."""
    model.zero_grad()
    logps = run_forward(model, MicroBatchTensors.of(rows, device)).values
    (logps * torch.cos(torch.tensor(rows.sequence, device=device) + 1.0)).sum().backward()
    by_sequence = [
        values for branches in by_branch(rows, logps.detach().float().cpu().numpy()) for values in branches
    ]
    gradient = torch.cat([p.grad.float().flatten().cpu() for p in model.parameters() if p.grad is not None])
    return Outputs(torch.from_numpy(np.concatenate(by_sequence)), gradient)


def equal(bench: Bench, architecture: str, device: torch.device) -> None:
    """In fp32 equal to rounding; in bf16 about as near to fp32 as padded rows in bf16."""
    groups = pairs(random.Random(1), 3, 120, 120)
    row, padded = pack(groups, "prefix_shared", one_row=True), pack(groups, "padded")
    model = model_of(architecture, device)
    truth = outputs(model, padded, device)
    bench.below(
        f"{architecture} fp32, one row off padded rows: log-probs, gradients",
        outputs(model, row, device).apart(truth),
        EXACT,
    )
    blind = outputs(model, replace(row, branch=np.zeros_like(row.branch)), device).apart(truth)
    bench.above(f"{architecture} fp32, control: answers that see each other", blind[0], 1e-2)
    placed(model, device, torch.bfloat16)
    noise, noise_slope = outputs(model, padded, device).apart(truth)
    gap, slope = outputs(model, row, device).apart(truth)
    bench.below(
        f"{architecture} bf16, one row off fp32: same, in units of padded rows",
        (gap / noise, slope / noise_slope),
        NOISE,
    )


def ragged(bench: Bench, architecture: str, device: torch.device) -> None:
    """Counts the graphs for a run's shapes, with gradients and without, after a reset of Dynamo.

    A call that would run uncompiled is an error by itself."""
    torch._dynamo.reset()
    draw, model = random.Random(2), model_of(architecture, device)
    placed(model, device, torch.bfloat16 if device.type == "cuda" else torch.float32)
    before, lengths = (
        compiled_attention().compilations,
        (20, 200, 1000) if device.type == "cuda" else (20, 60),
    )
    for index in range(MICRO_BATCHES):
        groups = pairs(draw, draw.randint(1, 4), draw.choice(lengths), draw.choice(lengths))
        rows = MicroBatchTensors.of(pack(groups, "prefix_shared", one_row=True), device)
        if index % 3 == 2:
            with torch.no_grad():
                run_forward(model.eval(), rows)
        else:
            run_forward(model.train(), rows).values.sum().backward()
    bench.below(
        f"{architecture}: graphs for {MICRO_BATCHES} ragged micro-batches",
        compiled_attention().compilations - before,
        MAX_COMPILATIONS,
    )


def head(bench: Bench, dtype: torch.dtype, device: torch.device) -> None:
    """Compares log-probs and gradients of the chunked head at a real vocabulary with fp64."""
    count, hidden = (5000, 512) if device.type == "cuda" else (100, 32)
    torch.manual_seed(0)
    rows = torch.randn(count, hidden, device=device).to(dtype).requires_grad_()
    linear = nn.Linear(hidden, VOCABULARY, bias=False, device=device)
    nn.init.normal_(linear.weight, std=hidden**-0.5)
    linear = linear.to(dtype)
    targets = torch.randint(VOCABULARY, (count,), device=device)
    weights = torch.cos(torch.arange(count, device=device))
    logps = ScoredHead(linear, HeadSpec())(rows, targets)[0]
    (logps * weights).sum().backward()
    assert rows.grad is not None and linear.weight.grad is not None
    exact, exact_rows, exact_weight = exactly(rows, linear.weight, targets, weights)
    limit, slope_limit = HEAD[dtype]
    name = f"head, {str(dtype).removeprefix('torch.')}, V={VOCABULARY}, N={count}"
    bench.below(f"{name}, off fp64: log-probs", float((logps.detach().double() - exact).abs().max()), limit)
    slopes = relative(rows.grad, exact_rows), relative(linear.weight.grad, exact_weight)
    bench.below(f"{name}, off fp64: gradients of states, weight", slopes, slope_limit)


def relative(value: Tensor, truth: Tensor) -> float:
    return float((value.double() - truth).norm() / truth.norm())


def exactly(
    rows: Tensor, weight: Tensor, targets: Tensor, weights: Tensor, chunk: int = 500
) -> tuple[Tensor, Tensor, Tensor]:
    """(log-probs, d sum / d rows, d sum / d weight) in fp64."""
    precise = weight.detach().double().requires_grad_()
    parts: list[Tensor] = []
    grads: list[Tensor] = []
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        states = rows[part].detach().double().requires_grad_()
        logps = torch.log_softmax(states @ precise.t(), -1).gather(1, targets[part, None])[:, 0]
        (logps * weights[part]).sum().backward()
        assert states.grad is not None
        parts.append(logps.detach())
        grads.append(states.grad)
    assert precise.grad is not None
    return torch.cat(parts), torch.cat(grads), precise.grad
