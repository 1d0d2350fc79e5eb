"""Counts arrivals per series and minute, for the forecaster and for the durable record.

A series is a model, or an adapter of it as MODEL:ADAPTER (whose arrivals also count for the model).

A minute is the whole number of minutes since 1970 (UTC) that a wall clock names. Counts are
additive: an arrival goes to the minute that its own time names, whenever it is told. So late events
and a clock that steps back need no special case, and a minute without arrivals has no entry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable

from flashserve.types import ModelId

MINUTE_S = 60


@dataclasses.dataclass(frozen=True, slots=True)
class ArrivalCount:
    """`count` more arrivals of a series in one minute."""

    series: ModelId
    minute: int
    count: int


def minute_of(at: float) -> int:
    """The minute in which the Unix time `at` lies."""
    return int(at // MINUTE_S)


class ArrivalCounter:
    """What has arrived and is not yet written down.

    Bounded: at most `max_entries` pairs of series and minute are kept. Beyond that (nobody has
    drained for long) the oldest minutes are dropped and counted in `num_dropped`.
    """

    def __init__(self, max_entries: int = 200_000) -> None:
        if max_entries < 1:
            raise ValueError("max_entries must be at least 1")
        self._max_entries = max_entries
        self._counts: dict[tuple[ModelId, int], int] = {}
        self.num_dropped = 0

    def __len__(self) -> int:
        return len(self._counts)

    def record(self, series: ModelId, at: float) -> None:
        """One arrival at Unix time `at`, which may lie before earlier ones."""
        self.restore([ArrivalCount(series, minute_of(at), 1)])

    def drain(self) -> list[ArrivalCount]:
        """Everything counted since the last drain, by minute and series; the counter is empty."""
        counts, self._counts = self._counts, {}
        ordered = sorted(counts.items(), key=lambda item: (item[0][1], item[0][0]))
        return [ArrivalCount(series, minute, count) for (series, minute), count in ordered]

    def forget(self, is_gone: Callable[[ModelId], bool]) -> None:
        """Drop what was counted of series that are gone."""
        for key in [key for key in self._counts if is_gone(key[0])]:
            del self._counts[key]

    def restore(self, counts: Iterable[ArrivalCount]) -> None:
        """Take back what was drained and could not be written."""
        for entry in counts:
            key = (entry.series, entry.minute)
            self._counts[key] = self._counts.get(key, 0) + entry.count
        if len(self._counts) > self._max_entries:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        """Down to nine tenths, so that a full counter does not sort on every arrival."""
        num_kept = self._max_entries * 9 // 10
        by_age = sorted(self._counts, key=lambda key: (key[1], key[0]))
        for key in by_age[: len(by_age) - num_kept]:
            self.num_dropped += self._counts.pop(key)


def belongs_to(series: ModelId, model_id: ModelId) -> bool:
    """Is it the model's own series, or that of one of its adapters?"""
    return series == model_id or series.startswith(f"{model_id}:")


def series_of(model_id: ModelId, adapter: str) -> ModelId:
    """The series of an adapter of a model."""
    return ModelId(f"{model_id}:{adapter}")


def is_known(series: ModelId, has: Callable[[str], bool]) -> bool:
    """Whether `has` knows the series' model, and its adapter if it has one."""
    return all(map(has, series.split(":")))
