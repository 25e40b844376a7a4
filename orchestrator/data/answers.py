"""Checkers of evaluation and of the built-in rewards: whether a completion is the expected answer."""

import re

CHECKERS = ("exact_match", "last_number")
_NUMBER = re.compile(r"(?:(?<!\d)-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
"""A minus after a digit is not a sign ("10-7"). A comma separates thousands ("1,234") or numbers ("1,2")."""


def matches(completion: str, answer: str, checker: str) -> bool:
    """Whether a completion matches the answer.

    exact_match  equal after stripping white space
    last_number  the last number of the completion equals that of the answer
    """
    if checker == "exact_match":
        return completion.strip() == answer.strip()
    given, expected = _last_number(completion), _last_number(answer)
    return given is not None and given == expected


def _last_number(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None
