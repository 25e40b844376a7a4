"""Whether a completion is the expected answer: the checkers of evaluation and of the built-in rewards."""

import re

CHECKERS = ("exact_match", "last_number")
_NUMBER = re.compile(r"(?:(?<!\d)-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")
"""A minus after a digit is no sign ("10-7"), and a comma separates thousands or numbers ("1,234", "1,2")."""


def matches(completion: str, answer: str, checker: str) -> bool:
    """exact_match: equal after stripping white space; last_number: the last number of the text equals the
    answer's."""
    if checker == "exact_match":
        return completion.strip() == answer.strip()
    found, wanted = _last_number(completion), _last_number(answer)
    return found is not None and found == wanted


def _last_number(text: str) -> float | None:
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None
