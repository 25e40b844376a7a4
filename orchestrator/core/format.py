"""How quantities are written for people."""

import math


def size(count: float) -> str:
    """Bytes in words. Example: 1.20 GB, 3.4 MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def number(value: float) -> str:
    """Four significant digits. Example: 0.6931, 5e-06, 1234."""
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Example: 8s, 3m12s, 2h05m; "?" where it is not known."""
    if not math.isfinite(seconds):
        return "?"
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    return (
        f"{whole // 60}m{whole % 60:02d}s" if whole < 3600 else f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    )


def printable(text: str) -> str:
    """The text without control characters (a row of data could hold terminal commands); line ends and tabs
    stay."""
    return "".join(
        c if c.isprintable() or c in "\n\t" else c.encode("unicode_escape").decode("ascii") for c in text
    )
