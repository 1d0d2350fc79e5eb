"""Counts arrivals per model and minute, for the forecaster and for the durable record.

A minute is the whole number of minutes since 1970 (UTC) that a wall clock names. Counts are
additive: an arrival goes to the minute that its own time names, whenever it is told. So late events
and a clock that steps back need no special case, and a minute without arrivals has no entry.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

from flashserve.types import ModelId

MINUTE_S = 60


@dataclasses.dataclass(frozen=True, slots=True)
class ArrivalCount:
    """`count` more arrivals of a model in one minute."""

    model_id: ModelId
    minute: int
    count: int


def minute_of(at: float) -> int:
    """The minute in which the Unix time `at` lies."""
    return int(at // MINUTE_S)


class ArrivalCounter:
    """What has arrived and is not yet written down.

    Bounded: at most `max_entries` pairs of model and minute are kept. Beyond that (nobody has
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

    def record(self, model_id: ModelId, at: float) -> None:
        """One arrival at Unix time `at`, which may lie before earlier ones."""
        self.restore([ArrivalCount(model_id, minute_of(at), 1)])

    def drain(self) -> list[ArrivalCount]:
        """Everything counted since the last drain, by minute and model; the counter is empty."""
        counts, self._counts = self._counts, {}
        ordered = sorted(counts.items(), key=lambda item: (item[0][1], item[0][0]))
        return [ArrivalCount(model_id, minute, count) for (model_id, minute), count in ordered]

    def restore(self, counts: Iterable[ArrivalCount]) -> None:
        """Take back what was drained and could not be written."""
        for entry in counts:
            key = (entry.model_id, entry.minute)
            self._counts[key] = self._counts.get(key, 0) + entry.count
        if len(self._counts) > self._max_entries:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        """Down to nine tenths, so that a full counter does not sort on every arrival."""
        num_kept = self._max_entries * 9 // 10
        by_age = sorted(self._counts, key=lambda key: (key[1], key[0]))
        for key in by_age[: len(by_age) - num_kept]:
            self.num_dropped += self._counts.pop(key)


def series(counts: Iterable[ArrivalCount], first_minute: int, num_minutes: int) -> Sequence[int]:
    """The counts of one model as a gapless row: [num_minutes], zero where nothing arrived.

    Entries outside the range are left out; several of one minute add up.
    """
    row = [0] * num_minutes
    for entry in counts:
        if 0 <= entry.minute - first_minute < num_minutes:
            row[entry.minute - first_minute] += entry.count
    return row
