"""Stage 4, first part: this project's learner on pairs of real lengths, and the memory that the plan
predicts."""

import time

import torch

from gpu_stages.bench import Bench, Speed, first_line
from gpu_stages.device import peak_flops, release, reserved, settle
from gpu_stages.local import join
from gpu_stages.shapes import Shape, on_device, shapes
from orchestrator.algorithms.table import build
from orchestrator.core.batches import Cut
from orchestrator.core.errors import OutOfMemory
from orchestrator.data.micro_batches import cut_step
from orchestrator.learner.memory import device_bytes
from orchestrator.learner.rank_learner import LearnerSpec, RankLearner
from orchestrator.models.forward import Checkpointing
from orchestrator.plan.memory import MemoryEstimate, MemoryModel
from orchestrator.plan.ways import largest_micro_batch
from orchestrator.recipe.schema import Recipe

STEPS = 3
"""Steps in total. The first warms up, the others are timed, and the quickest counts."""
SETTINGS: tuple[tuple[Checkpointing, bool], ...] = (
    ("none", False),
    ("none", True),
    ("selective", False),
    ("full", False),
)
"""(activation checkpointing, whether norms and feed-forward blocks are compiled). On a CPU nothing is
compiled: it would take a minute of C++."""
PAIRS_AT_ONCE = (8, 4, 2, 1)
LAST_START_S = {"cuda": 12.0, "cpu": 0.0}
"""Longest time of a shape in seconds: with less left, the shape is skipped."""
PLAN_GOAL = 0.15
"""Largest relative difference of the predicted memory from the measured peak."""
FILL = 0.9
"""Largest share of the device's memory that the plan may predict for a setting that is tried."""


def run(bench: Bench) -> None:
    device, peak = torch.device(bench.device), peak_flops(torch.device(bench.device))
    for checkpointing, fused in SETTINGS if not bench.small else [s for s in SETTINGS if not s[1]]:
        setting = ("no checkpointing" if checkpointing == "none" else f"{checkpointing} checkpointing") + (
            ", fused" if fused else ""
        )
        for shape in shapes(bench.device):
            if bench.left_s < LAST_START_S[bench.device]:
                bench.note(f"{shape.name}, {setting}", "left out: no time")
                continue
            with bench.attempt(f"{shape.name}, {setting}"):
                measure(bench, shape, device, shape.recipe(bench.device, checkpointing, fused), setting, peak)
            release(device)


def measure(
    bench: Bench, shape: Shape, device: torch.device, recipe: Recipe, setting: str, peak: float
) -> None:
    largest = largest_that_fits(recipe, shape, device)
    if largest is None:
        bench.note(f"{shape.name}, {setting}", "left out: by the plan not even one pair fits")
        return
    cut, planned = largest
    label = f"{cut.examples} pairs, {setting}"
    try:
        step_s, losses, norm, measured = steps(shape, recipe, cut, device)
    except OutOfMemory as error:
        bench.holds(
            f"{shape.name}, {label}: planned memory",
            False,
            f"{first_line(error)}; planned {planned.total / 1e9:.1f} GB",
            "fits",
        )
        return
    mfu = shape.flops(bench.device, shared=True) / step_s / peak
    gb = (measured / 1e9, reserved(device) / 1e9)
    # torch's allocator does not see CUDA's context
    counted = planned.total - (0 if bench.small else planned.runtime)
    bench.add(
        Speed(
            bench.stage,
            shape.name,
            "ours",
            label,
            shape.tokens / step_s,
            step_s,
            mfu,
            *gb,
            losses,
            norm,
            counted / 1e9,
        )
    )
    if not bench.small:  # a CPU's peak is of resident memory, which a tiny model does not move
        bench.below(
            f"{shape.name}, {label}: planned memory, off the measured",
            abs(counted - measured) / measured,
            PLAN_GOAL,
            goal=True,
        )


def cut_of(recipe: Recipe, pairs: int) -> Cut:
    """The cut with fewest collectives: fp32 on a CPU; bf16 with fp32 master weights and one row per
    micro-batch on a GPU."""
    gpu = bool(recipe.learners.gpus_per_worker)
    return Cut(1, pairs, None, "prefix_shared", zero_stage=int(gpu), sync="no_sync", one_row=gpu)


def largest_that_fits(
    recipe: Recipe, shape: Shape, device: torch.device
) -> tuple[Cut, MemoryEstimate] | None:
    """The largest micro-batch whose predicted memory fits, as the plan would choose; None if no pair fits."""
    model, limit = MemoryModel(recipe, build(recipe.algorithm)), FILL * device_bytes(device, 1)
    for pairs in PAIRS_AT_ONCE:
        cut = cut_of(recipe, pairs)
        planned = model.estimate(
            cut, largest_micro_batch([shape.groups()], cut), recipe.learners.checkpointing
        )
        if planned.peak <= limit and pairs <= shape.pairs // 2:
            return cut, planned
    return None


def steps(
    shape: Shape, recipe: Recipe, cut: Cut, device: torch.device
) -> tuple[float, tuple[float, ...], float, int]:
    """(seconds of the quickest timed step, losses of all steps, norm of the first gradient, peak bytes)."""
    learner = RankLearner(
        LearnerSpec(recipe, cut, STEPS), join(device), device, loaded=on_device(recipe, device)
    )
    batch = cut_step(shape.groups(), cut)
    batch = batch.with_reference((learner.token_logprobs(batch.micro_batches[0]),))
    best, losses, norms, peak = float("inf"), [], [], 0
    for step in range(STEPS):
        settle(device)
        started = time.perf_counter()
        learned = learner.forward_backward(batch.micro_batches[0], batch.units, step)
        applied = learner.optim_step(step)
        settle(device)
        best = min(best, time.perf_counter() - started) if step else best
        losses.append(learned.loss)
        norms.append(applied.grad_norm)
        peak = max(peak, learned.peak_bytes)
    return best, tuple(losses), norms[0], peak
