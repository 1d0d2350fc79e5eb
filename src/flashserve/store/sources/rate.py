"""Caps on how fast bytes move, shared by every thread that moves them."""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable

_BURST_S = 0.01
"""So much of the rate may pass ahead of schedule: sleeping for less costs more than it evens."""


class RateLimit:
    """At most `bytes_per_s` on average, from the first byte after a pause; 0 is no limit."""

    def __init__(
        self,
        bytes_per_s: int,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._sleep = sleep
        self._lock = threading.Lock()
        self._due = 0.0  # when the bytes taken so far have passed at the rate

    def take(self, num_bytes: int) -> None:
        """Returns when so many bytes may pass. Callers wait in turn."""
        if not self._bytes_per_s:
            return
        with self._lock:
            now = self._clock()
            ahead = max(self._due - now, 0.0)
            self._due = now + ahead + num_bytes / self._bytes_per_s
        if ahead > _BURST_S:
            self._sleep(ahead)


@functools.cache
def remote_limit(bytes_per_s: int) -> RateLimit:
    """The limit that all fetching of this process from remote sources shares."""
    return RateLimit(bytes_per_s)
