"""The column of a file that one of TRL's names probably means: for messages, and for recipes written from
data."""

import difflib
from collections.abc import Iterable

LIKELY: dict[str, tuple[str, ...]] = {
    "messages": ("messages", "conversation", "conversations", "dialogue", "dialog", "chat", "turns"),
    "text": ("text", "content", "document", "body", "passage"),
    "prompt": ("prompt", "question", "instruction", "query", "input", "problem", "user", "context"),
    "completion": (
        "completion",
        "response",
        "output",
        "reply",
        "assistant",
        "generation",
        "answer",
        "solution",
        "target",
    ),
    "chosen": (
        "chosen",
        "good",
        "preferred",
        "better",
        "accepted",
        "winner",
        "best",
        "positive",
        "win",
        "chosen_response",
        "response_chosen",
    ),
    "rejected": (
        "rejected",
        "bad",
        "dispreferred",
        "worse",
        "loser",
        "worst",
        "negative",
        "lose",
        "rejected_response",
        "response_rejected",
    ),
    "label": ("label", "liked", "thumbs_up", "is_good", "desirable", "feedback"),
    "answer": (
        "answer",
        "solution",
        "final_answer",
        "ground_truth",
        "gold",
        "target",
        "expected",
        "reference",
    ),
}
"""Names that data sets use for TRL's columns, the likeliest first."""


def likely(wanted: str, columns: Iterable[str]) -> str | None:
    """The column that probably holds TRL's column `wanted`, or None."""
    names = {str(column).lower(): str(column) for column in columns}
    for name in LIKELY.get(wanted, (wanted,)):
        if name in names:
            return names[name]
    close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.75)
    parts = [name for name in names if wanted in name.replace("-", "_").split("_")]
    return names[(close or parts)[0]] if close or parts else None


def lacking(wanted: Iterable[str], needs: str, columns: Iterable[str]) -> str:
    """Reason why a record without the columns `wanted` cannot be used, with a hint.

    Example: no 'chosen'; columns are prompt, good, bad; data.columns.chosen=good?
    """
    names = [str(column) for column in columns]
    proposed: set[str] = set()
    hints = []
    for name in wanted:
        column = likely(name, (c for c in names if c not in proposed))
        if column is not None and column != name:
            proposed.add(column)
            hints.append(f"data.columns.{name}={column}")
    return f"{needs}; columns are {', '.join(names) or 'none'}" + (f"; {' '.join(hints)}?" if hints else "")
