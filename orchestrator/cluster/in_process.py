"""A run in this process, without Ray: for breakpoints, profilers and notebooks. The numbers are those of a
run with one worker and one actor.

    LocalRank._each --verb--> Rank --> RankLearner
    LocalRollouts.start --> RolloutWorker
    LocalRewards.score --> the reward functions themselves
"""

import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from orchestrator.cluster.deadlines import Deadlines
from orchestrator.cluster.ranks import Rank, Ranks
from orchestrator.cluster.scorer import ComponentScorer
from orchestrator.core.errors import OutOfMemory
from orchestrator.core.rollouts import Prompt, RolloutGroup, Sampling, Span, WeightsDelivered
from orchestrator.learner.weights import flat_buckets
from orchestrator.models.weight_buckets import Bucket, checksum
from orchestrator.recipe.schema import Learners, Model, Recipe, RewardFunction, Rewards
from orchestrator.rollout.rewards.combine import ComponentRewards, score_with_retries
from orchestrator.rollout.rewards.component import Component, Outcome, RewardCall, invoke, validate_rewards
from orchestrator.rollout.rewards.lookup import check_rewards, resolve
from orchestrator.rollout.rewards.reward_model import RewardModel
from orchestrator.rollout.worker import RolloutWorker


class LocalRank(Ranks):
    """The only rank. An exception is raised where it happened: it is not translated, and nothing is tried
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
            error.in_place = error.in_place and self._can_replay()
            raise

    def __enter__(self) -> "LocalRank":
        return self

    def __exit__(self, *_: object) -> None:
        """The process group stays: the next run in this process takes it over."""
        self.rank.learner = None


@dataclass(frozen=True, slots=True)
class FinishedGroups:
    """roles.Pending of groups that are sampled already."""

    groups: tuple[RolloutGroup, ...]

    def result(self) -> tuple[RolloutGroup, ...]:
        return self.groups


class LocalRollouts:
    """roles.Generator and roles.WeightSync: one engine beside the learner that it takes its weights from."""

    def __init__(self, recipe: Recipe, policy: LocalRank) -> None:
        self.recipe, self.policy = recipe, policy
        self.worker = RolloutWorker(recipe, _device(recipe.rollouts.gpus))
        self._spans: list[Span] = []

    def start(
        self, prompts: Sequence[tuple[int, Prompt]], sampling: Sampling, version: int
    ) -> FinishedGroups:
        """Samples the groups before it returns."""
        began = time.perf_counter()
        groups = self.worker.roll_out(prompts, sampling, version)
        self._spans.append(Span(0, began, time.perf_counter(), version))
        return FinishedGroups(tuple(groups))

    def spans(self) -> Sequence[Span]:
        spans, self._spans = self._spans, []
        now = time.perf_counter()
        return spans or [Span(0, now, now, -1)]

    def publish(self, version: int) -> WeightsDelivered:
        """Copies the weights to the engine, in the buckets that they would travel in."""
        began, sizes = time.perf_counter(), []
        buckets = []
        for plan, flat in flat_buckets(self.policy.rank.learner, int(self.recipe.rollouts.bucket_mb * 1e6)):
            flat = flat.cpu()
            buckets.append(Bucket(plan.entries, flat.numpy(), checksum(flat)))
            sizes.append(plan.size)
        self.worker.engine.load(version, buckets)
        return WeightsDelivered(version, sum(sizes), time.perf_counter() - began, len(sizes), "in_process")


class LocalFunction:
    """A component (rewards.Component) whose function is called here: a breakpoint in it stops the run. It has
    no separate process and no time limit."""

    def __init__(self, function: RewardFunction) -> None:
        self.name, self._written, self._function = function.name, function.function, resolve(function)

    def score(self, groups: Sequence[RolloutGroup], timeout_s: float) -> list[Outcome]:
        call = RewardCall.of(groups)
        rewards = invoke(self.name, self._function, call.given_to(self._written))
        return validate_rewards(self.name, rewards, call.samples)


class LocalRewards(ComponentScorer):
    """Scores with one component after the other."""

    def __init__(self, rewards: Rewards, policy: Model) -> None:
        super().__init__(rewards)
        check_rewards(rewards)
        self.policy = policy
        self.components = [self._component(function) for function in rewards.functions]

    def _component_rewards(self, groups: Sequence[RolloutGroup]) -> Mapping[str, ComponentRewards]:
        limits = {"timeout_s": self.rewards.timeout_s, "retries": self.rewards.retries}
        return {c.name: score_with_retries(c, groups, **limits) for c in self.components}

    def _model(self, function: RewardFunction) -> Component:
        rows, device = self.rewards.batch_size, _device(function.gpus)
        return RewardModel(function, policy=self.policy, batch_size=rows, device=device)

    def _function(self, function: RewardFunction) -> Component:
        return LocalFunction(function)


def _device(gpus: float) -> torch.device:
    return torch.device("cuda" if gpus else "cpu")
