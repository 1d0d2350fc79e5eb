"""Brings the arrivals that were counted in memory to the catalogue, once a minute."""

from __future__ import annotations

import asyncio

import structlog

from flashserve.errors import CatalogueError
from flashserve.forecast.arrivals import (
    MINUTE_S,
    ArrivalCount,
    ArrivalCounter,
    is_known,
    minute_of,
)
from flashserve.forecast.days import day_of
from flashserve.live.arrivalrows import SERVER
from flashserve.live.catalogue import Catalogue
from flashserve.live.names import Names
from flashserve.live.wallclock import WallClock
from flashserve.types import ModelId

_STEADY_S = 3600.0
"""A clock that jumped may be wrong: nothing is called old before it has been steady so long."""
_log = structlog.get_logger(__name__)


class ArrivalRecorder:
    """Counts every request; a crash loses the counts of at most one minute.

    Args:
        names: of what there is. What was counted of others is dropped, so that the arrivals of a
            deleted model do not come back with its last request.
        retention_days: days (UTC) before today of which arrivals are kept.
        news: is told every arrival too, for the forecaster.
    """

    def __init__(
        self,
        catalogue: Catalogue,
        names: Names,
        retention_days: int,
        clock: WallClock | None = None,
        news: ArrivalCounter | None = None,
    ) -> None:
        self._catalogue = catalogue
        self._names = names
        self._retention_days = retention_days
        self._clock = clock or WallClock()
        self._counter = ArrivalCounter()
        self._news = news
        # The last minute that is noted as one in which the server ran.
        self._noted = minute_of(self._clock.now()) - 1
        self._closed_before: int | None = None
        self._dropped_before: int | None = None

    def record(self, series: ModelId) -> None:
        now = self._clock.now()
        self._counter.record(series, now)
        if self._news is not None:
            self._news.record(series, now)

    async def flush(self) -> None:
        """Write what was counted. What cannot be written is kept for the next time, and logged."""
        counts = [
            count for count in self._counter.drain() if is_known(count.series, self._names.has)
        ]
        self._clock.look()
        now = minute_of(self._clock.now())
        notes = self._notes(now) if self._names else []
        try:
            if counts or notes:
                await self._catalogue.add_arrivals([*counts, *notes])
            self._noted = now
        except CatalogueError as error:
            self._counter.restore(counts)
            _log.error("arrivals not recorded", reason=error.message)
            return
        await self._tidy(day_of(now))

    async def run(self) -> None:
        """Flush each minute until cancelled."""
        while True:
            await asyncio.sleep(MINUTE_S)
            await self.flush()

    def _notes(self, now: int) -> list[ArrivalCount]:
        """That the server ran in this minute, and in those since the last note if they are few."""
        first = self._noted + 1 if now - 2 <= self._noted < now else now
        return [ArrivalCount(SERVER, minute, 1) for minute in range(first, now + 1)]

    async def _tidy(self, today: int) -> None:
        """Once a day: pack the days that are over, and drop those that are too old."""
        oldest = today - self._retention_days
        try:
            if self._closed_before != today:
                await self._catalogue.close_days(today)
                self._closed_before = today
            if self._dropped_before != oldest and self._clock.steady_s >= _STEADY_S:
                await self._catalogue.drop_days(oldest)
                self._dropped_before = oldest
        except CatalogueError as error:
            _log.error("arrivals not tidied", reason=error.message)
