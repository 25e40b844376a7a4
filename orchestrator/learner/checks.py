"""What is easily wrong in silence, looked at once at start-up, and probes that measure instead of assume."""

import time
from dataclasses import replace

import numpy as np
import torch

from orchestrator.learner.learner import RankLearner
from orchestrator.learner.memory import device_bytes
from orchestrator.learner.state import full_weights
from orchestrator.models.block_attention import compiled_attention
from orchestrator.models.scoring import MicroBatchTensors, head_gap, scored
from orchestrator.records import Floats, LossUnits, MicroBatch


def layout_gap(learner: RankLearner, chosen: MicroBatch, padded: MicroBatch) -> float:
    """Largest difference of a sequence's log-prob (or reward) between two layouts of the same examples. A collective."""
    return float(np.abs(_sums(learner, chosen) - _sums(learner, padded)).max())


def _sums(learner: RankLearner, micro_batch: MicroBatch) -> Floats:
    learner.scoring.eval()
    with torch.no_grad():
        result = scored(learner.engine, MicroBatchTensors.of(micro_batch, learner.device))
    values = result.values.float().cpu().numpy()
    if result.rewards is not None:
        return values.ravel()
    sums = np.zeros(len(micro_batch) * micro_batch.branches, np.float32)
    np.add.at(sums, micro_batch.sequence, values)
    return sums


def head_check(learner: RankLearner, padded: MicroBatch) -> float:
    """Largest difference of our chunked log-probs from the model's own logits; 0.0 for reward heads. A collective."""
    if learner.algorithm.head != "lm":
        return 0.0
    learner.scoring.eval()
    return head_gap(learner.scoring, MicroBatchTensors.of(padded, learner.device))


def probe_peak(learner: RankLearner, micro_batch: MicroBatch, units: LossUnits) -> int:
    """Peak bytes of a forward and backward of one micro-batch beyond what the process held before the model; the
    gradient is dropped, nothing has changed after. A collective."""
    nothing = np.zeros(len(micro_batch.targets), np.float32)
    probe = replace(micro_batch, ref_logprobs=nothing, coefficients=nothing)  # only the size of things is asked for
    report = learner.forward_backward([probe, probe], units, step=-1)
    learner.discard()
    return report.peak_bytes


def usable_bytes(learner: RankLearner) -> int:
    """Memory of this rank's device."""
    return device_bytes(learner.device, learner.group.world)


def attention_compilations(learner: RankLearner) -> int:
    """Graphs of attention that this process has compiled so far; 0 where no row needed any."""
    return compiled_attention().compilations


def model_fingerprint(learner: RankLearner) -> str:
    """SHA-256 of the weights this run starts from."""
    return learner.loaded.fingerprint


def adam_steps(learner: RankLearner) -> int:
    """Optimizer steps that were applied; refused ones and a critic's warm-up make it differ from the schedule's count."""
    return learner.engine.optimizer_step()


def peak_flops(learner: RankLearner) -> float | None:
    """FLOP/s the device could reach in the training precision: TRL's table for GPUs, a measured matrix product on a CPU."""
    if learner.device.type == "cuda":
        from trl.trainer.utils import get_peak_flops

        low = {"fp32": "float32", "fp16": "float16"}.get(learner.spec.recipe.learners.precision, "bfloat16")
        return get_peak_flops(torch.cuda.get_device_name(learner.device), low)
    return _measured_flops()


def _measured_flops(size: int = 768, repeats: int = 3) -> float:
    a, b = torch.rand(size, size), torch.rand(size, size)
    best = float("inf")
    for _ in range(repeats + 1):
        started = time.perf_counter()
        torch.matmul(a, b)
        best = min(best, time.perf_counter() - started)
    return 2.0 * size**3 / best


def final_weights(learner: RankLearner) -> dict[str, Floats]:
    """Whole fp32 weights by name on rank 0, nothing elsewhere: for `verify`. A collective."""
    weights = {name: weight.numpy() for name, weight in full_weights(learner)}
    return weights if learner.group.rank == 0 else {}
