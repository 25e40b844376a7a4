"""Which turns of a conversation are left out where it is too long: whole ones, so that no header of the chat
template is cut.

system | user assistant | user assistant | user        the oldest exchanges go first, from one user's turn to the next;
^ stays  ^ goes first     ^ then           ^ stays     the system message and the last user's turn never do
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

LEADING = ("system", "developer")
T = TypeVar("T")


def shorter(messages: Sequence[Any]) -> list[list[Any]]:
    """The conversation with ever fewer exchanges, the longest first; nothing where none can go."""
    head = next((i for i, m in enumerate(messages) if m["role"] not in LEADING), len(messages))
    users = [i for i, m in enumerate(messages) if m["role"] == "user" and i > head]
    return [[*messages[:head], *messages[start:]] for start in users]


def with_fewer_turns(
    messages: Sequence[Any],
    make: Callable[[list[Any]], T],
    fits: Callable[[T], bool],
    useful: Callable[[list[Any]], bool] = bool,
) -> tuple[list[Any], T] | None:
    """The longest of the shorter conversations of which what `make` makes fits, and that; None where even the
    last exchange does not. useful: of the shorter ones, which are worth keeping.

    Fewer turns are taken to be fewer tokens, so that a long conversation takes a few tries and not one for
    each turn.
    """
    tries = [left for left in shorter(messages) if useful(left)]
    if not tries:
        return None
    best = (tries[-1], make(tries[-1]))
    if not fits(best[1]):
        return None
    low, high = 0, len(tries) - 1
    while low < high:
        middle = (low + high) // 2
        made = make(tries[middle])
        if fits(made):
            best, high = (tries[middle], made), middle
        else:
            low = middle + 1
    return best


def said_of(turns: int, dropped: int, what: str) -> tuple[str, ...]:
    """What the user is told of conversations that lost turns, and of those whose last exchange did not fit.
    what: they were too long for."""
    shorter_ones = (
        [f"{turns} conversation{'s' if turns > 1 else ''} lost the oldest turns to fit {what}"]
        if turns
        else []
    )
    gone = (
        [
            f"{dropped} conversation{'s' if dropped > 1 else ''} dropped: the last user's turn alone does "
            f"not fit {what}"
        ]
        if dropped
        else []
    )
    return (*shorter_ones, *gone)
