"""One call of one component of the reward: its arguments, and which answers count as rewards.

    groups -> RewardCall(prompts, completions, completion_ids, columns) --invoke--> any answer
           --validate_rewards--> one Outcome per sample

A reward is never invented: whatever is not one finite number per sample is a RewardFailure that names what
came instead.
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
    """A component gave no reward, for one sample or for all samples of a call."""

    @property
    def reason(self) -> str:
        """What and why on one line, for the list of dropped groups."""
        return f"{self.what} ({self.why})" if self.why else self.what


Outcome: TypeAlias = float | RewardFailure
"""Result for one sample."""


class Component(Protocol):
    """One part of the reward, of any kind."""

    @property
    def name(self) -> str: ...

    def score(self, groups: Sequence[RolloutGroup], timeout_s: float) -> list[Outcome]:
        """One outcome per sample, group after group; RewardFailure if none came in time for any of them."""
        ...


@dataclass(frozen=True, slots=True)
class RewardCall:
    """Arguments of a component, with one entry per sample.

    A prompt and its columns are repeated for each of its samples. Example: a prompt at q.jsonl:3 with two
    samples and {"answer": "4"} has samples ("q.jsonl:3, sample 0", "q.jsonl:3, sample 1") and columns
    {"answer": ["4", "4"]}.
    """

    prompts: Sequence[Any]
    """Text, or a list of messages."""
    completions: Sequence[Any]
    """Text if the prompt is text, else a list of messages."""
    completion_ids: Sequence[Sequence[int]]
    samples: Sequence[str]
    """Place of each sample, for messages."""
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    """Other columns of the rows; None for samples whose row lacks it."""

    @classmethod
    def of(cls, groups: Sequence[RolloutGroup]) -> "RewardCall":
        """The call for these groups. As in TRL, it leaves out columns that have the name of an argument."""
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
        """Calls of at most `size` samples each."""
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
        """The call as this function needs it: see `for_trl` if it is `trl:NAME`, else unchanged."""
        return self.for_trl() if (function or "").startswith("trl:") else self

    def for_trl(self) -> "RewardCall":
        """The call as TRL's functions need it: completions as messages, and `answer` as `solution` too."""
        messages = [
            [{"role": "assistant", "content": c}] if isinstance(c, str) else c for c in self.completions
        ]
        answers = {"solution": self.columns["answer"]} if "answer" in self.columns else {}
        return RewardCall(
            self.prompts, messages, self.completion_ids, self.samples, {**answers, **self.columns}
        )


def invoke(name: str, function: Callable[..., Any], call: RewardCall) -> Any:
    """function(prompts=, completions=, completion_ids=, **columns), awaited if it is async.

    The function gets only the arguments that it takes. Bound options win over columns of the same name.
    RewardFailure if it needs a column that the data lacks; what the function raises is not caught.
    """
    bound = getattr(function, "keywords", {})
    given: dict[str, Any] = {k: v for k, v in call.columns.items() if k not in bound}
    given |= {"prompts": call.prompts, "completions": call.completions, "completion_ids": call.completion_ids}
    result = function(**_accepted(name, function, given))
    return asyncio.run(_awaited(result)) if inspect.isawaitable(result) else result


async def _awaited(result: Any) -> Any:
    return await result


def _accepted(name: str, function: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    try:
        signature = inspect.signature(function)
    except ValueError:  # a C function has no signature
        return given
    parameters = signature.parameters.values()
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        given = {k: v for k, v in given.items() if k in signature.parameters}
    try:
        signature.bind(**given)
    except TypeError as error:
        raise RewardFailure(
            f"reward {name}: the function cannot be called with the given arguments",
            why=str(error),
            fix="it is given prompts, completions, completion_ids and the columns of the data, by name",
        ) from None
    return given


def validate_rewards(name: str, answer: Any, samples: Sequence[str]) -> list[Outcome]:
    """One outcome per sample: the reward, or a failure for an entry that is not a finite number.

    RewardFailure if the answer is not a list with one entry per sample.
    """
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
    """Whether the reward is finite in fp32, in which rewards are kept."""
    return abs(reward) <= float(np.finfo(np.float32).max)


def _shown(value: Any) -> str:
    return "None" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
