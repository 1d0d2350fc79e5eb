"""Arrivals on their way from memory to the catalogue."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from pathlib import Path

from flashserve.errors import CatalogueError
from flashserve.forecast.arrivals import ArrivalCount, ArrivalCounter, series_of
from flashserve.forecast.days import DAY_MINUTES
from flashserve.live.arrivalrows import SERVER
from flashserve.live.catalogue import Catalogue
from flashserve.live.names import Names
from flashserve.live.recorder import ArrivalRecorder
from flashserve.live.wallclock import WallClock
from flashserve.types import ModelId

A = ModelId("a")
DAY_S = 86400.0


class FullDisk(Catalogue):
    """A catalogue that cannot be written while `is_full`."""

    is_full = False

    async def add_arrivals(self, counts: Iterable[ArrivalCount]) -> None:
        if self.is_full:
            raise CatalogueError("the disk is full")
        await super().add_arrivals(counts)


class Bench:
    """A recorder whose clocks are moved by hand: `wall` and `steady`, in seconds."""

    def __init__(self, catalogue: FullDisk) -> None:
        self.catalogue, self.names = catalogue, Names()
        self.wall, self.steady = 100 * DAY_S, 5.0
        self.clock = WallClock(lambda: self.wall, lambda: self.steady)
        self.news = ArrivalCounter()
        self.names.put(A, "model")
        self.recorder = ArrivalRecorder(catalogue, self.names, 2, self.clock, self.news)

    def wait(self, seconds: float) -> None:
        self.wall += seconds
        self.steady += seconds

    async def minutes(self, series: ModelId = A) -> list[tuple[int, int]]:
        """Minutes since the start of the bench, and counts."""
        found = await self.catalogue.arrivals(series, 0, 1 << 40)
        return [(each.minute - 100 * DAY_MINUTES, each.count) for each in found]


@contextlib.asynccontextmanager
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    catalogue = FullDisk(tmp_path)
    await catalogue.open()
    try:
        yield Bench(catalogue)
    finally:
        await catalogue.close()


def play(tmp_path: Path, scenario: Callable[[Bench], Awaitable[None]]) -> None:
    async def run() -> None:
        async with bench(tmp_path) as ready:
            await scenario(ready)

    asyncio.run(run())


def test_what_cannot_be_written_is_written_the_next_time(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        bench.recorder.record(A)
        bench.catalogue.is_full = True
        await bench.recorder.flush()
        assert await bench.minutes() == []
        bench.wait(60)
        bench.recorder.record(A)
        bench.catalogue.is_full = False
        await bench.recorder.flush()
        await bench.recorder.flush()
        assert await bench.minutes() == [(0, 1), (1, 1)]
        assert [minute for minute, _ in await bench.minutes(SERVER)] == [0, 1]

    play(tmp_path, scenario)


def test_minutes_in_which_the_server_ran_are_noted_and_no_others(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        for seconds in (60, 61, 119, 600, 60):
            bench.wait(seconds)
            await bench.recorder.flush()
        assert [minute for minute, _ in await bench.minutes(SERVER)] == [0, 1, 2, 3, 4, 14, 15]

    play(tmp_path, scenario)


def test_a_server_without_models_writes_nothing(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        bench.names.remove(A)
        bench.catalogue.is_full = True
        await bench.recorder.flush()
        bench.catalogue.is_full = False
        assert await bench.minutes(SERVER) == []

    play(tmp_path, scenario)


def test_the_last_requests_of_a_deleted_model_do_not_bring_its_arrivals_back(
    tmp_path: Path,
) -> None:
    async def scenario(bench: Bench) -> None:
        adapted = series_of(A, "gone")
        bench.recorder.record(adapted)
        bench.recorder.record(A)
        await bench.recorder.flush()
        assert await bench.minutes(adapted) == []
        assert await bench.minutes() == [(0, 1)]

    play(tmp_path, scenario)


def test_the_forecaster_is_told_whatever_becomes_of_the_disk(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        bench.catalogue.is_full = True
        bench.recorder.record(A)
        await bench.recorder.flush()
        bench.recorder.record(A)
        assert bench.news.drain() == [ArrivalCount(A, 100 * DAY_MINUTES, 2)]

    play(tmp_path, scenario)


async def live_days(bench: Bench, num_days: int) -> None:
    """An arrival and a flush at noon of each day, and an hour later another flush."""
    for _ in range(num_days):
        bench.recorder.record(A)
        await bench.recorder.flush()
        bench.wait(3600)
        await bench.recorder.flush()
        bench.wait(DAY_S - 3600)


def test_days_are_packed_when_they_are_over_and_dropped_when_they_are_old(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        await live_days(bench, 5)
        # Today is the fifth; two days before it are kept, and they are closed.
        assert [minute // DAY_MINUTES for minute, _ in await bench.minutes()] == [2, 3, 4]
        rows = bench.catalogue._rows._connection.execute("SELECT day FROM arrival_days")
        assert {day for (day,) in rows} == {102, 103}

    play(tmp_path, scenario)


def test_a_clock_that_jumps_ahead_and_back_costs_no_history(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        await live_days(bench, 2)
        before = await bench.minutes()
        bench.wall += 1000 * DAY_S
        for _ in range(3):
            bench.wait(60)
            await bench.recorder.flush()
        bench.wall -= 1000 * DAY_S
        bench.wait(60)
        await bench.recorder.flush()
        assert await bench.minutes() == before

    play(tmp_path, scenario)


def test_arrivals_of_a_day_that_the_clock_goes_back_to_are_added_to_it(tmp_path: Path) -> None:
    async def scenario(bench: Bench) -> None:
        bench.recorder.record(A)
        bench.wall += DAY_S
        bench.recorder.record(A)
        await bench.recorder.flush()
        bench.wall -= DAY_S
        bench.recorder.record(A)
        await bench.recorder.flush()
        assert await bench.minutes() == [(0, 2), (DAY_MINUTES, 1)]

    play(tmp_path, scenario)


def test_the_clock_tells_of_jumps_but_not_of_small_corrections() -> None:
    wall, steady = [1000.0], [0.0]
    clock = WallClock(lambda: wall[0], lambda: steady[0])
    wall[0], steady[0] = 1061.0, 60.0
    assert (clock.look(), clock.steady_s) == (0, 60)
    wall[0], steady[0] = 500.0, 70.0
    assert (clock.look(), clock.steady_s) == (-571, 0)
    wall[0], steady[0] = 4110.0, 80.0
    assert (clock.look(), clock.steady_s) == (3600, 0)
