"""When something becomes due: one heap whose outdated entries are dropped when they surface."""

from __future__ import annotations

import enum
import heapq
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple


class TimerKind(enum.IntEnum):
    """What is due; the key beside it is a request, replica or model identifier."""

    DEADLINE = 0
    KEEP_ALIVE = 1
    PATIENCE = 2
    RETRY = 3
    BACKOFF = 4
    REVIEW = 5
    FILL = 6

    __hash__ = int.__hash__  # that of enumerations is a function in Python, and asked often


class Timer(NamedTuple):
    kind: TimerKind
    key: str


DueAt = Callable[[Timer], float | None]
"""When a timer is really due by the present state; None when it no longer matters."""


class Timers:
    """Entries may be earlier than the truth, never later.

    So that a replica that is used a hundred times a second needs one entry and not a hundred, an
    entry stays where it is when its time moves back, and is asked about (`due_at`) on surfacing.
    """

    def __init__(self, due_at: DueAt) -> None:
        self._due_at = due_at
        self._heap: list[tuple[float, Timer]] = []
        self._scheduled: dict[Timer, float] = {}

    def schedule(self, timer: Timer, when: float) -> None:
        """See to it that `timer` is looked at no later than `when`."""
        if when < self._scheduled.get(timer, math.inf):
            self._scheduled[timer] = when
            heapq.heappush(self._heap, (when, timer))

    def next_due(self, until: float = math.inf) -> float | None:
        """The earliest time at which something is due; None when that is not by `until`.

        Entries after `until` are not asked about, so that who has something else to do before
        them pays a comparison.
        """
        heap = self._heap
        while heap:
            when, timer = heap[0]
            if when > until:
                return None
            if self._scheduled.get(timer) != when:
                heapq.heappop(heap)
                continue
            due = self._due_at(timer)
            if due == when:
                return when
            heapq.heappop(heap)
            del self._scheduled[timer]
            if due is not None:
                self.schedule(timer, due)
        return None

    def pop_due(self, now: float, limit: int) -> Iterator[Timer]:
        """Timers that are due, earliest first, so many at most; ones scheduled meanwhile count."""
        for _ in range(limit):
            if self.next_due(now) is None:
                return
            _, timer = heapq.heappop(self._heap)
            del self._scheduled[timer]
            yield timer
