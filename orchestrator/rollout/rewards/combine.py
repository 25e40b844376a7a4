"""Scores a rollout batch with all components: what is tried again, what is dropped, how parts add up.

component --whole batch--> groups without rewards --one by one, `retries` rounds--> ComponentRewards
{name: ComponentRewards} --sum_components--> BatchRewards (total = sum of weight * part; groups without
                                             a reward are dropped with the reasons)
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from orchestrator.core.batches import Floats
from orchestrator.core.errors import ConfigError, RewardsFailed
from orchestrator.core.rollouts import BatchRewards, RewardedGroup, RolloutGroup
from orchestrator.recipe.schema import Rewards
from orchestrator.rollout.rewards.component import Component, Outcome, RewardFailure, is_finite
from orchestrator.rollout.rewards.lookup import ENVIRONMENT

SHARES = 4
"""A group that is tried alone gets at least 1/SHARES of a round's time, so that a few that hang leave time
for the others."""

REASONS, PLACES = 5, 3
"""Most reasons, and most places of each, in a message."""


@dataclass(frozen=True, slots=True)
class ComponentRewards:
    """What one component gave for a batch."""

    rewards: Mapping[int, Floats]
    """Group index -> Float[n], one reward per sample."""
    reasons: Mapping[int, str]
    """Group index -> why the group has no rewards."""
    seconds: float
    """Time that all rounds took."""


def score_with_retries(
    component: Component, groups: Sequence[RolloutGroup], *, timeout_s: float, retries: int
) -> ComponentRewards:
    """Scores the whole batch; then, in each of `retries` rounds, each group without rewards alone.

    A round begins no call after timeout_s, so all rounds end within (retries + 1) x timeout_s and the
    restarts that belong to the last calls. Groups that were tried least come first.
    """
    started = time.monotonic()
    rewards: dict[int, Floats] = {}
    reasons: dict[int, str] = {}
    tries = dict.fromkeys(range(len(groups)), 0)

    def attempt(indices: Sequence[int], limit_s: float) -> None:
        results = _score_groups(component, [groups[i] for i in indices], limit_s)
        for i, result in zip(indices, results, strict=True):
            tries[i] += 1
            if isinstance(result, str):
                reasons[i] = result
            else:
                rewards[i] = result
                reasons.pop(i, None)

    attempt(range(len(groups)), timeout_s)
    for _ in range(retries):
        waiting = sorted(reasons, key=lambda i: (tries[i], i))
        deadline = time.monotonic() + timeout_s
        for i in waiting:
            seconds_left = deadline - time.monotonic()
            if seconds_left <= 0:
                break
            attempt([i], min(seconds_left, timeout_s / min(SHARES, len(waiting))))
    return ComponentRewards(rewards, reasons, time.monotonic() - started)


def _score_groups(component: Component, groups: Sequence[RolloutGroup], limit_s: float) -> list[Floats | str]:
    """Float[n] for each group, or why it has no rewards."""
    try:
        outcomes = component.score(groups, limit_s)
    except RewardFailure as failure:
        return [failure.reason] * len(groups)
    results: list[Floats | str] = []
    start = 0
    for group in groups:
        end = start + len(group.rollouts)
        results.append(_group_rewards(outcomes[start:end]))
        start = end
    assert start == len(outcomes), f"{component.name} gave {len(outcomes)} outcomes for {start} samples"
    return results


def _group_rewards(outcomes: Sequence[Outcome]) -> Floats | str:
    """Float[n] if every sample has a reward, else the first reason."""
    failures = [o.reason for o in outcomes if isinstance(o, RewardFailure)]
    return failures[0] if failures else np.array(outcomes, np.float32)


def sum_components(
    groups: Sequence[RolloutGroup], rewards: Rewards, components: Mapping[str, ComponentRewards]
) -> BatchRewards:
    """Total and parts of each group that every component scored; other groups are dropped with the reasons.

    The part `environment` holds what an environment gave, with weight 1. RewardsFailed if more than
    rewards.max_dropped_fraction of the groups have no reward.
    """
    weights = {f.name: f.weight for f in rewards.functions}
    scored: list[RewardedGroup] = []
    dropped: list[tuple[str, str]] = []
    for i, group in enumerate(groups):
        given = _environment_rewards(group)
        reasons = [given] if isinstance(given, str) else []
        reasons += [components[name].reasons[i] for name in weights if i in components[name].reasons]
        if not reasons:
            parts = {name: components[name].rewards[i] for name in weights}
            total = sum(
                (weights[n] * p.astype(np.float64) for n, p in parts.items()), np.zeros(len(group.rollouts))
            )
            if given is not None and not isinstance(given, str):
                parts[ENVIRONMENT] = given
                total = total + given
            if all(is_finite(t) for t in total):
                scored.append(RewardedGroup(group, total.astype(np.float32), parts))
                continue
            reasons = ["the weighted sum of its rewards is not finite"]
        dropped.append((group.prompt.where, "; ".join(reasons)))
    seconds = {name: components[name].seconds for name in weights}
    _check_dropped(dropped, len(groups), rewards.max_dropped_fraction)
    return BatchRewards(tuple(scored), tuple(f"{where}: {reason}" for where, reason in dropped), seconds)


def _environment_rewards(group: RolloutGroup) -> Floats | str | None:
    """Float[n] if an environment gave each sample a reward, None if it gave none at all, else a reason."""
    for rollout in group.rollouts:
        if rollout.failure is not None:
            return f"the environment failed on sample {rollout.sample}: {rollout.failure}"
    given = [r.environment_reward for r in group.rollouts]
    if all(value is None for value in given):
        return None
    for rollout in group.rollouts:
        value = rollout.environment_reward
        if value is None or not is_finite(value):
            return (
                f"the environment gave sample {rollout.sample} "
                f"{'no reward' if value is None else f'the reward {value:g}'}"
            )
    return np.array(given, np.float32)


def check_any(groups: Sequence[RolloutGroup], rewards: Rewards) -> None:
    """ConfigError if neither a component nor an environment gives a reward."""
    if not rewards.functions and any(
        r.environment_reward is None and r.failure is None for g in groups for r in g.rollouts
    ):
        raise ConfigError(
            "nothing gives a reward",
            why="rewards.functions is empty and the environment gave none",
            fix="add a component to rewards.functions",
        )


def _check_dropped(dropped: Sequence[tuple[str, str]], groups: int, allowed: float) -> None:
    """RewardsFailed if too many are dropped: (place of the prompt, reason). Equal reasons are joined."""
    if len(dropped) <= allowed * groups:
        return
    places: dict[str, list[str]] = {}
    for where, reason in dropped:
        places.setdefault(reason, []).append(where)
    shown = [f"{_listed(where)}: {reason}" for reason, where in list(places.items())[:REASONS]]
    shown += [f"… and {len(places) - REASONS} other reasons"] if len(places) > REASONS else []
    raise RewardsFailed(
        f"{len(dropped)} of {groups} groups of a rollout batch have no reward; rewards.max_dropped_fraction "
        f"allows {allowed:g}",
        why="\n       ".join(shown),
        fix="fix what is named: logs/reward-NAME.log in the run folder holds the output of a component, "
        "logs/rollout-N.log that of an environment",
    )


def _listed(places: Sequence[str]) -> str:
    """Example: a.jsonl:3, a.jsonl:7, a.jsonl:8 and 5 more."""
    return ", ".join(places[:PLACES]) + (f" and {len(places) - PLACES} more" if len(places) > PLACES else "")
