"""Stage 2: ZeRO stages, offload, dropped gradients and out-of-memory errors do not change an optimizer
step."""

import json
import math
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from gpu_stages.bench import Bench
from gpu_stages.device import release, reserved, settle
from gpu_stages.local import LocalGroup
from gpu_stages.pretend import allow_backward
from gpu_stages.shapes import made_pairs
from orchestrator.core import faults
from orchestrator.core.batches import Cut, PackedBatch
from orchestrator.data.micro_batches import cut_step
from orchestrator.learner.memory import reset_peak
from orchestrator.learner.probes import final_weights
from orchestrator.learner.rank_learner import LearnerSpec
from orchestrator.learner.state import weights_digest
from orchestrator.recipe.schema import Recipe
from orchestrator.run.verify import TOLERANCE, Difference, LossCurve, Verification
from orchestrator.trainers.optimizer_step import Clock, Guards, OptimizerStepper

STEPS, PAIRS, MICRO_BATCH = 3, 16, 4
ANCHOR = {"fp32": 1e-5, "bf16": 3e-2}
"""Largest distance of the first loss from ln 2, its value while policy and reference are equal."""


@dataclass(frozen=True, slots=True)
class Way:
    """One way to cut a step; none may change its result."""

    precision: str
    stage: int
    sync: Any
    offload: str = "none"
    one_row: bool = False

    def __str__(self) -> str:
        more = (
            [self.sync] * bool(self.stage)
            + ["offload"] * (self.offload == "cpu")
            + ["one row"] * self.one_row
        )
        return ", ".join([f"ZeRO {self.stage} {self.precision}", *more])


WAYS = (
    Way("fp32", 0, "no_sync"),
    Way("fp32", 1, "no_sync"),
    Way("bf16", 1, "no_sync"),
    Way("fp32", 2, "coalesced"),
    Way("bf16", 2, "per_micro_batch"),
    Way("fp32", 3, "per_micro_batch"),
    Way("bf16", 3, "per_micro_batch"),
    Way("bf16", 1, "no_sync", "cpu"),
    Way("bf16", 2, "per_micro_batch", "cpu"),
    Way("bf16", 3, "per_micro_batch", "cpu"),
    Way("fp32", 0, "no_sync", one_row=True),
)
"""The ways to compare. On a GPU all of them have micro-batches of one row."""


def run(bench: Bench) -> None:
    device = torch.device(bench.device)
    if bench.small:
        allow_backward()
    group = LocalGroup(device)
    proof = Verification.of(recipe(bench.device, WAYS[0]), STEPS)
    baseline = proof.baseline()
    for way in WAYS:
        with bench.attempt(str(way)):
            compare(bench, proof, baseline, way, group)
    with bench.attempt("policy and reference in bf16"):
        same_start(bench, proof, group)
    with bench.attempt("out of memory"):
        out_of_memory(bench, device)


def recipe(device: str, way: Way, **tiny: int) -> Recipe:
    model = {"architecture": "llama", "hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, **tiny}
    return Recipe.model_validate(
        {
            "model": {"tiny": model},
            "data": {"train": [{"path": "toy:preference", "max_rows": STEPS * PAIRS}]},
            "algorithm": {"name": "dpo"},
            "batch": {"effective": PAIRS, "micro_batch": MICRO_BATCH},
            "optimizer": {"learning_rate": 1e-3},
            "learners": {
                "gpus_per_worker": int(device == "cuda"),
                "precision": way.precision,
                "zero_stage": way.stage,
                "sync": way.sync,
                "offload": {
                    "optimizer": way.offload,
                    "parameters": way.offload if way.stage == 3 else "none",
                },
            },
        }
    )


def cut_of(way: Way, planned: Cut) -> Cut:
    return replace(
        planned,
        examples=MICRO_BATCH,
        positions=None,
        zero_stage=way.stage,
        sync=way.sync,
        one_row=way.one_row or planned.one_row,
    )


def compare(bench: Bench, proof: Verification, baseline: LossCurve, way: Way, group: LocalGroup) -> None:
    """Compares the steps of `way` with plain torch's and the first loss with ln 2, and checks that discard()
    leaves the weights alone."""
    proof = replace(proof, recipe=recipe(bench.device, way))
    cut = cut_of(way, proof.planned)
    curve = proof.under(cut, group)  # pyright: ignore[reportArgumentType]
    difference, limit = baseline.difference(curve, cut), TOLERANCE[way.precision]
    anchor = abs(curve.losses[0] - math.log(2))
    kept = unharmed(proof, cut, group)
    text = (
        f"{apart(difference)}; first loss {anchor:.1e} off ln 2; discard leaves weights "
        f"{'as they are' if kept else 'CHANGED'}"
    )
    ok = difference.within(limit) and anchor <= ANCHOR[way.precision] and kept
    bench.holds(
        f"{way}, off plain steps", ok, text, f"<= {limit:g}; {10 * limit:g}; {ANCHOR[way.precision]:g}"
    )


def apart(difference: Difference) -> str:
    return f"loss {difference.loss:.1e}, norm {difference.grad_norm:.1e}, weights {difference.weights:.1e}"


def unharmed(proof: Verification, cut: Cut, group: LocalGroup) -> bool:
    """Lets the trained learner accumulate a gradient and discard it; True if its weights stay as they
    were."""
    batch = cut_step(proof.steps[0], cut)
    batch = batch.with_reference(group.token_logprobs(batch))
    before = group.call(weights_digest)
    group.forward_backward(batch, STEPS)
    group.discard()
    return group.call(weights_digest) == before


def same_start(bench: Bench, proof: Verification, group: LocalGroup) -> None:
    """Checks that the untrained policy is the reference in bf16, at positions where a rounded rotary
    frequency would be a visible angle."""
    way = WAYS[2]
    low, cut = recipe(bench.device, way), cut_of(way, proof.planned)
    batch = cut_step(made_pairs(2, 500, 500), cut)
    group.build_reference(low)
    reference = group.token_logprobs(batch, reference=True)[0]
    group.build(LearnerSpec(low, cut, 1))
    gaps = [
        float(np.abs(a - b).max()) for a, b in zip(group.token_logprobs(batch)[0], reference, strict=True)
    ]
    bench.below("bf16, 1,000 tokens: policy off reference at the start, nat per token", max(gaps), 1e-4)


def out_of_memory(bench: Bench, device: torch.device) -> None:
    """Checks that a step that is discarded, cut finer and repeated has the loss, gradient norm and weights of
    a step without the error."""
    way = WAYS[2] if bench.device == "cuda" else WAYS[0]
    length = 1024 if bench.device == "cuda" else 16
    proof = replace(
        Verification.of(roomy(bench.device, way), 1), steps=(tuple(made_pairs(PAIRS, length, length)),)
    )
    cut = replace(cut_of(way, proof.planned), examples=PAIRS)
    undisturbed, _ = first_step(proof, cut, device)
    with too_little_memory(proof, cut, device):
        disturbed, notes = first_step(proof, cut, device)
    limit = TOLERANCE[way.precision]
    difference = undisturbed.difference(disturbed, cut)
    text = f"{apart(difference)}; {len(notes)} times finer"
    bench.holds(
        "out of memory, replayed, off undisturbed",
        bool(notes) and difference.within(limit),
        text,
        f">= 1 time, <= {limit:g}",
    )


def roomy(device: str, way: Way) -> Recipe:
    """The recipe with a model that fills gigabytes on a GPU, so that a limit on the memory has an effect."""
    return recipe(
        device,
        way,
        **({"hidden_size": 512, "layers": 4, "heads": 8, "vocab_size": 8192} if device == "cuda" else {}),
    )


def first_step(proof: Verification, cut: Cut, device: torch.device) -> tuple[LossCurve, list[str]]:
    """(the first step as the program takes it, its notes)."""
    group, notes = LocalGroup(device), []
    group.build(LearnerSpec(proof.recipe, cut, 1))

    def attach(batch: PackedBatch) -> PackedBatch:
        # before the first step the policy is the reference
        return batch.with_reference(group.token_logprobs(batch))

    stepper = OptimizerStepper(
        proof.algorithm, group, cut, attach, SimpleNamespace(note=notes.append), Guards()
    )  # pyright: ignore[reportArgumentType]
    done = stepper.step(proof.steps[0], 0, Clock())
    assert done.applied is not None, "the step was refused"
    weights = group.call(final_weights)[0]
    settle(device)
    group.free()
    return LossCurve((done.learned.loss,), (done.applied.grad_norm,), weights), notes


@contextmanager
def too_little_memory(proof: Verification, cut: Cut, device: torch.device) -> Iterator[None]:
    """On a GPU limits memory so that half a micro-batch fits and a whole one does not. On a CPU injects one
    error."""
    if device.type == "cpu":
        with tempfile.TemporaryDirectory(prefix="oom-") as folder:
            once = {"site": "micro_batch", "action": "oom", "step": 0, "once": f"{folder}/happened"}
            os.environ[faults.VARIABLE] = json.dumps([once])
            try:
                yield
            finally:
                del os.environ[faults.VARIABLE]
        return
    limit = (step_bytes(proof, cut, device) + step_bytes(proof, cut.halved(), device)) / 2
    torch.cuda.set_per_process_memory_fraction(
        limit / torch.cuda.get_device_properties(device).total_memory, device
    )
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


def step_bytes(proof: Verification, cut: Cut, device: torch.device) -> int:
    """Bytes that the allocator reserves for the step."""
    release(device)
    reset_peak(device)
    first_step(proof, cut, device)
    return reserved(device)
