"""A run in this process, without Ray: for breakpoints, profilers and notebooks. The numbers are those of one
worker and one actor.

Ranks._each --a call--> Rank --> RankLearner     LocalRollouts.start --> RolloutWorker     LocalRewards.score --> the functions themselves
"""

import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.cluster.deadlines import Deadlines
from orchestrator.cluster.ranks import Rank, Ranks
from orchestrator.core.errors import OutOfMemory
from orchestrator.core.rollouts import BatchRewards, Prompt, RolloutGroup, Sampling, Span, WeightsDelivered
from orchestrator.learner.weights import flat_buckets
from orchestrator.models.weight_buckets import Bucket, checksum
from orchestrator.recipe.schema import Learners, Model, Recipe, RewardFunction, Rewards
from orchestrator.rollout.rewards.combine import check_any, score_with_retries, sum_components
from orchestrator.rollout.rewards.component import Component, Outcome, RewardCall, invoke, validate_rewards
from orchestrator.rollout.rewards.http import HttpReward
from orchestrator.rollout.rewards.lookup import check_rewards, resolve
from orchestrator.rollout.rewards.reward_model import RewardModel
from orchestrator.rollout.worker import RolloutWorker


class LocalRank(Ranks):
    """The only rank. What it raises is raised where it happened: nothing is translated, nothing is tried
    again."""

    def __init__(self, learners: Learners) -> None:
        self.world = 1
        self.rank = Rank(0, _device(learners.gpus))
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        deadlines = Deadlines(learners.start_timeout_s, learners.timeout_s, 0)
        self.rank.join(1, "127.0.0.1", port, deadlines.collective_s)

    def _each(self, verb: str, arguments: Sequence[tuple[Any, ...]]) -> list[Any]:
        try:
            return [self.rank.do(verb, *own) for own in arguments]
        except OutOfMemory as error:
            error.in_place = error.in_place and self._holds_back()
            raise

    def __enter__(self) -> "LocalRank":
        return self

    def __exit__(self, *_: object) -> None:
        """The process group stays: the next run in this process takes it over."""
        self.rank.learner = None


@dataclass(frozen=True, slots=True)
class Done:
    """roles.Pending of what was done at once."""

    groups: tuple[RolloutGroup, ...]

    def result(self) -> tuple[RolloutGroup, ...]:
        return self.groups


class LocalRollouts:
    """roles.Generator and roles.WeightBridge: one engine beside the learner that it takes its weights from."""

    def __init__(self, recipe: Recipe, policy: LocalRank) -> None:
        self.recipe, self.policy = recipe, policy
        self.worker = RolloutWorker(recipe, _device(recipe.rollouts.gpus))
        self._spans: list[Span] = []

    def start(self, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling, version: int) -> Done:
        began = time.perf_counter()
        groups = self.worker.roll_out(prompts, sampling, version)
        self._spans.append(Span(0, began, time.perf_counter(), version))
        return Done(tuple(groups))

    def spans(self) -> Sequence[Span]:
        spans, self._spans = self._spans, []
        now = time.perf_counter()
        return spans or [Span(0, now, now, -1)]

    def publish(self, version: int) -> WeightsDelivered:
        """Copies the weights over, in the buckets that they would travel in."""
        began, sizes = time.perf_counter(), []
        buckets = []
        for plan, flat in flat_buckets(self.policy.rank.learner, int(self.recipe.rollouts.bucket_mb * 1e6)):
            flat = flat.cpu()
            buckets.append(Bucket(plan.entries, flat.numpy(), checksum(flat)))
            sizes.append(plan.size)
        self.worker.engine.load(version, buckets)
        return WeightsDelivered(version, sum(sizes), time.perf_counter() - began, len(sizes), "in_process")


class LocalFunction:
    """A component (rewards.Component) that is called here: a breakpoint in it stops the run. No process of
    its own, no time limit."""

    def __init__(self, function: RewardFunction) -> None:
        self.name, self._written, self._function = function.name, function.function, resolve(function)

    def score(self, groups: Sequence[RolloutGroup], timeout_s: float) -> list[Outcome]:
        call = RewardCall.of(groups)
        return validate_rewards(
            self.name, invoke(self.name, self._function, call.given_to(self._written)), call.samples
        )


class LocalRewards:
    """roles.Scorer: the components one after the other."""

    def __init__(self, rewards: Rewards, policy: Model) -> None:
        check_rewards(rewards)
        self.rewards, self.policy = rewards, policy
        self.components = [self._component(function) for function in rewards.functions]

    def score(self, groups: Sequence[RolloutGroup]) -> BatchRewards:
        check_any(groups, self.rewards)
        if not groups:
            return BatchRewards(())
        limits = {"timeout_s": self.rewards.timeout_s, "retries": self.rewards.retries}
        return sum_components(
            groups, self.rewards, {c.name: score_with_retries(c, groups, **limits) for c in self.components}
        )

    def _component(self, function: RewardFunction) -> Component:
        if function.url is not None:
            return HttpReward(
                function,
                batch_size=self.rewards.batch_size,
                environment=os.environ,
                retry=self.rewards.retries > 0,
            )
        if function.model is not None:
            return RewardModel(
                function,
                policy=self.policy,
                batch_size=self.rewards.batch_size,
                device=_device(function.gpus),
            )
        return LocalFunction(function)


def _device(gpus: float) -> torch.device:
    return torch.device("cuda" if gpus else "cpu")
