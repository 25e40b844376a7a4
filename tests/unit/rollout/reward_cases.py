"""Groups to score, for tests of rewards."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orchestrator.core.rollouts import Prompt, Rollout, RolloutGroup
from orchestrator.recipe.schema import RewardFunction, Rewards


def group(
    i: int,
    completions: Sequence[Any],
    *,
    columns: Mapping[str, Any] | None = None,
    text: Any = None,
    environment: Sequence[float | None] | None = None,
) -> RolloutGroup:
    """The group of the prompt at q.jsonl:i+1; token ids are the bytes of the text."""
    given = environment or [None] * len(completions)
    rollouts = tuple(_rollout(k, c, given[k]) for k, c in enumerate(completions))
    text = text if text is not None else f"question {i}"
    return RolloutGroup(Prompt(i, f"q.jsonl:{i + 1}", 0, _ids(text), text, columns or {}), i, rollouts)


def batch(*texts: Sequence[str]) -> list[RolloutGroup]:
    """A group per list of completions."""
    return [group(i, completions) for i, completions in enumerate(texts)]


def rewards(*functions: RewardFunction, **options: Any) -> Rewards:
    return Rewards(functions=list(functions), **options)


def function(name: str, written: str, **options: Any) -> RewardFunction:
    return RewardFunction(name=name, function=written, **options)


def _rollout(k: int, completion: Any, environment: float | None) -> Rollout:
    ids = _ids(completion)
    return Rollout(
        k,
        0,
        ids,
        np.ones(len(ids), np.bool_),
        np.zeros(len(ids), np.float32),
        "stop",
        completion,
        environment_reward=environment,
    )


def _ids(text: Any) -> Any:
    whole = text if isinstance(text, str) else "".join(m["content"] for m in text)
    return np.frombuffer(whole.encode(), np.uint8).astype(np.int64)
