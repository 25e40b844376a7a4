"""Losses and advantages that a recipe names by file or module: `algorithm.loss`, `algorithm.advantage`.

scores, units --the user's function--> a sum of losses, divided once by a global count --> LossSum
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from orchestrator.algorithms.losses.advantages import AdvantageEstimator, Episodes
from orchestrator.algorithms.losses.interface import LossSum, Objective, TokenScores
from orchestrator.core.batches import LossUnits
from orchestrator.core.errors import ConfigError
from orchestrator.core.user_code import load_function

LOSS, ADVANTAGE = "algorithm.loss", "algorithm.advantage"


@dataclass(frozen=True, slots=True)
class OwnLoss:
    """A loss of the user's own in the place of an algorithm's.

    function(scores: TokenScores, units: LossUnits) returns a scalar with a gradient: the sum of the losses of
    what it is given, divided by a count of the whole effective batch (`units`), never by one of the
    micro-batch. Or it returns a LossSum, to report metrics as well.
    """

    place: str
    """`file.py:function` or `module:function`."""
    function: Callable[[TokenScores, LossUnits], Any]
    """What stands there."""
    usual: Objective
    """The algorithm's own objective: it gives the usual metrics, without a gradient."""

    @classmethod
    def load(cls, place: str, usual: Objective) -> "OwnLoss":
        """MissingInput or ConfigError if `place` holds no function."""
        return cls(place, load_function(LOSS, place), usual)

    def __call__(self, scores: TokenScores, units: LossUnits) -> LossSum:
        value = self.function(scores, units)
        if isinstance(value, LossSum):
            return value
        if not isinstance(value, Tensor) or value.ndim != 0:
            given = (
                f"a tensor of shape {tuple(value.shape)}"
                if isinstance(value, Tensor)
                else type(value).__name__
            )
            raise ConfigError(
                f"{LOSS}: {self.place} returned {given}",
                why="a loss is one number: the sum over what it was given, divided by a count of `units`",
                fix="return e.g. losses.sum() / units.examples",
            )
        with torch.no_grad():
            usual = self.usual(scores, units)
        per_example = {name: column for name, column in usual.per_example.items() if name != "loss"}
        return replace(usual, total=value, per_example=per_example)


def own_advantage(place: str) -> AdvantageEstimator:
    """Advantages by the user's function(episodes: Episodes).

    It returns Float[N], one advantage per token, or Float[G, n], one per completion; with a critic
    (advantages Float[N], returns Float[N]). MissingInput or ConfigError if `place` holds no function.
    """
    function = load_function(ADVANTAGE, place)

    def estimate(episodes: Episodes) -> tuple[Tensor, Tensor | None]:
        value = function(episodes)
        advantages, returns = value if isinstance(value, tuple) else (value, None)
        tokens = sum(episodes.lengths)
        if isinstance(advantages, Tensor) and advantages.shape == episodes.rewards.shape:
            advantages = advantages.flatten().repeat_interleave(torch.tensor(episodes.lengths))
        if not isinstance(advantages, Tensor) or advantages.shape != (tokens,):
            groups, samples = episodes.rewards.shape
            shape = tuple(advantages.shape) if isinstance(advantages, Tensor) else type(advantages).__name__
            raise ConfigError(
                f"{ADVANTAGE}: {place} returned {shape}",
                why=f"this rollout batch has {groups} x {samples} completions of {tokens} tokens",
                fix=f"return a tensor of shape ({groups}, {samples}) or ({tokens},)",
            )
        if episodes.values is not None and returns is None:
            raise ConfigError(
                f"{ADVANTAGE}: {place} returned no returns",
                why="a critic learns from them",
                fix="return (advantages, returns)",
            )
        return advantages, returns

    return estimate
