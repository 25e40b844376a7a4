"""Rollouts from a recording instead of a generator, to debug learning steps.

samples.jsonl of a run --by step--> groups and their rewards
"""

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from orchestrator.core.errors import DataError, MissingInput
from orchestrator.core.files import read_lines
from orchestrator.core.rollouts import (
    BatchRewards,
    Prompt,
    RewardedGroup,
    Rollout,
    RolloutGroup,
    Sampling,
    Span,
    WeightsDelivered,
)


@dataclass(frozen=True, slots=True)
class _Recorded:
    """The groups of one start(), as roles.Pending."""

    groups: tuple[RolloutGroup, ...]

    def result(self) -> tuple[RolloutGroup, ...]:
        return self.groups


class Replay:
    """roles.Generator and roles.Scorer over a samples.jsonl.

    Each start() gives the next recorded rollout batch, whatever it asks for, and score() gives the recorded
    rewards. Versions are the requested ones, so that nothing is stale.
    """

    def __init__(self, steps: Sequence[Sequence[RewardedGroup]], file: Path) -> None:
        self.steps, self.file = deque(steps), file
        self.rewards: dict[tuple[int, int], RewardedGroup] = {}

    @classmethod
    def read(cls, file: str) -> "Replay":
        """MissingInput without the file; DataError if it holds no rollout with its tokens."""
        path = Path(file)
        if not path.is_file():
            raise MissingInput(
                f"rollouts.replay: no file {path}", fix="give the samples.jsonl of an online run"
            )
        by_step: dict[int, list[dict[str, Any]]] = {}
        for number, line in enumerate(read_lines(path), 1):
            if line.get("kind") != "rollout":
                continue
            if "tokens" not in line:
                raise DataError(
                    f"{path}:{number}: the rollout has no tokens",
                    fix="record it again with this version of orchestrator",
                )
            by_step.setdefault(line["step"], []).append(line)
        if not by_step:
            raise DataError(
                f"{path} holds no rollouts",
                why="only an online run records them",
                fix="give the samples.jsonl of an online run",
            )
        return cls([_groups(lines) for _, lines in sorted(by_step.items())], path)

    def start(self, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling, version: int) -> _Recorded:
        if not self.steps:
            raise DataError(
                f"{self.file} holds no more rollout batches",
                why=f"the run needs one for version {version}",
                fix="lower run.max_steps",
            )
        recorded = self.steps.popleft()
        groups = []
        for item in recorded:
            rollouts = tuple(_with_version(r, version) for r in item.group.rollouts)
            group = RolloutGroup(item.group.prompt, item.group.draw, rollouts)
            self.rewards[_key(group)] = RewardedGroup(group, item.rewards, item.parts)
            groups.append(group)
        return _Recorded(tuple(groups))

    def score(self, groups: Sequence[RolloutGroup]) -> BatchRewards:
        return BatchRewards(tuple(self.rewards.pop(_key(group)) for group in groups))

    def spans(self) -> list[Span]:
        return []


def _key(group: RolloutGroup) -> tuple[int, int]:
    """(version, draw): draws count from 0 in each recorded batch."""
    return group.rollouts[0].version, group.draw


class NoSync:
    """roles.WeightSync of a replay, which has no generator to send weights to."""

    def publish(self, version: int) -> WeightsDelivered:
        return WeightsDelivered(version, 0, 0.0, 0, "none")


def _groups(lines: Sequence[Mapping[str, Any]]) -> list[RewardedGroup]:
    """The groups of a step. Lines of a group have rising samples; the next group begins at sample 0."""
    groups: list[list[Mapping[str, Any]]] = []
    for line in lines:
        if not groups or line["sample"] <= groups[-1][-1]["sample"]:
            groups.append([])
        groups[-1].append(line)
    return [_group(index, members) for index, members in enumerate(groups)]


def _group(draw: int, lines: Sequence[Mapping[str, Any]]) -> RewardedGroup:
    first = lines[0]
    columns = {} if first.get("answer") is None else {"answer": first["answer"]}
    prompt = Prompt(
        first["prompt_id"],
        f"replay:{draw}",
        0,
        np.array(first["tokens"]["prompt"], np.int64),
        first["prompt"],
        columns,
    )
    rollouts = tuple(
        Rollout(
            sample=line["sample"],
            version=line["version"],
            ids=np.array(line["tokens"]["ids"], np.int64),
            loss_mask=np.array(line["tokens"]["scored"], np.bool_),
            logprobs=np.array(line["tokens"]["logprobs"], np.float32),
            finish=line["finish"],
            completion=line["completion"],
            kept=np.array(line["tokens"]["kept"], np.float32) if "kept" in line["tokens"] else None,
        )
        for line in lines
    )
    rewards = np.array([line["scores"]["reward"] for line in lines], np.float32)
    names = [n for n in first["scores"] if n != "reward"]
    return RewardedGroup(
        RolloutGroup(prompt, draw, rollouts),
        rewards,
        {n: np.array([x["scores"][n] for x in lines], np.float32) for n in names},
    )


def _with_version(rollout: Rollout, version: int) -> Rollout:
    return replace(rollout, version=version)
