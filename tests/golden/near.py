"""A reward that tells one wrong answer from another, for curves of models that have learned nothing yet."""


def near(completions: list[str], **_: object) -> list[float]:
    """Share of an answer's characters that are vowels, in [0, 1]; 0 for an empty answer."""
    return [sum(letter in "aeiou" for letter in text) / max(len(text), 1) for text in completions]
