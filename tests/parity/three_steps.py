"""Our side of test_three_steps: trains jobs on one rank in this process, one after the other, through the
product's own parts.

# [{name, recipe, folder, rollouts or null}]; writes folder/ours.safetensors
python -m tests.parity.three_steps JOBS.json
"""

import json
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file

from orchestrator.algorithms.table import AlgorithmSpec, build
from orchestrator.core.batches import Cut, SequenceGroup
from orchestrator.core.rollouts import Prompt, RewardedGroup, Rollout, RolloutGroup
from orchestrator.data.micro_batches import cut_step
from orchestrator.learner.engine import ProcessGroup
from orchestrator.learner.state import full_weights
from orchestrator.recipe.schema import Recipe
from orchestrator.run.inputs import read_data
from orchestrator.trainers.experience import ExperienceInputs, make_experience
from orchestrator.trainers.two_pass import with_coefficients
from tests.unit.trainers.conftest import OneRank

CUT = Cut(1, 3, None, "prefix_shared", 0, "no_sync")
"""Micro-batches of three examples, so that the step is cut with a remainder."""


def as_group(index: int, said: dict[str, Any]) -> RewardedGroup:
    """A prompt's completions and rewards as the generator and the scorer hand them over."""
    prompt = Prompt(index, f"made:{index}", 0, np.array(said["prompt_ids"], np.int64), said["prompt"])
    rollouts = tuple(
        Rollout(
            k,
            0,
            np.array(ids, np.int64),
            np.ones(len(ids), np.bool_),
            np.array(logps, np.float32),
            "stop",
            "",
        )
        for k, (ids, logps) in enumerate(zip(said["completion_ids"], said["logprobs"], strict=True))
    )
    return RewardedGroup(RolloutGroup(prompt, index, rollouts), np.array(said["rewards"], np.float32))


def learned_from(
    recipe: Recipe, algorithm: AlgorithmSpec, policy: OneRank, said: Sequence[dict[str, Any]]
) -> tuple[SequenceGroup, ...]:
    scored = [as_group(i, one) for i, one in enumerate(said)]
    kl = recipe.algorithm.kl
    in_reward = kl.coefficient if kl.place == "reward" else 0.0
    needs = ExperienceInputs(in_reward > 0, algorithm.needs_reference, in_reward, "k1")
    return make_experience(scored, [g.rewards for g in scored], algorithm, needs, policy, None, CUT).groups


def train(job: dict[str, Any], group: ProcessGroup) -> None:
    recipe = Recipe.model_validate(job["recipe"])
    algorithm, steps = build(recipe.algorithm, recipe.rollouts), recipe.run.max_steps
    assert steps is not None
    policy = OneRank(group, recipe, CUT, total_steps=steps)
    rows, effective = () if job["rollouts"] else read_data(recipe, algorithm).groups, recipe.batch.effective
    for step in range(steps):
        groups = rows[
            step * effective : (step + 1) * effective
        ]  # in the file's order, as TRL is told to take them
        if job["rollouts"]:
            groups = learned_from(recipe, algorithm, policy, job["rollouts"][step])
        batch = cut_step(groups, CUT)
        if algorithm.needs_reference and rows:
            batch = batch.with_reference(policy.token_logprobs(batch, reference=True))
        if algorithm.couples_batch:
            batch, _ = with_coefficients(batch, policy, algorithm, step)
        policy.forward_backward(batch, step)
        assert policy.optim_step(step).applied
    names = policy.rank.scoring.hf_names()
    save_file(
        {names[name]: weight.numpy() for name, weight in full_weights(policy.rank)},
        Path(job["folder"]) / "ours.safetensors",
    )


def main() -> None:
    torch.set_num_threads(1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = ProcessGroup(0, 1, "127.0.0.1", port, 60.0)
    group.join(torch.device("cpu"))
    for job in json.loads(Path(sys.argv[1]).read_text()):
        train(job, group)


if __name__ == "__main__":
    main()
