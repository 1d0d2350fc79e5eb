"""The paper's hybrid (Prophet and an LSTM on its residual) beside FlashServe's, and Prophet alone.

Prophet takes a tenth of a second to seconds for each series and fit, so a seeded draw of each
trace's series stands for all; both models are judged on the same ones. Its fits are remembered
between seeds, which change the LSTM alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np

from flashserve.forecast import scores
from flashserve.forecast.backtest import LEADS, Split
from flashserve.forecast.core import ArrivalModel, Floats, known_counts
from flashserve.forecast.decomposition import binned, decompose
from flashserve.forecast.prophet import ProphetLstm, fit_prophet
from flashserve.forecast.traces import DAY, Trace
from forecast_judge import (
    COUNT_STEP,
    Counted,
    Measured,
    Reactive,
    chosen_rows,
    count_figures,
    count_forecasts,
    interval_over,
    row_means,
    scale_of,
)

PAPER = "prophet-lstm"
_HOUR = 60
_FORECAST_HOURS = 24
_MAX_HOURS = 14 * 24
_LEAST_PER_MINUTE = 1e-3


class RememberedFits:
    """`fit_prophet` that fits the same values once."""

    def __init__(self) -> None:
        self._fits: dict[tuple[bytes, int, int], tuple[Floats, Floats]] = {}

    def __call__(self, values: Floats, start: int, num_ahead: int) -> tuple[Floats, Floats]:
        key = (values.tobytes(), start, num_ahead)
        if key not in self._fits:
            self._fits[key] = fit_prophet(values, start, num_ahead)
        return self._fits[key]


def drawn(parts: Split, at_most: int) -> Split:
    """The split with few of its series, the same for every seed; one trace is its own past."""
    future = _few(parts.future, at_most)
    past = future if parts.past is parts.future else _few(parts.past, at_most)
    return dataclasses.replace(parts, past=past, future=future)


def _few(trace: Trace, at_most: int) -> Trace:
    """Of the series that had any arrivals in the first two thirds, where there are enough."""
    rows = np.zeros(len(trace.weights), np.bool_)
    before = trace.history.counts[:, : 2 * trace.history.counts.shape[1] // 3]
    busy = np.flatnonzero(np.nansum(before, axis=1) > 0)
    rows[busy[chosen_rows(len(busy), at_most)]] = True
    return trace.select(rows)


def paper_model(seed: int, fits: RememberedFits) -> ArrivalModel:
    return ProphetLstm(seed, fit_one=fits)


def busy_figures(
    trace: str, parts: Split, models: dict[str, ArrivalModel], seed: int, resamples: int
) -> Iterator[Measured]:
    """How many would come, of series that are always busy: each fitted model on the same split."""
    past, future = parts.past.history, parts.future.history
    reactive = Reactive(past.counts, parts.fit_until, parts.tune_until)
    last = future.counts.shape[1]
    minutes = np.arange(parts.report_from, last, COUNT_STEP)
    theirs = reactive.said(future.counts, minutes)
    scale = scale_of(future.counts[:, : parts.report_from])
    num_series = len(future.names)
    for name, model in models.items():
        said = count_forecasts(model, parts, parts.report_from, last, of_past=False)
        figures = [
            *count_figures(said, theirs, scale, parts.future.weights, resamples),
            *_distances(said, scale, parts.future.weights, resamples),
        ]
        for figure, interval in figures:
            yield Measured(trace, name, seed, "busy", num_series, figure, interval)


def _distances(
    said: Counted, scale: Floats, weights: Floats, resamples: int
) -> Iterator[tuple[str, scores.Interval]]:
    """Mean distance of the median from what came, over the series' mean count and the lead."""
    for at, lead in enumerate(LEADS):
        off = np.abs(said.quantiles[..., at, 1] - said.came[..., at]) / (scale[:, None] * lead)
        mean = row_means(off)
        known = ~np.isnan(mean)
        yield (
            f"mae_{lead}",
            interval_over(
                lambda chosen, mean=mean, known=known: (  # type: ignore[misc]
                    float(mean[known] @ chosen[known] / max(float(chosen[known].sum()), 1e-12))
                ),
                np.arange(len(weights)),
                weights,
                resamples,
            ),
        )


def daily_errors(trace: Trace, at_most: int, seed: int = 0) -> tuple[Floats, Floats]:
    """Mean absolute errors of the day ahead, by decomposition and by Prophet: [series] each.

    In hours, from the same past of up to two weeks, forecast twice: at two thirds of the trace,
    and a day before its end. Over each series' mean.
    """
    hours = binned(known_counts(trace.history.counts), _HOUR)
    usable = np.flatnonzero(np.nan_to_num(hours).sum(axis=1) > 0)
    hours = hours[usable[chosen_rows(len(usable), at_most, seed)]]
    num_hours = hours.shape[1]
    errors: list[list[Floats]] = [[], []]
    for origin in sorted({2 * num_hours // 3, num_hours - _FORECAST_HOURS}):
        first = max(origin - _MAX_HOURS, 0)
        past = hours[:, first:origin]
        came = hours[:, origin : origin + _FORECAST_HOURS]
        if past.shape[1] < _FORECAST_HOURS or not came.shape[1]:
            continue
        start = trace.history.start + first * _HOUR
        ahead = start + (past.shape[1] + np.arange(came.shape[1], dtype=np.int64)) * _HOUR
        ours = decompose(past, start).values(ahead)
        theirs = np.stack(
            [fit_prophet(row, start, came.shape[1], _HOUR)[1] for row in past.astype(np.float64)]
        )
        scale = np.maximum(row_means(past.astype(np.float64)), _LEAST_PER_MINUTE)
        for kept, said in zip(errors, (ours, theirs), strict=True):
            kept.append(row_means(np.abs(np.maximum(said, 0) - came)) / scale)
    if not errors[0]:
        return np.zeros(0), np.zeros(0)
    means = [row_means(np.stack(kept, axis=1)) for kept in errors]
    known = np.isfinite(means[0]) & np.isfinite(means[1])
    return means[0][known], means[1][known]


def mae_ratio(ours: Floats, theirs: Floats, resamples: int) -> scores.Interval:
    """The decomposition's mean error over Prophet's, over series."""

    def ratio(chosen: Floats) -> float:
        total = float(chosen @ theirs)
        return float(chosen @ ours) / total if total else float("nan")

    return interval_over(ratio, np.arange(len(ours)), np.ones(len(ours)), resamples)


def spans_days(trace: Trace) -> bool:
    return trace.history.counts.shape[1] > DAY
