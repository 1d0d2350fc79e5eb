"""Counts of minutes that are not closed yet, whenever they are told."""

from __future__ import annotations

import math
from collections.abc import Iterator

from flashserve.forecast.core import MAX_COUNT

# A count that comes so many minutes after its minute was closed goes to the first open one.
MAX_LATE_MINUTES = 5


class PendingMinutes:
    """Additive counts by minute and series; bounded, what is beyond is dropped and counted.

    What is no count (NaN, negative, above MAX_COUNT) makes that series' minute unknown, whatever
    else is told of it.
    """

    def __init__(self, max_entries: int = 200_000) -> None:
        self._max_entries = max_entries
        self._minutes: dict[int, dict[str, float]] = {}
        self._num_entries = 0
        self.num_dropped = 0

    def add(self, series: str, minute: int, count: float) -> None:
        counts = self._minutes.setdefault(minute, {})
        if series not in counts:
            if self._num_entries >= self._max_entries:
                self.num_dropped += 1
                return
            self._num_entries += 1
        is_count = 0 <= count <= MAX_COUNT
        counts[series] = counts.get(series, 0.0) + (count if is_count else math.nan)

    def close(self, minute: int) -> dict[str, float]:
        """The counts of a minute, with late ones of up to MAX_LATE_MINUTES before; removed."""
        closed: dict[str, float] = {}
        for late in range(minute - MAX_LATE_MINUTES, minute + 1):
            counts = self._minutes.pop(late, {})
            self._num_entries -= len(counts)
            for series, count in counts.items():
                closed[series] = closed.get(series, 0.0) + count
        return closed

    def drop_before(self, minute: int) -> None:
        """Drop minutes that are too old to be told any more."""
        for old in [each for each in self._minutes if each < minute - MAX_LATE_MINUTES]:
            dropped = self._minutes.pop(old)
            self._num_entries -= len(dropped)
            self.num_dropped += len(dropped)

    def pull_back(self, minute: int) -> None:
        """The clock went back to `minute`: what was told of later minutes came before it."""
        for later in sorted(each for each in self._minutes if each > minute):
            counts = self._minutes.pop(later)
            self._num_entries -= len(counts)
            for series, count in counts.items():
                self.add(series, minute, count)

    def forget(self, series: str) -> None:
        for counts in self._minutes.values():
            self._num_entries -= counts.pop(series, None) is not None

    def entries(self) -> Iterator[tuple[str, int, float]]:
        for minute, counts in self._minutes.items():
            for series, count in counts.items():
                yield series, minute, count
