"""Traces in columns: the compact parquet forms of public traces. Needs pyarrow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from flashserve.errors import InputError
from flashserve.forecast.core import History
from flashserve.forecast.servegen import draw_arrivals
from flashserve.forecast.traces import Trace, check_size, from_events

_MAX_TIME_S = 1e11
_MAX_COUNT = 1e9
_WINDOW_S = 600
_OPTIONAL = ("iat_dist", "model")

Columns = dict[str, npt.NDArray[Any]]


def read(path: Path, seed: int) -> Trace:
    """Raises InputError: names the row, counted from 1, and what is wrong with it."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError("reading parquet needs pyarrow: install flashserve[forecast]") from None
    try:
        table = pyarrow.parquet.ParquetFile(path)
        names = set(table.schema_arrow.names)
        for wanted, make in _FORMATS:
            if set(wanted) <= names:
                return make(path, _columns(path, table.read(columns=list(wanted))), seed)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{path} is damaged: {error}") from None
    for wanted, reason in _REFUSED:
        if set(wanted) <= names:
            raise InputError(f"{path} cannot be forecast: {reason}")
    known = "; ".join(", ".join(wanted) for wanted, _ in _FORMATS)
    raise InputError(f"{path} has columns {', '.join(sorted(names))}; known formats have: {known}")


def _columns(path: Path, table: Any) -> Columns:
    columns: Columns = {}
    for name in table.column_names:
        column = table.column(name).combine_chunks()
        if column.null_count and name not in _OPTIONAL:
            row = int(np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False))[0]) + 1
            raise InputError(f"{path}, row {row}: no {name}")
        if name == "counts":
            columns[name] = _matrix(path, column)
        else:
            columns[name] = column.to_numpy(zero_copy_only=False)
    return columns


def _matrix(path: Path, column: Any) -> npt.NDArray[np.float32]:
    """Lists of one length as [rows, minutes]."""
    lengths = column.value_lengths().to_numpy(zero_copy_only=False)
    if not len(lengths):
        raise InputError(f"{path} has no rows")
    if (wrong := np.flatnonzero(lengths != lengths[0])).size:
        row = int(wrong[0])
        raise InputError(f"{path}, row {row + 1}: {lengths[row]} counts instead of {lengths[0]}")
    check_size(path, len(lengths), int(lengths[0]))
    values = column.flatten().to_numpy(zero_copy_only=False).astype(np.float64)
    matrix = values.reshape(len(lengths), int(lengths[0]))
    _check(path, (matrix >= 0) & (matrix <= _MAX_COUNT), "a count is not between 0 and 10^9")
    counts: npt.NDArray[np.float32] = matrix.astype(np.float32)
    return counts


def _check(path: Path, is_good: npt.NDArray[np.bool_], reason: str) -> None:
    if not is_good.all():
        raise InputError(f"{path}, row {int(np.argwhere(~is_good)[0][0]) + 1}: {reason}")


def _minutes(path: Path, seconds: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    _check(path, np.abs(seconds) <= _MAX_TIME_S, "its time is no time in seconds")
    return np.floor(seconds / 60).astype(np.int64)


def _azure_day(path: Path, columns: Columns, _seed: int) -> Trace:
    weights = columns["sample_weight"].astype(np.float64)
    _check(path, (weights >= 0) & (weights <= _MAX_COUNT), "its weight is negative")
    names = tuple(str(name) for name in columns["func_id"])
    return Trace(path.stem, History(names, 0, columns["counts"]), weights)


def _azure_sample(path: Path, columns: Columns, _seed: int) -> Trace:
    ids = zip(columns["HashOwner"], columns["HashApp"], columns["HashFunction"], strict=True)
    names = tuple("/".join(str(part) for part in parts) for parts in ids)
    return Trace(path.stem, History(names, 0, columns["counts"]), np.ones(len(names)))


def _azure_2021(path: Path, columns: Columns, _seed: int) -> Trace:
    names = [f"{app}/{func}" for app, func in zip(columns["app"], columns["func"], strict=True)]
    return from_events(path, names, _minutes(path, columns["end_timestamp"] - columns["duration"]))


def _of_seconds(column: str, per_s: float, series: str | None) -> Callable[..., Trace]:
    """Requests with a time; `series` is the column that tells whose, None where there is one."""

    def make(path: Path, columns: Columns, _seed: int) -> Trace:
        minutes = _minutes(path, columns[column].astype(np.float64) / per_s)
        names = (
            [path.stem] * len(minutes)
            if series is None
            else [str(name) for name in columns[series]]
        )
        return from_events(path, names, minutes, clients=True)

    return make


def _of_minutes(
    column: str, series: str | None, scale: float = 1, unit: str = "arrivals"
) -> Callable[..., Trace]:
    """Counts of minutes; `series` is the column that tells whose, None where there is one."""

    def make(path: Path, columns: Columns, _seed: int) -> Trace:
        counts = columns[column].astype(np.float64) * scale
        _check(path, (counts >= 0) & (counts <= _MAX_COUNT), f"{column} is not between 0 and 10^9")
        minutes = columns["minute"].astype(np.int64)
        names = (
            [path.stem] * len(minutes)
            if series is None
            else [str(name) for name in columns[series]]
        )
        return from_events(path, names, minutes, counts, unit=unit)

    return make


def _servegen(path: Path, columns: Columns, seed: int) -> Trace:
    """Draws the arrivals of each client from its windows' distributions; see `servegen`.

    Windows in which all clients of a model are idle are gaps of the collection: NaN. The trace
    begins with the first window that the file has, which in a later part of a trace is not 0.
    """
    rates = columns["rate_rps"].astype(np.float64)
    _check(path, (rates >= 0) & (rates * _WINDOW_S <= _MAX_COUNT), "rate_rps is no rate")
    windows = columns["window_s"].astype(np.int64)
    _check(path, (windows >= 0) & (windows % _WINDOW_S == 0), "window_s is no multiple of 600")
    ids = np.array(
        [f"{m}/{c:03d}" for m, c in zip(columns["model"], columns["client"], strict=True)]
    )
    names, rows = np.unique(ids, return_inverse=True)
    first = int(windows.min()) // _WINDOW_S
    num_windows = int(windows.max()) // _WINDOW_S + 1 - first
    check_size(path, len(names), num_windows * 10)
    at = (rows, windows // _WINDOW_S - first)
    by_window = {
        key: _placed((len(names), num_windows), at, columns[key].astype(np.float64))
        for key in ("rate_rps", "p1", "p2")
    }
    is_gamma = _placed((len(names), num_windows), at, columns["iat_dist"] == "Gamma") > 0
    counts = draw_arrivals(by_window["rate_rps"], by_window["p1"], is_gamma, seed)
    models = np.array([name.split("/")[0] for name in names])
    busy = np.nan_to_num(by_window["rate_rps"]) > 0
    for model in np.unique(models):
        own = models == model
        collected = np.repeat(busy[own].any(axis=0), 10)
        counts[np.ix_(own, ~collected)] = np.nan
    history = History(tuple(str(name) for name in names), first * 10, counts)
    return Trace(path.stem, history, np.ones(len(names)), clients=True)


def _placed(
    shape: tuple[int, int],
    at: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]],
    values: npt.NDArray[Any],
) -> npt.NDArray[np.float64]:
    filled = np.zeros(shape)
    filled[at] = values
    return filled


_FORMATS: tuple[tuple[tuple[str, ...], Callable[..., Trace]], ...] = (
    (("func_id", "sample_weight", "counts"), _azure_day),
    (("HashOwner", "HashApp", "HashFunction", "counts"), _azure_sample),
    (("app", "func", "end_timestamp", "duration"), _azure_2021),
    (("model", "client", "window_s", "rate_rps", "iat_dist", "p1", "p2"), _servegen),
    (("region", "minute", "events"), _of_minutes("events", "region")),
    (("minute", "invocations"), _of_minutes("invocations", None)),
    (("minute", "tokens_per_s"), _of_minutes("tokens_per_s", None, 60, "tokens")),
    (("t_s", "model", "predict_type"), _of_seconds("t_s", 1, "model")),
    (("t_s", "input_tokens", "output_tokens"), _of_seconds("t_s", 1, None)),
    (("t_ms", "input_tokens", "output_tokens"), _of_seconds("t_ms", 1000, None)),
)
_REFUSED = (
    (("day", "requests"), "it counts days, and forecasts are of minutes"),
    (("in_mean", "out_mean"), "it has lengths of requests, and no arrivals"),
    (("latency_ms", "kind"), "it has latencies, and no arrivals"),
    (("qps", "container"), "it samples a rate now and then, and has no minutes"),
)
