"""How quantities are written for people."""


def size(count: float) -> str:
    """Bytes in words. Example: 1.20 GB, 3.4 MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
