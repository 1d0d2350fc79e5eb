"""The paper's hybrid (Prophet and an LSTM on its residual) beside FlashServe's, and Prophet alone.

Prophet takes a tenth of a second to seconds for each series and fit, so a seeded draw of each
trace's series stands for all; both models are judged on the same ones. Its fits are remembered
between seeds, which change the LSTM alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence

import numpy as np

from flashserve.forecast import backtest, scores, summary
from flashserve.forecast.backtest import LEADS, Forecasts, Split
from flashserve.forecast.core import Floats, known_counts
from flashserve.forecast.decomposition import binned, decompose
from flashserve.forecast.prophet import ProphetLstm, fit_prophet
from flashserve.forecast.traces import DAY, Trace
from forecast_counts import busy_figures
from forecast_judge import (
    Measured,
    Peers,
    Runs,
    chosen_rows,
    interval_over,
    judged,
    row_means,
    say,
)
from forecast_traces import ALWAYS_BUSY, SPARSE, Traces

ALL = "all traces"
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
    """The split with few of its series, the same for every seed.

    Of the reported ones that had any arrivals before; fitted on the same where they have a past,
    else on as many others.
    """
    future = _few(parts.future, at_most)
    reported = set(future.history.names)
    shared = np.array([name in reported for name in parts.past.history.names])
    past = parts.past.select(shared) if shared.any() else _few(parts.past, at_most)
    return dataclasses.replace(parts, past=past, future=future)


def _few(trace: Trace, at_most: int) -> Trace:
    rows = np.zeros(len(trace.weights), np.bool_)
    before = trace.history.counts[:, : 2 * trace.history.counts.shape[1] // 3]
    busy = np.flatnonzero(np.nansum(before, axis=1) > 0)
    rows[busy[chosen_rows(len(busy), at_most)]] = True
    return trace.select(rows)


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


def _spans_days(trace: Trace) -> bool:
    return trace.history.counts.shape[1] > DAY


def beside(
    candidate: str, found: Traces, runs: Runs, seeds: Sequence[int], at_most: int, resamples: int
) -> Iterator[Measured]:
    """Both hybrids on the same few series of every trace of more than a day.

    The arrivals and the candidate are those of the first seed; seeds are of the paper's LSTM.
    """
    fits = RememberedFits()
    for source in SPARSE:
        parts = found.sparse(source, seeds[0])
        if parts is None or not _spans_days(parts.future):
            continue
        few = drawn(parts, at_most)
        peers = Peers(few)
        label = f"{source.name} ({len(few.future.weights)} series)"
        ours = runs.forecasts(candidate, source.name, parts, seeds[0])
        ours = of_drawn(ours, parts, few)
        yield from judged(label, few, peers, ours, seeds[0], resamples)
        for seed in seeds:
            say(f"seed {seed}: {PAPER} on {label}")
            theirs = backtest.run_model(ProphetLstm(seed, fit_one=fits), few)
            yield from judged(label, few, peers, theirs, seed, resamples)
            yield from _direct(label, candidate, seed, ours, theirs, few, resamples)
    for source in ALWAYS_BUSY:
        parts = found.busy(source, seeds[0])
        if parts is None or not _spans_days(parts.future):
            continue
        few = drawn(parts, at_most // 2)
        past = few.past
        label = f"{source.name} ({len(few.future.weights)} busy series)"
        model = runs.fitted(candidate, source.name, parts, seeds[0])
        yield from busy_figures(label, few, model, seeds[0], resamples)
        for seed in seeds:
            say(f"seed {seed}: {PAPER} on {label}")
            paper = ProphetLstm(seed, fit_one=fits)
            paper.fit(past.history.before(past.history.start + few.fit_until), past.weights)
            yield from busy_figures(label, few, paper, seed, resamples)


def of_drawn(said: Forecasts, parts: Split, few: Split) -> Forecasts:
    """What was said of the series of `few`; the thresholds are those of all."""
    wanted = set(few.future.history.names)
    rows = [at for at, name in enumerate(parts.future.history.names) if name in wanted]
    return Forecasts(said.model, said.p[rows], said.thresholds)


def _direct(
    trace: str,
    candidate: str,
    seed: int,
    ours: Forecasts,
    theirs: Forecasts,
    parts: Split,
    resamples: int,
) -> Iterator[Measured]:
    """Log losses of one model over those of the other."""
    losses = [backtest.losses(said, parts) for said in (ours, theirs)]
    weights = parts.future.weights
    rows = np.arange(len(weights))
    for at, lead in enumerate(LEADS):
        interval = _ratio_of_means(losses[0][:, at], losses[1][:, at], rows, weights, resamples)
        name = f"{candidate}/{PAPER}"
        yield Measured(trace, name, seed, "all", len(rows), f"logloss_{lead}", interval)


def _ratio_of_means(
    ours: Floats, theirs: Floats, rows: np.ndarray, weights: Floats, resamples: int
) -> scores.Interval:
    def ratio(chosen: Floats) -> float:
        other = summary.mean_loss(theirs, chosen)
        return summary.mean_loss(ours, chosen) / other if other else float("nan")

    return interval_over(ratio, rows, weights, resamples)


def decompositions(found: Traces, at_most: int, resamples: int) -> Iterator[Measured]:
    """The decomposition beside Prophet on every trace of three days, and on all of them together.

    The last one is of all.
    """
    every: list[tuple[Floats, Floats]] = []
    sparse = [(source, source.name, found.sparse) for source in SPARSE]
    busy = [(source, f"{source.name}, busy", found.busy) for source in ALWAYS_BUSY]
    for source, label, choose in sparse + busy:
        parts = choose(source, 0)
        if parts is None or parts.future.history.counts.shape[1] < 3 * DAY:
            continue
        say(f"decomposition beside Prophet on {label}")
        errors = daily_errors(parts.future, at_most)
        every.append(errors)
        yield from _mae(label, *errors, resamples)
    if every:
        ours, theirs = (np.concatenate([pair[side] for pair in every]) for side in (0, 1))
        yield from _mae(ALL, ours, theirs, resamples)


def _mae(trace: str, ours: Floats, theirs: Floats, resamples: int) -> Iterator[Measured]:
    if not len(ours):
        return
    rows, weights = np.arange(len(ours)), np.ones(len(ours))
    interval = _ratio_of_means(ours, theirs, rows, weights, resamples)
    yield Measured(trace, "decomposition/prophet", 0, "all", len(rows), "mae_day", interval)
    better = float(np.median(ours / np.maximum(theirs, 1e-12)))
    middle = scores.Interval(better, better, better)
    yield Measured(trace, "decomposition/prophet", 0, "all", len(rows), "median_mae_day", middle)
