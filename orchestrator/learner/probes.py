"""Start-up checks of what could be wrong without an error, and probes that measure the device."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from orchestrator.core.batches import Floats, LossUnits, MicroBatch
from orchestrator.learner.memory import device_bytes
from orchestrator.learner.rank_learner import RankLearner
from orchestrator.learner.state import full_weights
from orchestrator.models.block_attention import compiled_attention
from orchestrator.models.forward import head_gap, run_forward
from orchestrator.models.precision import precision_of
from orchestrator.models.rows import MicroBatchTensors


@dataclass(frozen=True, slots=True)
class Gap:
    """Difference between two ways to compute the same log-probs (or rewards, or values) of tokens, and its
    size relative to rounding."""

    rms: float
    """Root mean square over tokens, in nat."""
    largest: float
    """Largest absolute difference of a token, in nat."""
    roundings: float
    """The difference in units of what one more rounding of each layer's output changes: the larger of the
    two ratios, NaN if a value is NaN. It does not depend on the length of the answers, nor on how sensitive
    the model is."""

    @classmethod
    def of(cls, difference: Floats, control: Floats) -> "Gap":
        """difference: Float[N] between the two ways; control: Float[N] between rounded and plain outputs."""
        rms, largest = _size(difference)
        unit_rms, unit_largest = _size(control)
        return cls(rms, largest, float(np.max([rms / (unit_rms + TINY), largest / (unit_largest + TINY)])))

    def __str__(self) -> str:
        return (
            f"{self.rms:.1e} nat a token, at most {self.largest:.1e}, {self.roundings:.1f} times what "
            "rounding does"
        )


TINY = 1e-8
"""Smallest difference in nat that is compared, also where rounding changes nothing."""


def _size(values: Floats) -> tuple[float, float]:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean())), float(np.abs(values).max())


def worst(gaps: Sequence[Gap]) -> Gap:
    """The largest of several ranks' gaps: one with a NaN if there is any."""
    return max(gaps, key=lambda gap: (np.isnan(gap.roundings), gap.roundings))


def start_gaps(learner: RankLearner, chosen: MicroBatch | None, padded: MicroBatch) -> tuple[Gap, Gap]:
    """Two gaps: the chosen layout against padded rows, and our chunked log-probs (or rewards) against the
    model's own logits. A collective.

    chosen: None if the chosen layout is padded rows. The second gap is 0 for a critic, whose head is ours.
    """
    plain = _values(learner, padded)
    with rounded(learner):
        control = _values(learner, padded) - plain
    layout = Gap(0.0, 0.0, 0.0) if chosen is None else Gap.of(_values(learner, chosen) - plain, control)
    if learner.algorithm.head == "value":
        return layout, Gap(0.0, 0.0, 0.0)
    difference = head_gap(learner.scoring, MicroBatchTensors.of(padded, learner.device))
    return layout, Gap.of(difference.float().cpu().numpy(), control)


@torch.no_grad()
def _values(learner: RankLearner, micro_batch: MicroBatch) -> Floats:
    """The model's output for each token (or each sequence: rewards), in the order (sequence, position) for
    every layout."""
    learner.scoring.eval()
    learner.scoring.dropout.off()
    result = run_forward(learner.engine, MicroBatchTensors.of(micro_batch, learner.device))
    values = result.values.float().cpu().numpy()
    return (
        values.ravel()
        if result.rewards is not None
        else values[np.lexsort((micro_batch.score_at, micro_batch.sequence))]
    )


@contextmanager
def rounded(learner: RankLearner) -> Iterator[None]:
    """Rounds the output of the embedding and of each layer once more: each value is off by up to half a unit
    of the training precision, each by another amount. Rows of another length or number often change nothing
    at all, so they cannot be the control."""
    size = 2.0**-24 if precision_of(learner.spec.recipe.learners.precision).exact else 2.0**-8
    draw = torch.Generator(learner.device).manual_seed(0)

    def again(module: nn.Module, inputs: Any, output: Any) -> Any:
        values, *rest = output if isinstance(output, tuple) else (output,)
        noise = 2.0 * torch.rand(values.shape, generator=draw, device=values.device) - 1.0
        values = (values.float() * (1.0 + size * noise)).to(values.dtype)
        return (values, *rest) if isinstance(output, tuple) else values

    model = learner.scoring.hugging_face
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    hooks = [module.register_forward_hook(again) for module in (model.get_input_embeddings(), *layers)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def probe_peak(learner: RankLearner, micro_batch: MicroBatch, units: LossUnits) -> int:
    """Peak bytes of a forward and backward of one micro-batch beyond what the process held before the model.
    The gradient is dropped, so the learner does not change. A collective."""
    zeros = np.zeros(len(micro_batch.targets), np.float32)
    probe = replace(micro_batch, ref_logprobs=zeros, coefficients=zeros)  # only the sizes matter
    report = learner.forward_backward([probe, probe], units, step=-1)
    learner.discard()
    return report.peak_bytes


def usable_bytes(learner: RankLearner) -> int:
    """Memory of this rank's device."""
    return device_bytes(learner.device, learner.process_group.world)


def device_kind(learner: RankLearner) -> str:
    """This rank's device: the name of its GPU, or the CPU with its instruction set and threads."""
    if learner.device.type == "cuda":
        return torch.cuda.get_device_name(learner.device)
    return f"cpu {torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()}"


def attention_compilations(learner: RankLearner) -> int:
    """Graphs of attention that this process has compiled so far; 0 if no row needed one."""
    return compiled_attention().compilations


def model_fingerprint(learner: RankLearner) -> str:
    """SHA-256 of the weights this run starts from."""
    return learner.loaded.fingerprint


def adam_steps(learner: RankLearner) -> int:
    """Optimizer steps that were applied. Refused steps and a critic's warm-up make the count differ from the
    schedule's."""
    return learner.engine.optimizer_step()


FP32_PEAKS = (
    *(("H100 NVL", 60e12), ("H100 PCIe", 51e12), ("H100", 67e12), ("H200 NVL", 60e12), ("H200", 67e12)),
    *(("A100", 19.5e12), ("L40S", 91.6e12), ("L4", 30.3e12), ("A10", 31.2e12), ("T4", 8.1e12)),
)
"""Dense fp32 FLOP/s outside the tensor cores, from NVIDIA's data sheets: the limit of matmul precision
"highest". Longer names first."""


def peak_flops(learner: RankLearner) -> float | None:
    """FLOP/s that the device can reach in the training precision: from data sheets for GPUs, from a measured
    matrix product on a CPU."""
    if learner.device.type == "cuda":
        return sheet_flops(torch.cuda.get_device_name(learner.device), learner.spec.recipe.learners.precision)
    return _measured_flops()


def sheet_flops(device: str, precision: str) -> float | None:
    """Peak FLOP/s of a GPU by its name; None for an unknown one. TRL's table has no fp32."""
    from trl.trainer.utils import get_peak_flops

    compute = precision_of(precision)
    if compute.exact:
        return next((peak for name, peak in FP32_PEAKS if name.lower() in device.lower()), None)
    return get_peak_flops(device, str(compute.wire_dtype).removeprefix("torch."))


def _measured_flops(size: int = 768, repeats: int = 3) -> float:
    a, b = torch.rand(size, size), torch.rand(size, size)
    best = float("inf")
    for _ in range(repeats + 1):
        started = time.perf_counter()
        torch.matmul(a, b)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def final_weights(learner: RankLearner) -> dict[str, Floats]:
    """Whole fp32 weights by name on rank 0, and nothing on the others. For `verify`. A collective."""
    return {
        name: weight.numpy() for name, weight in full_weights(learner, keep=learner.process_group.rank == 0)
    }
