"""One line of a plan: a decision, its value and the reason."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Choice:
    """One decision or note of a plan. Example: Choice("sync", "no_sync", "one reduction per step …")."""

    name: str
    """What is decided. Example: "ZeRO stage"."""
    value: str
    """The decision. Example: "2"."""
    reason: str
    """Why. Example: "set in the recipe"."""
