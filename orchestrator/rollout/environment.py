"""What an environment is, and how the recipe's one is loaded."""

import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from orchestrator.core.errors import ConfigError
from orchestrator.core.user_code import load_module

Messages = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Turn:
    """What an environment says to a completion: its messages, whether the episode is over, and a reward
    (summed up)."""

    messages: Messages = field(default_factory=list)
    done: bool = False
    reward: float = 0.0


class Environment(Protocol):
    """One episode with the model. A new object is made for every rollout.

    Example: orchestrator/rollout/environments/calculator.py, a tool that the model may call before it
    answers.
    """

    def reset(self, row: Mapping[str, Any]) -> Messages:
        """The conversation that the episode begins with; row: `prompt` and the other columns of the data. The
        same row must always give the same messages: the samples of a prompt share it."""
        ...

    def step(self, completion: str) -> Turn:
        """Answers the model's turn."""
        ...


Factory = Callable[[], Environment]


def load_environment(spec: str) -> Factory:
    """The class named by `module:Class` or `file.py:Class`; ConfigError where there is none or its module
    cannot be loaded."""
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ConfigError(
            f"rollouts.environment: {spec!r} names no class", fix="write module:Class or file.py:Class"
        )
    if place.endswith(".py") and not Path(place).is_file():
        raise ConfigError(
            f"rollouts.environment: no file {place}", fix="give a path relative to where you start the run"
        )
    try:
        module = load_module(place)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"rollouts.environment: {error}", fix="install it, or give a file.py:Class"
        ) from error
    except (Exception, SystemExit) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        said = f"{type(error).__name__} at {where.filename}:{where.lineno}: {error}"
        raise ConfigError(
            f"rollouts.environment: {place} cannot be loaded", why=said, fix="import it on its own to see why"
        ) from error
    factory = getattr(module, name, None)
    if not callable(getattr(factory, "reset", None)) or not callable(getattr(factory, "step", None)):
        raise ConfigError(
            f"rollouts.environment: {place} has no class {name} with reset and step",
            fix="see orchestrator.rollout.episodes.Environment",
        )
    return factory  # pyright: ignore[reportReturnType]
