"""Numbers as people read them, for the reasons that decisions carry."""

from __future__ import annotations

import math


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


def rate(per_s: float) -> str:
    """2.1/s, 0.30/min, 12/h, 3.5/day."""
    for unit, seconds_each in (("s", 1.0), ("min", 60.0), ("h", 3600.0)):
        if per_s * seconds_each >= 0.1:
            return f"{per_s * seconds_each:.2g}/{unit}"
    return f"{per_s * 86400:.2g}/day"


def count(number: int, noun: str) -> str:
    """1 worker, 2 workers."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def money(value: float) -> str:
    """1234.50, 3.00, 0.083, 0.0042, 0.00: cents, and where they say little up to four digits."""
    if abs(value) >= 1 or abs(value) < 5e-5:
        return f"{value:.2f}".removeprefix("-" if abs(value) < 5e-5 else "")
    return f"{value:.{min(1 - math.floor(math.log10(abs(value))), 4)}f}"
