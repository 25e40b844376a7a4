"""The Protocol of an environment, and the loader of the recipe's."""

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
    """What an environment returns for a completion."""

    messages: Messages = field(default_factory=list)
    """Messages that follow the completion, before the model's next turn."""
    done: bool = False
    """Whether the episode is over."""
    reward: float = 0.0
    """Reward of this turn; an episode's is the sum."""


class Environment(Protocol):
    """One episode with the model. Every rollout gets a new object.

    Example: orchestrator/rollout/environments/calculator.py, a tool that the model may call before it
    answers.
    """

    def reset(self, row: Mapping[str, Any]) -> Messages:
        """The conversation that the episode begins with.

        `row` has `prompt` and the other columns of the data. The same row must always give the same messages,
        since the samples of a prompt share it.
        """
        ...

    def step(self, completion: str) -> Turn:
        """The answer to the model's turn."""
        ...


Factory = Callable[[], Environment]


def load_environment(spec: str) -> Factory:
    """The class named by `module:Class` or `file.py:Class`.

    ConfigError if there is none, or if its module cannot be loaded.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ConfigError(
            f"rollouts.environment: {spec!r} does not name a class", fix="write module:Class or file.py:Class"
        )
    if place.endswith(".py") and not Path(place).is_file():
        raise ConfigError(
            f"rollouts.environment: no file {place}",
            fix="give a path relative to the folder where you start the run",
        )
    try:
        module = load_module(place)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"rollouts.environment: {error}", fix="install it, or give a file.py:Class"
        ) from error
    except (Exception, SystemExit) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise ConfigError(
            f"rollouts.environment: {place} cannot be loaded",
            why=f"{type(error).__name__} at {where.filename}:{where.lineno}: {error}",
            fix="import it alone to see why",
        ) from error
    factory = getattr(module, name, None)
    if not callable(getattr(factory, "reset", None)) or not callable(getattr(factory, "step", None)):
        raise ConfigError(
            f"rollouts.environment: {place} has no class {name} with reset and step",
            fix="see orchestrator.rollout.environment.Environment",
        )
    return factory  # pyright: ignore[reportReturnType]
