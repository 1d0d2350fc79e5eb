"""Unix time, compared with a clock that nobody sets: whether it has been steady."""

from __future__ import annotations

import time
from collections.abc import Callable

_TOLERANCE_S = 30.0
"""Small corrections, of the clock or by a slow look, are no jumps."""


class WallClock:
    """Tells of jumps between two looks: somebody set the clock, or the machine was asleep."""

    def __init__(
        self,
        unix_time: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.now = unix_time
        self._monotonic = monotonic
        self._seen = unix_time(), monotonic()
        self._steady_since = self._seen[1]

    def look(self) -> float:
        """Seconds by which the clock jumped since the last look: negative for back, 0 for none."""
        now, steady = self.now(), self._monotonic()
        before, then = self._seen
        self._seen = now, steady
        jump = (now - before) - (steady - then)
        if abs(jump) < _TOLERANCE_S:
            return 0.0
        self._steady_since = steady
        return jump

    @property
    def steady_s(self) -> float:
        """How long it had not jumped at the last look."""
        return self._seen[1] - self._steady_since
