"""Stage 3: the program as users start it, with Ray: GRPO with both decoders, every transport of weights, a
killed worker."""

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch

from gpu_stages.bench import Bench
from gpu_stages.shapes import made_pairs
from orchestrator.core import faults
from orchestrator.recipe.schema import Recipe

SMALL = {
    "tracking": {"wandb": "off"},
    "data": {"train": [{"path": "toy:preference", "max_rows": 64}]},
    "model": {"tiny": {"architecture": "llama", "hidden_size": 64, "layers": 2, "heads": 4}},
    "batch": {"effective": 16},
    "optimizer": {"learning_rate": 1e-3},
}
REWARD = "def even(completions, **_):\n    return [sum(map(ord, text)) % 2 for text in completions]\n"
"""A reward that random policies earn half of the time."""
GAP = {"cuda": 1e-3, "cpu": 1e-4}
"""Largest gap between the generator's log-probs and the learner's, in nat per token, in fp32 with different
kernels on each side."""


def run(bench: Bench) -> None:
    import ray

    from orchestrator.cluster.joining import connect

    # a short name: the path of a socket below it has 107 characters at most
    with tempfile.TemporaryDirectory(prefix="o") as ray_folder:
        os.environ["RAY_TMPDIR"] = ray_folder
        os.environ.pop("RAY_ADDRESS", None)
        connect()
        try:
            with bench.attempt("GRPO, static"):
                grpo(bench, "static")
            with bench.attempt("transports of weights"):
                transports(bench)
            with bench.attempt("killed worker"):
                killed_worker(bench)
            with bench.attempt("GRPO, continuous"):
                grpo(bench, "continuous")
        finally:
            ray.shutdown()


def shares(bench: Bench) -> dict[str, Any]:
    """Sections for a learner and a rollout actor on one GPU, or on half a CPU each."""
    half = {"gpus_per_worker": 0.5} if bench.device == "cuda" else {"cpus_per_worker": 0.5}
    return {
        "learners": {"workers": 1, **half},
        "rollouts": {"workers": 1, "placement": "colocated", "batching": "static", **half},
    }


def recipe_with(bench: Bench, **sections: Mapping[str, Any]) -> Recipe:
    """A recipe from SMALL, the resources of this machine, and `sections`."""
    base = {**SMALL, **shares(bench)}
    return Recipe.model_validate(
        {**base, **{name: {**base.get(name, {}), **keys} for name, keys in sections.items()}}
    )


def trained(bench: Bench, name: str, recipe: Recipe) -> Path:
    """Trains and returns the run folder; the output is in a text file beside it."""
    from rich.console import Console

    from orchestrator.run.supervise import train

    with (bench.work / f"{name}.txt").open("w") as output:
        return train(recipe, bench.work / name, Console(file=output, width=200)).folder


def grpo(bench: Bench, batching: str) -> None:
    """Takes some steps; the generator's log-probs must be the learner's."""
    reward, steps = bench.work / "reward.py", 2 if bench.small else 4
    reward.write_text(REWARD)
    recipe = recipe_with(
        bench,
        run={"max_steps": steps},
        data={"train": "toy:prompts"},
        algorithm={"name": "grpo"},
        rollouts={"batching": batching, "prompts": 4, "samples": 4, "max_new_tokens": 8},
        rewards={"functions": [{"name": "even", "function": f"{reward}:even"}]},
    )
    lines = metrics(trained(bench, f"grpo-{batching}", recipe))
    finite = [line for line in lines if math.isfinite(line["loss"])]
    bench.holds(
        f"GRPO, {batching}: steps with a finite loss", len(finite) == steps, str(len(finite)), str(steps)
    )
    gap = max(line["policy/train_rollout_gap"] for line in lines)
    bench.below(f"GRPO, {batching}: generator from learner, nat per token", gap, GAP[bench.device])


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if not any(name.startswith("eval/") for name in line)]


def transports(bench: Bench) -> None:
    """Sends new weights through every transport: the actor's must equal the learner's, bit by bit."""
    from orchestrator.cluster.learner_group import LearnerGroup
    from orchestrator.cluster.rollout_pool import RolloutPool
    from orchestrator.cluster.weight_sync import BroadcastSync, CudaIpcSync, ObjectStoreSync
    from orchestrator.core.batches import Cut
    from orchestrator.core.rollouts import Prompt, Sampling
    from orchestrator.data.micro_batches import cut_step
    from orchestrator.learner.rank_learner import LearnerSpec

    recipe = recipe_with(bench, algorithm={"name": "orpo"}, rollouts={"max_new_tokens": 4})
    cut = Cut(workers=1, examples=2, positions=None, layout="padded", zero_stage=0, sync="no_sync")
    kinds: list[Callable[..., Any]] = [
        ObjectStoreSync,
        BroadcastSync,
        *([CudaIpcSync] if bench.device == "cuda" else []),
    ]
    work = [(0, Prompt(0, "", 0, np.arange(1, 6), ""))]
    with (
        LearnerGroup(recipe.learners, colocated=recipe.rollouts) as group,
        RolloutPool(recipe, reservation=group.reservation) as pool,
    ):
        group.build(LearnerSpec(recipe, cut, len(kinds)))
        seen = set()
        for version, kind in enumerate(kinds):
            group.forward_backward(cut_step(made_pairs(4, 4, 4), cut), version)
            group.optim_step(version)
            delivered = kind(group, pool, 64_000).publish(version)
            pool.start(work, Sampling(samples=1, max_new_tokens=4), version).result()
            sent, held = group.call(learner_digest)[0], pool.call(actor_digest)[0]
            seen.add(sent)
            text = (
                f"{delivered.bytes / 1e6:.2f} MB in {delivered.seconds:.2f} s, "
                f"{'equal' if sent == held else 'other weights'}"
            )
            bench.holds(f"weights by {kind.__name__}", sent == held, text, "bit by bit")
        bench.holds(
            "versions of weights that differ", len(seen) == len(kinds), str(len(seen)), str(len(kinds))
        )


def digest(named: Iterator[tuple[str, torch.Tensor]]) -> str:
    sha256 = hashlib.sha256()
    for name, tensor in sorted(named):
        sha256.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return sha256.hexdigest()


def learner_digest(learner: Any) -> str:
    """Digest of a learner's weights by Hugging Face name. Runs in the learner's process."""
    from orchestrator.learner.state import full_weights

    names = learner.scoring.hf_names()
    return digest((names[name], weight) for name, weight in full_weights(learner))


def actor_digest(worker: Any) -> str:
    return digest(iter(worker.engine.model.named_parameters()))


def killed_worker(bench: Bench) -> None:
    """Kills a learner in step 3 of 5: the run resumes from the last checkpoint and must end with the weights
    of an undisturbed run."""
    folders = {}
    for name in ("calm", "killed"):
        recipe = recipe_with(
            bench,
            run={"max_steps": 5},
            algorithm={"name": "dpo"},
            checkpoint={"every": 2},
            reference={"cache_dir": str(bench.work / "reference")},
        )
        with planned_fault(bench.work / "happened") if name == "killed" else nullcontext():
            folders[name] = trained(bench, name, recipe)
    happened = (bench.work / "happened").exists()
    calm, killed = (weights(folder) for folder in folders.values())
    apart = max(float(np.abs(calm[name] - killed[name]).max()) for name in calm)
    equal = happened and apart <= (
        1e-5 if bench.device == "cuda" else 0.0
    )  # a GPU's backward may add in another order
    text = ("bitwise equal" if apart == 0.0 else f"{apart:.1e} apart") + (
        "" if happened else ", but no worker was killed"
    )
    bench.holds("weights after a killed worker", equal, text, "bitwise" if bench.small else "<= 1e-05")


def weights(folder: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return {
        name: value
        for path in sorted((folder / "export").glob("*.safetensors"))
        for name, value in load_file(path).items()
    }


@contextmanager
def planned_fault(marker: Path) -> Iterator[None]:
    os.environ[faults.VARIABLE] = json.dumps(
        [{"site": "micro_batch", "action": "kill", "step": 3, "rank": 0, "once": str(marker)}]
    )
    try:
        yield
    finally:
        del os.environ[faults.VARIABLE]
