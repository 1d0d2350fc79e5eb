"""Arrivals on their way from memory to the catalogue."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

from flashserve.errors import CatalogueError
from flashserve.forecast.arrivals import ArrivalCount
from flashserve.live.recorder import ArrivalRecorder
from flashserve.types import ModelId

A = ModelId("a")


class FakeCatalogue:
    def __init__(self) -> None:
        self.written: list[ArrivalCount] = []
        self.is_full = False

    async def add_arrivals(self, counts: Iterable[ArrivalCount]) -> None:
        if self.is_full:
            raise CatalogueError("the disk is full")
        self.written += counts


def test_what_cannot_be_written_is_written_the_next_time() -> None:
    async def scenario() -> None:
        catalogue, now = FakeCatalogue(), [60.0]
        recorder = ArrivalRecorder(catalogue, unix_time=lambda: now[0])  # type: ignore[arg-type]
        recorder.record(A)
        catalogue.is_full = True
        await recorder.flush()
        assert catalogue.written == []
        now[0] = 120.0
        recorder.record(A)
        catalogue.is_full = False
        await recorder.flush()
        await recorder.flush()
        assert catalogue.written == [ArrivalCount(A, 1, 1), ArrivalCount(A, 2, 1)]

    asyncio.run(scenario())
