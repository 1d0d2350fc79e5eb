"""Forecasts for a simulation: each simulated minute, what the live forecaster would have said.

They depend on the arrivals alone, so they can be made in a process beside the simulation, ahead of
it (`forecasts_apart`); the events are the same. `broken_forecasts` are those of a forecaster that
lies or dies.
"""

from __future__ import annotations

import enum
import math
import multiprocessing
import multiprocessing.connection
import queue
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import msgspec
import numpy as np

from flashserve.errors import InputError, UnavailableError
from flashserve.forecast.core import ArrivalModel, FollowingModel, History
from flashserve.forecast.forecaster import Forecaster
from flashserve.messages.events import FORECASTS_PER_EVENT, Event, ForecastReady
from flashserve.sim.workload import Workload
from flashserve.types import ModelId, SeriesForecast

LEADS_S = (60.0, 120.0, 300.0, 600.0, 1200.0, 1800.0, 3600.0)
DELAY_S = 0.5
"""From the end of a minute to its forecasts."""
_MINUTE_S = 60.0
_NUM_AHEAD = 64
"""Minutes that the process beside may be ahead of the simulation."""
_STOP_S = 5.0

Timed = tuple[float, Event]


def forecast_events(
    model: ArrivalModel,
    workload: Workload,
    *,
    past: History | None = None,
    leads_s: Sequence[float] = LEADS_S,
    chunk: int = FORECASTS_PER_EVENT,
) -> Iterator[Timed]:
    """ForecastReady events at the end of each simulated minute, in order.

    Said are series whose forecast changed, and those of `Forecaster.told_again`, as in a server.

    Args:
        model: fitted.
        past: minutes of the same models before time 0, which are known then.

    Raises:
        InputError: the model cannot follow minutes, or the past is of other models.
    """
    history = workload.minute_counts()
    for minute, said in _said(model, history, past, leads_s):
        yield from _events(minute, said, chunk)


def forecasts_apart(
    model: ArrivalModel,
    workload: Workload,
    *,
    past: History | None = None,
    leads_s: Sequence[float] = LEADS_S,
    chunk: int = FORECASTS_PER_EVENT,
) -> Iterator[Timed]:
    """The same events as `forecast_events`, made in a process beside this one, ahead of it.

    The process ends with the iterator.

    Raises:
        InputError: as `forecast_events`.
        UnavailableError: the process failed.
    """
    _check(model, workload.minute_counts(), past)
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    arguments = (there, model, workload.minute_counts(), past, tuple(leads_s))
    process = context.Process(target=_send, args=arguments, daemon=True)
    process.start()
    there.close()
    frames: queue.Queue[bytes | None] = queue.Queue(_NUM_AHEAD)
    is_over = threading.Event()
    reader = threading.Thread(target=_receive, args=(here, frames, is_over), daemon=True)
    reader.start()
    decoder = msgspec.msgpack.Decoder(tuple[int, list[SeriesForecast]])
    minute = -1
    try:
        while (frame := frames.get()) is not None:
            minute, said = decoder.decode(frame)
            yield from _events(minute, said, chunk)
        process.join(_STOP_S)
        if process.exitcode != 0:
            raise UnavailableError(
                f"the forecasting process ended with status {process.exitcode} after minute "
                f"{minute}: its error output says why"
            )
    finally:
        is_over.set()
        process.terminate()
        process.join(_STOP_S)
        while reader.is_alive():
            try:
                frames.get_nowait()
            except queue.Empty:
                reader.join(0.01)
        here.close()
        process.close()


class Fault(enum.StrEnum):
    """What is wrong with a forecaster."""

    HUGE = "always 10^9"
    ZERO = "always 0"
    NAN = "not a number"
    DEAD = "dead"


def broken_forecasts(
    fault: Fault,
    models: Iterable[ModelId],
    duration_s: float,
    *,
    healthy: Iterable[Timed] = (),
    from_s: float = 0.0,
    chunk: int = FORECASTS_PER_EVENT,
) -> Iterator[Timed]:
    """The events of `healthy` until from_s; from then on the same lie about every model."""
    for at, event in healthy:
        if at >= from_s:
            break
        yield at, event
    if fault is Fault.DEAD:
        return
    names = list(models)
    for minute in range(math.ceil(from_s / _MINUTE_S), int(duration_s // _MINUTE_S)):
        made_at = (minute + 1) * _MINUTE_S
        yield from _events(minute, [_lie(fault, name, made_at) for name in names], chunk)


def _lie(fault: Fault, series: ModelId, made_at: float) -> SeriesForecast:
    value = {Fault.HUGE: 1e9, Fault.ZERO: 0.0, Fault.NAN: math.nan}[fault]
    counts = (value,) * len(LEADS_S)
    chances = (1.0 if fault is Fault.HUGE else value,) * len(LEADS_S)
    return SeriesForecast(series, made_at, LEADS_S, chances, counts, counts, f"lies: {fault}")


def _events(minute: int, said: list[SeriesForecast], chunk: int) -> Iterator[Timed]:
    """What is known when minute `minute` has passed."""
    at = (minute + 1) * _MINUTE_S + DELAY_S
    for begin in range(0, len(said), chunk):
        yield at, ForecastReady(tuple(said[begin : begin + chunk]))


def _said(
    model: ArrivalModel, history: History, past: History | None, leads_s: Sequence[float]
) -> Iterator[tuple[int, list[SeriesForecast]]]:
    """After each minute of the history, the forecasts that changed."""
    following = _check(model, history, past)
    num_past = 0 if past is None else past.counts.shape[1]
    forecaster = Forecaster(following, -num_past)
    for name in history.names:
        forecaster.watch(name)
    if past is not None:
        for number in range(num_past):
            _close(forecaster, past, number, number - num_past)
    for minute in range(history.counts.shape[1]):
        arrived = _close(forecaster, history, minute, minute)
        yield minute, forecaster.forecasts(leads_s, forecaster.told_again(arrived))


def _close(forecaster: Forecaster, history: History, column: int, minute: int) -> list[str]:
    """Tell of a minute; the series of which something arrived."""
    counts = history.counts[:, column]
    rows = np.flatnonzero(counts).tolist()
    for row in rows:
        forecaster.observe_minute(history.names[row], minute, float(counts[row]))
    forecaster.close_minute()
    return [history.names[row] for row in rows]


def _check(model: ArrivalModel, history: History, past: History | None) -> FollowingModel:
    if not hasattr(model, "follow"):
        raise InputError(f"the forecaster {model.name} cannot follow minutes as they come")
    if past is not None and past.names != history.names:
        raise InputError("the past that the forecaster is to know is of other models")
    return cast("FollowingModel", model)


def _send(
    pipe: multiprocessing.connection.Connection,
    model: ArrivalModel,
    history: History,
    past: History | None,
    leads_s: Sequence[float],
) -> None:
    """The other process."""
    encoder = msgspec.msgpack.Encoder()
    for frame in _said(model, history, past, leads_s):
        pipe.send_bytes(encoder.encode(frame))
    pipe.close()


def _receive(
    pipe: multiprocessing.connection.Connection,
    frames: queue.Queue[bytes | None],
    is_over: threading.Event,
) -> None:
    """Takes frames from the pipe so that it never fills; None is put after the last one."""
    while not is_over.is_set():
        try:
            frames.put(pipe.recv_bytes())
        except (EOFError, OSError):
            break
    frames.put(None)
