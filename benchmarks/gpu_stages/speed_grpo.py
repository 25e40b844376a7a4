"""Stage 4, last part: one GRPO step with the transformers engine, by phases, in one process: publish,
generate, learn."""

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import TypeVar

import numpy as np
import torch

from gpu_stages.bench import Bench
from gpu_stages.device import settle
from gpu_stages.local import LocalGroup
from gpu_stages.shapes import on_device
from orchestrator.algorithms.table import build
from orchestrator.core.batches import Cut
from orchestrator.core.rollouts import Prompt, RewardedGroup, RolloutGroup, Sampling
from orchestrator.learner.rank_learner import LearnerSpec
from orchestrator.learner.weights import flat_buckets
from orchestrator.models.weight_buckets import Bucket, checksum
from orchestrator.plan.ways import CPU_POSITIONS
from orchestrator.recipe.schema import Recipe
from orchestrator.rollout.worker import RolloutWorker
from orchestrator.trainers.experience import ExperienceInputs, make_experience
from orchestrator.trainers.optimizer_step import Clock, Guards, OptimizerStepper

T = TypeVar("T")
QWEN_0B5 = {
    "architecture": "qwen2",
    "hidden_size": 896,
    "layers": 24,
    "heads": 14,
    "kv_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151936,
}
TINY = {"architecture": "llama", "hidden_size": 64, "layers": 2, "heads": 4}
PROMPT = 64
BUCKET_BYTES = 256 << 20
STEPS = 2
"""Steps in total; the first one warms up."""
GAP = {"cuda": 0.05, "cpu": 1e-4}
"""Largest gap between the generator's and the learner's log-probs, in nat per token. bf16 on a GPU, where the
program warns above this value."""


def run(bench: Bench) -> None:
    device = torch.device(bench.device)
    with bench.attempt("GRPO"):
        grpo(bench, recipe_of(bench.device), device)


def recipe_of(device: str) -> Recipe:
    gpu = device == "cuda"
    return Recipe.model_validate(
        {
            "model": {"tiny": QWEN_0B5 if gpu else TINY},
            "data": {"train": "none"},
            "algorithm": {"name": "grpo"},
            "optimizer": {"learning_rate": 1e-6, "max_grad_norm": None},
            "learners": {"precision": "bf16" if gpu else "fp32", "gpus_per_worker": int(gpu)},
            "rollouts": {
                "samples": 8,
                "max_new_tokens": 128 if gpu else 8,
                "rows_at_once": 64,
                "gpus_per_worker": int(gpu),
            },
        }
    )


def grpo(bench: Bench, recipe: Recipe, device: torch.device) -> None:
    """Takes two steps; the second samples with the weights of the first."""
    gpu = bench.device == "cuda"
    cut = Cut(1, None, 16384 if gpu else CPU_POSITIONS, "prefix_shared", int(gpu), "no_sync", one_row=gpu)
    group = LocalGroup(device)
    group.build(LearnerSpec(recipe, cut, STEPS), on_device(recipe, device))
    algorithm, worker = build(recipe.algorithm, recipe.rollouts), RolloutWorker(recipe, device)
    stepper = OptimizerStepper(
        algorithm, group, cut, lambda batch: batch, SimpleNamespace(note=print), Guards()
    )  # pyright: ignore[reportArgumentType]
    draw, inputs = np.random.default_rng(0), ExperienceInputs(False, False, 0.0, "k3")
    prompts = [Prompt(i, "", 0, draw.integers(8, 200, PROMPT), "") for i in range(8)]
    sampling = Sampling(recipe.rollouts.samples, recipe.rollouts.max_new_tokens)
    for step in range(STEPS):
        publish_s, _ = timed(lambda version=step: publish(group, worker, version), device)
        generate_s, groups = timed(
            lambda version=step: worker.roll_out(list(enumerate(prompts)), sampling, version), device
        )
        scored = [RewardedGroup(g, rewards(g)) for g in groups]
        rewarded = [s.rewards for s in scored]
        data = make_experience(scored, rewarded, algorithm, inputs, group, None, cut)  # pyright: ignore
        learn_s, outcome = timed(lambda at=step, data=data: stepper.step(data.groups, at, Clock()), device)
    tokens = sum(len(rollout.ids) for g in groups for rollout in g.rollouts)
    text = (
        f"{tokens} tokens: publish {publish_s:.2f} s, generate {generate_s:.2f} s "
        f"({tokens / generate_s:.0f} tok/s), learn {learn_s:.2f} s"
    )
    bench.note("*GRPO step" + (" at 0.5B" if gpu else ""), text)
    gap = outcome.learned.means["policy/train_rollout_gap"].value
    bench.below("GRPO: generator from learner, nat per token", gap, GAP[bench.device])


def timed(work: Callable[[], T], device: torch.device) -> tuple[float, T]:
    started = time.perf_counter()
    result = work()
    settle(device)
    return time.perf_counter() - started, result


def publish(group: LocalGroup, worker: RolloutWorker, version: int) -> None:
    """Sends the learner's weights to the generator, as the object store would."""
    flats = ((plan, flat.cpu()) for plan, flat in flat_buckets(group.held, BUCKET_BYTES))
    worker.engine.load(version, (Bucket(plan.entries, flat.numpy(), checksum(flat)) for plan, flat in flats))


def rewards(group: RolloutGroup) -> np.ndarray:
    """Share of even tokens in each completion, Float[n]."""
    return np.array([np.mean(rollout.ids % 2 == 0) for rollout in group.rollouts], np.float32)
