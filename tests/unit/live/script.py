"""A clock that a test moves by hand."""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable


class ScriptTimer:
    def __init__(self, call: Callable[[], None]) -> None:
        self.call = call
        self.is_cancelled = False

    def cancel(self) -> None:
        self.is_cancelled = True


class ScriptClock:
    """Stands still until `advance`, which fires what is due on the way, in order."""

    def __init__(self, at: float = 0.0) -> None:
        self._now = at
        self._timers: list[tuple[float, int, ScriptTimer]] = []
        self._number = itertools.count()

    def now(self) -> float:
        return self._now

    def call_at(self, when: float, call: Callable[[], None]) -> ScriptTimer:
        timer = ScriptTimer(call)
        heapq.heappush(self._timers, (when, next(self._number), timer))
        return timer

    async def advance(self, to: float) -> None:
        while self._timers and self._timers[0][0] <= to:
            when, _, timer = heapq.heappop(self._timers)
            if not timer.is_cancelled:
                self._now = max(self._now, when)
                timer.call()
                await settle()
        self._now = to


async def settle() -> None:
    """Let everything that is ready to run do so, and what that makes ready, some rounds long."""
    for _ in range(50):
        await asyncio.sleep(0)
