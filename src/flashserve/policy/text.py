"""Numbers as people read them, for the reasons that decisions carry."""

from __future__ import annotations


def seconds(value: float) -> str:
    """0.12 s, 1.9 s, 300 s."""
    digits = 2 if abs(value) < 1 else 1 if abs(value) < 10 else 0
    return f"{value:.{digits}f} s"


def size(num_bytes: float) -> str:
    """512 B, 269 MB, 1.2 GB; decimal units."""
    value = float(num_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if abs(value) < 1000:
            return f"{value:.0f} {unit}" if value >= 100 or unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def count(number: int, noun: str) -> str:
    """1 worker, 2 workers."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
