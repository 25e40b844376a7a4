"""Which column of a file is probably meant by one of TRL's names: for messages, and for recipes that are
written from data."""

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
"""Names that data sets give to TRL's columns, the likeliest first."""


def likely(wanted: str, columns: Iterable[str]) -> str | None:
    """The column that probably holds what TRL calls `wanted`, or None."""
    names = {str(column).lower(): str(column) for column in columns}
    for name in LIKELY.get(wanted, (wanted,)):
        if name in names:
            return names[name]
    close = difflib.get_close_matches(wanted, names, n=1, cutoff=0.75)
    parts = [name for name in names if wanted in name.replace("-", "_").split("_")]
    return names[(close or parts)[0]] if close or parts else None


def lacking(wanted: Iterable[str], needs: str, columns: Iterable[str]) -> str:
    """Why a record cannot be used that has not the columns `wanted`. Example: no 'chosen'; columns are
    prompt, good, bad; data.columns.chosen=good?"""
    there = [str(column) for column in columns]
    taken: set[str] = set()
    hints = []
    for name in wanted:
        if (found := likely(name, (c for c in there if c not in taken))) is not None and found != name:
            taken.add(found)
            hints.append(f"data.columns.{name}={found}")
    return f"{needs}; columns are {', '.join(there) or 'none'}" + (f"; {' '.join(hints)}?" if hints else "")
