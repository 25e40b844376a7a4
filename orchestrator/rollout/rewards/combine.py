"""A rollout batch through all components: what is tried again, what is dropped, and how parts add up.

component --whole batch--> groups without a reward --one by one, `retries` rounds--> Judged
{name: Judged} --combine--> Scoring(total = sum of weight * part, or the group is dropped with its reasons)
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
"""A group asked alone gets at least this part of a round's time, so that a few that hang leave time for the
others."""

REASONS, PLACES = 5, 3
"""What a message names of them."""


@dataclass(frozen=True, slots=True)
class ComponentRewards:
    """A component's word on a batch, by group index: rewards Float[n], or the reason why there are none.
    seconds: it took."""

    rewards: Mapping[int, Floats]
    reasons: Mapping[int, str]
    seconds: float


def score_with_retries(
    component: Component, groups: Sequence[RolloutGroup], *, timeout_s: float, retries: int
) -> ComponentRewards:
    """Asks for the whole batch; then, in each of `retries` rounds, for each group without rewards alone.

    A round begins no call after timeout_s, so that all of it ends within (retries + 1) x timeout_s and the
    restarts that belong to the last calls. Groups that were asked least come first.
    """
    started = time.monotonic()
    rewards: dict[int, Floats] = {}
    reasons: dict[int, str] = {}
    asked = dict.fromkeys(range(len(groups)), 0)

    def ask(which: Sequence[int], limit_s: float) -> None:
        for i, found in zip(which, _ask(component, [groups[i] for i in which], limit_s), strict=True):
            asked[i] += 1
            if isinstance(found, str):
                reasons[i] = found
            else:
                rewards[i] = found
                reasons.pop(i, None)

    ask(range(len(groups)), timeout_s)
    for _ in range(retries):
        waiting = sorted(reasons, key=lambda i: (asked[i], i))
        ends = time.monotonic() + timeout_s
        for i in waiting:
            left = ends - time.monotonic()
            if left <= 0:
                break
            ask([i], min(left, timeout_s / min(SHARES, len(waiting))))
    return ComponentRewards(rewards, reasons, time.monotonic() - started)


def _ask(component: Component, groups: Sequence[RolloutGroup], limit_s: float) -> list[Floats | str]:
    """Float[n] or a reason for each group."""
    try:
        outcomes = component.score(groups, limit_s)
    except RewardFailure as failure:
        return [failure.reason] * len(groups)
    found: list[Floats | str] = []
    start = 0
    for group in groups:
        end = start + len(group.rollouts)
        found.append(_of_group(outcomes[start:end]))
        start = end
    assert start == len(outcomes), f"{component.name} gave {len(outcomes)} outcomes for {start} samples"
    return found


def _of_group(outcomes: Sequence[Outcome]) -> Floats | str:
    failures = [o.reason for o in outcomes if isinstance(o, RewardFailure)]
    return failures[0] if failures else np.array(outcomes, np.float32)


def sum_components(
    groups: Sequence[RolloutGroup], rewards: Rewards, judged: Mapping[str, ComponentRewards]
) -> BatchRewards:
    """Total and parts of each group that every component scored; the others dropped, with the reasons.

    What an environment gave is the part `environment`, with weight 1. RewardsFailed where more than
    rewards.max_dropped_fraction of the groups have no reward.
    """
    weights = {f.name: f.weight for f in rewards.functions}
    scored: list[RewardedGroup] = []
    dropped: list[tuple[str, str]] = []
    for i, group in enumerate(groups):
        found = _from_environment(group)
        reasons = [found] if isinstance(found, str) else []
        reasons += [judged[name].reasons[i] for name in weights if i in judged[name].reasons]
        if not reasons:
            parts = {name: judged[name].rewards[i] for name in weights}
            total = sum(
                (weights[n] * p.astype(np.float64) for n, p in parts.items()), np.zeros(len(group.rollouts))
            )
            if found is not None and not isinstance(found, str):
                parts[ENVIRONMENT] = found
                total = total + found
            if all(is_finite(t) for t in total):
                scored.append(RewardedGroup(group, total.astype(np.float32), parts))
                continue
            reasons = ["the weighted sum of its rewards is not finite"]
        dropped.append((group.prompt.where, "; ".join(reasons)))
    seconds = {name: judged[name].seconds for name in weights}
    _check_dropped(dropped, len(groups), rewards.max_dropped_fraction)
    return BatchRewards(tuple(scored), tuple(f"{where}: {reason}" for where, reason in dropped), seconds)


def _from_environment(group: RolloutGroup) -> Floats | str | None:
    """Float[n] where an environment gave a reward to each sample, None where it gave none at all, else a
    reason."""
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
    """ConfigError where neither a component nor an environment gives a reward."""
    if not rewards.functions and any(
        r.environment_reward is None and r.failure is None for g in groups for r in g.rollouts
    ):
        raise ConfigError(
            "nothing gives a reward",
            why="rewards.functions is empty and the environment gave none",
            fix="add a component to rewards.functions",
        )


def _check_dropped(dropped: Sequence[tuple[str, str]], groups: int, allowed: float) -> None:
    """dropped: where a prompt stands, and why its group has no reward. A reason that many share is told once."""
    if len(dropped) <= allowed * groups:
        return
    places: dict[str, list[str]] = {}
    for where, reason in dropped:
        places.setdefault(reason, []).append(where)
    shown = [f"{_listed(found)}: {reason}" for reason, found in list(places.items())[:REASONS]]
    shown += [f"… and {len(places) - REASONS} other reasons"] if len(places) > REASONS else []
    raise RewardsFailed(
        f"{len(dropped)} of {groups} groups of a rollout batch have no reward; rewards.max_dropped_fraction "
        f"allows {allowed:g}",
        why="\n       ".join(shown),
        fix="mend what is named: the output of a component is in logs/reward-NAME.log of the run folder, an "
        "environment's in logs/rollout-N.log",
    )


def _listed(places: Sequence[str]) -> str:
    """Example: a.jsonl:3, a.jsonl:7, a.jsonl:8 and 5 more."""
    return ", ".join(places[:PLACES]) + (f" and {len(places) - PLACES} more" if len(places) > PLACES else "")
