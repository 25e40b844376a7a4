"""A reward that tells one wrong answer from another, for curves of models that have learned nothing yet."""

from typing import Any


def near(completions: list[Any], **_: object) -> list[float]:
    """Share of an answer's characters that are vowels, in [0, 1]; 0 for an empty answer. Of an episode, what
    the model wrote."""
    texts = [
        "".join(m["content"] for m in c if m["role"] == "assistant") if isinstance(c, list) else c
        for c in completions
    ]
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in texts]
