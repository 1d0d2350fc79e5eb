"""When something becomes due: one heap whose outdated entries are dropped when they surface."""

from __future__ import annotations

import enum
import heapq
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
        if when < self._scheduled.get(timer, float("inf")):
            self._scheduled[timer] = when
            heapq.heappush(self._heap, (when, timer))

    def next_due(self) -> float | None:
        """The earliest time at which something is due."""
        while self._heap:
            when, timer = self._heap[0]
            if self._scheduled.get(timer) != when:
                heapq.heappop(self._heap)
                continue
            due = self._due_at(timer)
            if due == when:
                return when
            heapq.heappop(self._heap)
            del self._scheduled[timer]
            if due is not None:
                self.schedule(timer, due)
        return None

    def pop_due(self, now: float, limit: int) -> Iterator[Timer]:
        """Timers that are due, earliest first, so many at most; ones scheduled meanwhile count."""
        for _ in range(limit):
            when = self.next_due()
            if when is None or when > now:
                return
            _, timer = heapq.heappop(self._heap)
            del self._scheduled[timer]
            yield timer
