"""What forecasting of 10,000 series costs: `python benchmarks/forecast_scale.py [CANDIDATE]`.

Prints one JSON object; benchmarks/forecast.py runs it in a process of its own, so that memory is
that of the forecaster and not of the traces. Series are synthetic (functions with the published
mix), 1,000 of them ten times over.

Clocks: a tick is one minute told and one forecast of all series with its quantiles, warm, after two
hours of minutes.
A refit is `decompose` of all series, two weeks of hours. The fine-tuning is a second `fit`, from
the weights of a first, on a day of all series: CPU time of the process that trains, and of this
one. Prophet is fitted to two weeks of hours of single series and forecasts a day. Memory is the
peak of resident pages, of this process after its ticks and of the one that trained.
"""

from __future__ import annotations

import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from flashserve.forecast import registry, synthetic
from flashserve.forecast.backtest import LEADS
from flashserve.forecast.core import History
from flashserve.forecast.decomposition import decompose
from flashserve.forecast.prophet import fit_prophet

NUM_SERIES = 10_000
_DISTINCT = 1_000
_TICKS = 20
_HOURS = 14 * 24
_REFITS = 5
_PROPHET_SERIES = 6


def main(candidate: str) -> None:
    results: dict[str, Any] = {"candidate": candidate}
    [model] = registry.make_models([candidate], 0)
    day = _day()
    few = slice(0, 60)
    first = History(day.names[few], 0, day.counts[few, :480])
    model.fit(first)
    before = _cpu_s()
    began = time.perf_counter()
    model.fit(day)
    results["finetune_cpu_s"] = _cpu_s() - before
    results["finetune_wall_s"] = time.perf_counter() - began
    results["finetune_peak_gb"] = _peak_gb(resource.RUSAGE_CHILDREN)
    results["tick_ms"] = _ticks(model, day)
    results["tick_peak_gb"] = _peak_gb(resource.RUSAGE_SELF)
    results |= _decompositions()
    json.dump(results, sys.stdout)


def _day() -> History:
    counts = synthetic.functions(_DISTINCT, 1440, seed=1).trace.history.counts
    names = tuple(f"s{number}" for number in range(NUM_SERIES))
    return History(names, 0, np.tile(counts, (NUM_SERIES // _DISTINCT, 1)))


def _ticks(model: Any, day: History) -> list[float]:
    """Milliseconds of each tick; none where the model follows nothing."""
    if not hasattr(model, "follow"):
        return []
    follower = model.follow(day.names, 0)
    for counts in day.counts.T[:120]:
        follower.advance(counts)
    times = []
    for counts in day.counts.T[120 : 120 + _TICKS]:
        began = time.perf_counter()
        follower.advance(counts)
        _ = follower.forecast(LEADS).quantiles
        times.append((time.perf_counter() - began) * 1000)
    return times


def _decompositions() -> dict[str, Any]:
    draw = np.random.default_rng(0)
    hours = np.arange(_HOURS)
    day = np.sin(2 * np.pi * (hours / 24 + draw.random((NUM_SERIES, 1))))
    rates = 10 ** draw.uniform(-2, 2, (NUM_SERIES, 1)) * (1.2 + day)
    values = (draw.poisson(60 * rates) / 60).astype(np.float32)
    refits = [_timed(lambda: decompose(values, 0)) for _ in range(_REFITS)]
    rows = values[:: NUM_SERIES // _PROPHET_SERIES].astype(np.float64)
    fit_prophet(rows[0], 0, 24, 60)
    prophets = [_timed(lambda row=row: fit_prophet(row, 0, 24, 60)) for row in rows]  # type: ignore[misc]
    return {"refit_s": refits, "prophet_s": statistics.median(prophets)}


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _cpu_s() -> float:
    children, own = (
        resource.getrusage(who) for who in (resource.RUSAGE_CHILDREN, resource.RUSAGE_SELF)
    )
    return children.ru_utime + children.ru_stime + own.ru_utime + own.ru_stime


def _peak_gb(who: int) -> float:
    return resource.getrusage(who).ru_maxrss * 1024 / 1e9


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "auto")
