"""Tells a forecaster what the catalogue knows: after a restart, and when its state is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from flashserve.forecast.arrivals import MINUTE_S
from flashserve.forecast.core import History
from flashserve.forecast.forecaster import Forecaster
from flashserve.live.arrivalrows import SERVER, ArrivalArrays
from flashserve.live.catalogue import Catalogue
from flashserve.types import ModelId

_SLICE_S = 0.02
"""Of work, after which as long is left to others."""
_MAX_CELLS = 20_000_000
"""Series x minutes that are replayed at most: minutes of one core, for what is forecast meanwhile
by nobody."""


def first_minute(now: int, history_days: int, num_series: int) -> int:
    """Where a replay that ends at minute `now` begins."""
    return now - min(history_days * 1440, _MAX_CELLS // max(num_series, 1))


async def replay(
    forecaster: Forecaster,
    catalogue: Catalogue,
    series: Sequence[ModelId],
    end: int,
    in_thread: Callable[[Callable[[], bool]], Awaitable[bool]],
) -> None:
    """Close every minute up to `end` with what was recorded in it.

    Minutes in which no server ran are passed over as unknown.

    Raises:
        CatalogueError: it cannot be read.
    """
    begin = forecaster.minute
    if begin >= end:
        return
    found = await catalogue.arrival_arrays([SERVER, *series], begin, end - 1)
    steps = _steps(forecaster, series, found, begin)
    while await in_thread(lambda: _work(steps)):  # noqa: ASYNC110 - it leaves time to others
        await asyncio.sleep(_SLICE_S)
    await in_thread(lambda: forecaster.tick(end * MINUTE_S) >= 0)


def _work(steps: Iterator[None]) -> bool:
    """A slice of it; whether there is more."""
    until = time.perf_counter() + _SLICE_S
    return any(time.perf_counter() >= until for _ in steps)


def _steps(
    forecaster: Forecaster, series: Sequence[ModelId], found: Sequence[ArrivalArrays], begin: int
) -> Iterator[None]:
    """One step a minute in which the server ran, or something arrived all the same."""
    arrivals = [minutes for minutes, _ in found[1:]]
    sizes = [len(minutes) for minutes in arrivals]
    minutes = np.concatenate([np.empty(0, np.int64), *arrivals])
    counts = np.concatenate([np.empty(0, np.float32), *(count for _, count in found[1:])])
    names = np.repeat(np.arange(len(series)), sizes)
    order = np.argsort(minutes, kind="stable")
    minutes, counts, names = minutes[order], counts[order], names[order]
    watched = np.union1d(found[0][0], minutes)
    if not len(forecaster):  # nobody is forecast before the first arrival
        watched = watched[watched >= (minutes[0] if len(minutes) else np.inf)]
    bounds = np.searchsorted(minutes, np.append(watched, np.iinfo(np.int64).max))
    for index, minute in enumerate(watched.tolist()):
        if minute > max(forecaster.minute, begin):
            forecaster.tick(minute * MINUTE_S)
        for entry in range(bounds[index], bounds[index + 1]):
            forecaster.observe_minute(series[names[entry]], minute, float(counts[entry]))
        forecaster.close_minute()
        yield


def history_of(
    series: Sequence[ModelId], found: Sequence[ArrivalArrays], begin: int, end: int
) -> History:
    """Counts of each minute in [begin, end); NaN where no server ran.

    found: of SERVER first, then of each series.
    """
    known: npt.NDArray[np.bool_] = np.zeros(end - begin, dtype=bool)
    known[found[0][0] - begin] = True
    for minutes, _ in found[1:]:
        known[minutes - begin] = True
    counts = np.where(known, np.float32(0), np.float32(np.nan))[None, :].repeat(len(series), axis=0)
    for row, (minutes, count) in enumerate(found[1:]):
        counts[row, minutes - begin] = count
    return History(tuple(series), begin, counts)
