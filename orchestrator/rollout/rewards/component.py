"""One call of one component of the reward: what it is given, and what of its answer counts as a reward.

    groups -> RewardCall(prompts, completions, completion_ids, columns) --invoke--> anything --judge--> Outcome per sample

A reward is never invented: whatever is not one finite number for each sample is a RewardFailure that says
what came instead.
"""

import asyncio
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, Protocol, TypeAlias

import numpy as np

from orchestrator.core.errors import OrchestratorError
from orchestrator.core.rollouts import RolloutGroup
from orchestrator.rollout.rewards.lookup import GIVEN, check_rewards

__all__ = [
    "Component",
    "Outcome",
    "RewardCall",
    "RewardFailure",
    "check_rewards",
    "invoke",
    "validate_rewards",
]


class RewardFailure(OrchestratorError):
    """A component gave no reward: for one sample, or for all that it was asked about."""

    @property
    def reason(self) -> str:
        """What and why on one line, for the list of dropped groups."""
        return f"{self.what} ({self.why})" if self.why else self.what


Outcome: TypeAlias = float | RewardFailure
"""What came out for one sample."""


class Component(Protocol):
    """One part of the reward, of whatever kind."""

    @property
    def name(self) -> str: ...

    def score(self, groups: Sequence[RolloutGroup], timeout_s: float) -> list[Outcome]:
        """An outcome per sample, group after group; raises RewardFailure where nothing came for any of them
        in time."""
        ...


@dataclass(frozen=True, slots=True)
class RewardCall:
    """What a component is asked, one entry per sample: a prompt and its columns are repeated for each of its
    samples.

    samples: "file:line, sample k" for messages. Columns that a prompt lacks are None for its samples.
    Example: a prompt at q.jsonl:3 with two samples and {"answer": "4"}: samples ("q.jsonl:3, sample 0",
    "q.jsonl:3, sample 1"), columns {"answer": ["4", "4"]}.
    """

    prompts: Sequence[Any]
    completions: Sequence[Any]
    completion_ids: Sequence[Sequence[int]]
    samples: Sequence[str]
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, groups: Sequence[RolloutGroup]) -> "RewardCall":
        """Columns that bear the name of an argument, or TRL's singular of one, are left out, as in TRL."""
        pairs = [(g.prompt, r) for g in groups for r in g.rollouts]
        names = dict.fromkeys(
            name for g in groups for name in g.prompt.columns if name not in (*GIVEN, "prompt", "completion")
        )
        return cls(
            [p.text for p, _ in pairs],
            [r.completion for _, r in pairs],
            [r.ids.tolist() for _, r in pairs],
            [f"{p.where}, sample {r.sample}" for p, r in pairs],
            {name: [p.columns.get(name) for p, _ in pairs] for name in names},
        )

    def __len__(self) -> int:
        return len(self.samples)

    def chunks(self, size: int) -> Iterator["RewardCall"]:
        """The call cut into calls of at most `size` samples."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            columns = {name: values[part] for name, values in self.columns.items()}
            yield RewardCall(
                self.prompts[part],
                self.completions[part],
                self.completion_ids[part],
                self.samples[part],
                columns,
            )

    def given_to(self, function: str | None) -> "RewardCall":
        """As the function of this name (`trl:NAME`, a file's, ours) wants it."""
        return self.for_trl() if (function or "").startswith("trl:") else self

    def for_trl(self) -> "RewardCall":
        """As TRL's own functions want it: completions as messages, and the answers under `solution` too."""
        messages = [
            [{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in self.completions
        ]
        answers = {"solution": self.columns["answer"]} if "answer" in self.columns else {}
        return RewardCall(
            self.prompts, messages, self.completion_ids, self.samples, {**answers, **self.columns}
        )


def invoke(name: str, function: Callable[..., Any], call: RewardCall) -> Any:
    """function(prompts=, completions=, completion_ids=, **columns), awaited if it is async; only what the
    function takes.

    Bound options win over columns of the same name. RewardFailure where the function needs what the data
    lacks; what the function raises goes through.
    """
    bound = getattr(function, "keywords", {})
    given: dict[str, Any] = {k: v for k, v in call.columns.items() if k not in bound}
    given |= {"prompts": call.prompts, "completions": call.completions, "completion_ids": call.completion_ids}
    result = function(**_taken(name, function, given))
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Any) -> Any:
    return await result


def _taken(name: str, function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    try:
        signature = inspect.signature(function)
    except ValueError:  # a function of C without one
        return given
    parameters = signature.parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        given = {k: v for k, v in given.items() if k in signature.parameters}
    try:
        signature.bind(**given)
    except TypeError as error:
        raise RewardFailure(
            f"reward {name}: the function cannot be called with what there is",
            why=str(error),
            fix="it is given prompts, completions, completion_ids and the columns of the data, by name",
        ) from None
    return given


def validate_rewards(name: str, answer: Any, samples: Sequence[str]) -> list[Outcome]:
    """The rewards in a component's answer, a failure for each entry that is none; RewardFailure where it is
    no list of them."""
    if hasattr(answer, "tolist"):  # numpy and torch
        answer = answer.tolist()
    if not isinstance(answer, list | tuple):
        raise RewardFailure(
            f"reward {name} returned {_shown(answer)}, not a list of numbers",
            fix="return one number per completion",
        )
    if len(answer) != len(samples):
        raise RewardFailure(
            f"reward {name} returned {len(answer)} rewards for {len(samples)} completions",
            fix="return one number per completion",
        )
    return [_outcome(name, value, sample) for value, sample in zip(answer, samples, strict=True)]


def _outcome(name: str, value: Any, sample: str) -> Outcome:
    number = value
    if not isinstance(value, Real) and getattr(value, "ndim", None) == 0:  # a scalar of numpy or torch
        number = value.item()
    if not isinstance(number, Real | np.bool_):
        return RewardFailure(f"reward {name} of {sample} is {_shown(value)}, not a number")
    try:
        reward = float(number)
    except OverflowError:
        reward = math.inf
    if not is_finite(reward):
        return RewardFailure(f"reward {name} of {sample} is {reward:g}, not a finite number")
    return reward


def is_finite(reward: float) -> bool:
    """True where it is still a finite number in fp32, as rewards are kept."""
    return abs(reward) <= float(np.finfo(np.float32).max)


def _shown(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
