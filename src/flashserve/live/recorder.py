"""Brings the arrivals that were counted in memory to the catalogue, once a minute."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import structlog

from flashserve.errors import CatalogueError
from flashserve.forecast.arrivals import MINUTE_S, ArrivalCounter
from flashserve.live.catalogue import Catalogue
from flashserve.types import ModelId

_log = structlog.get_logger(__name__)


class ArrivalRecorder:
    """Counts every request; a crash loses the counts of at most one minute."""

    def __init__(self, catalogue: Catalogue, unix_time: Callable[[], float] = time.time) -> None:
        self._catalogue = catalogue
        self._counter = ArrivalCounter()
        self._unix_time = unix_time

    def record(self, model_id: ModelId) -> None:
        self._counter.record(model_id, self._unix_time())

    async def flush(self) -> None:
        """Write what was counted. What cannot be written is kept for the next time, and logged."""
        counts = self._counter.drain()
        if not counts:
            return
        try:
            await self._catalogue.add_arrivals(counts)
        except CatalogueError as error:
            self._counter.restore(counts)
            _log.error("arrivals not recorded", reason=error.message)

    async def run(self) -> None:
        """Flush each minute until cancelled."""
        while True:
            await asyncio.sleep(MINUTE_S)
            await self.flush()
