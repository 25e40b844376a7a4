"""Which turns an overlong conversation loses: whole ones, so that no header of the chat template is cut.

    system | user assistant | user assistant | user
    stays    goes first       goes next        stays

An exchange runs from a user's turn to the next one. The oldest exchanges go first; the system message and the
last user's turn always stay.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

LEADING = ("system", "developer")
T = TypeVar("T")


def shorter(messages: Sequence[Any]) -> list[list[Any]]:
    """The conversation with ever fewer exchanges, the longest first; empty if no exchange can go."""
    head = next((i for i, m in enumerate(messages) if m["role"] not in LEADING), len(messages))
    users = [i for i, m in enumerate(messages) if m["role"] == "user" and i > head]
    return [[*messages[:head], *messages[start:]] for start in users]


def with_fewer_turns(
    messages: Sequence[Any],
    encode: Callable[[list[Any]], T],
    fits: Callable[[T], bool],
    useful: Callable[[list[Any]], bool] = bool,
) -> tuple[list[Any], T] | None:
    """(the longest shorter conversation that fits, what `encode` returns for it); None if none fits.

    fits: whether an encoded conversation is short enough. useful: whether a shorter conversation is worth
    keeping. A binary search finds it, as fewer turns are taken to be fewer tokens: a long conversation needs
    a few tries and not one for each turn.
    """
    candidates = [candidate for candidate in shorter(messages) if useful(candidate)]
    if not candidates:
        return None
    best = (candidates[-1], encode(candidates[-1]))
    if not fits(best[1]):
        return None
    low, high = 0, len(candidates) - 1
    while low < high:
        middle = (low + high) // 2
        encoded = encode(candidates[middle])
        if fits(encoded):
            best, high = (candidates[middle], encoded), middle
        else:
            low = middle + 1
    return best


@dataclass(slots=True)
class OverlongCounts:
    """What data.overlong did to the rows of a data set."""

    dropped: int = 0
    """Rows that were left out."""
    truncated: int = 0
    """Rows that were shortened."""
    turns: int = 0
    """Those of the shortened rows that lost their oldest turns."""
    last_turns: int = 0
    """Those of the dropped rows whose last exchange alone is too long."""

    def shorten(
        self,
        messages: Sequence[Any],
        encode: Callable[[list[Any]], T],
        fits: Callable[[T], bool],
        useful: Callable[[list[Any]], bool] = bool,
    ) -> tuple[list[Any], T] | None:
        """`with_fewer_turns`, counted."""
        shortened = with_fewer_turns(messages, encode, fits, useful)
        if shortened is None:
            self.dropped += 1
            self.last_turns += 1
        else:
            self.truncated += 1
            self.turns += 1
        return shortened

    def notes(self, limit: str) -> tuple[str, ...]:
        """Notes for the user on shortened and dropped conversations. limit: such as data.max_length=512."""
        notes = []
        if self.turns:
            notes.append(f"{_conversations(self.turns)} lost the oldest turns to fit {limit}")
        if self.last_turns:
            what = f"{_conversations(self.last_turns)} dropped"
            notes.append(f"{what}: the last user's turn alone does not fit {limit}")
        return tuple(notes)


def _conversations(count: int) -> str:
    return f"{count} conversation{'s' if count > 1 else ''}"
