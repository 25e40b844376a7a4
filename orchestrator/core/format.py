"""Texts of quantities: bytes, numbers, durations."""

import math


def size(count: float) -> str:
    """Text of a number of bytes. Example: 1.20 GB, 3.4 MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def number(value: float) -> str:
    """Four significant digits. Example: 0.6931, 5e-06, 1234."""
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Text of a number of seconds. Example: 8s, 3m12s, 2h05m; "?" for nan and inf."""
    if not math.isfinite(seconds):
        return "?"
    total = max(0, round(seconds))
    if total < 60:
        return f"{total}s"
    if total < 3600:
        return f"{total // 60}m{total % 60:02d}s"
    return f"{total // 3600}h{total % 3600 // 60:02d}m"


def printable(text: str) -> str:
    """The text with control characters escaped: a row of data could hold terminal commands. Line ends and
    tabs stay."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text
    )
