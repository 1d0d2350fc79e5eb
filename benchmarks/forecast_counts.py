"""How many will come to series that are always busy: quantiles against a reactive maximum."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator

import numpy as np

from flashserve.forecast import backtest, scores, summary
from flashserve.forecast.backtest import LEADS, Split
from flashserve.forecast.core import QUANTILE_LEVELS, ArrivalModel, Floats
from forecast_judge import Measured, interval_over, row_means

# The levels that replicas are planned by, and every how many minutes busy series are forecast.
UPPER = (0.9, 0.99)
COUNT_STEP = 5
_WINDOWS = (1, 2, 3, 6, 12, 30)
_HEADROOMS = (0.7, 0.85, 1.0, 1.1, 1.25, 1.5, 2.0)


def busy_figures(
    trace: str, parts: Split, model: ArrivalModel, seed: int, resamples: int
) -> Iterator[Measured]:
    """What a fitted model says of the reported minutes, beside a reactive maximum."""
    past, future = parts.past.history, parts.future.history
    reactive = Reactive(past.counts, parts.fit_until, parts.tune_until)
    minutes = np.arange(parts.report_from, future.counts.shape[1], COUNT_STEP)
    theirs = reactive.said(future.counts, minutes)
    scale = scale_of(future.counts[:, : parts.report_from])
    weights = parts.future.weights
    said = count_forecasts(model, parts)
    figures = [
        *count_figures(said, theirs, scale, weights, resamples),
        *_distances(said, scale, weights, resamples),
    ]
    for figure, interval in figures:
        yield Measured(trace, model.name, seed, "busy", len(weights), figure, interval)


def _distances(
    said: Counted, scale: Floats, weights: Floats, resamples: int
) -> Iterator[tuple[str, scores.Interval]]:
    """Mean distance of the median from what came, over the series' mean count and the lead."""
    rows = np.arange(len(weights))
    for at, lead in enumerate(LEADS):
        off = np.abs(said.quantiles[..., at, 1] - said.came[..., at]) / (scale[:, None] * lead)
        figure = functools.partial(summary.mean_loss, row_means(off))
        yield f"mae_{lead}", interval_over(figure, rows, weights, resamples)


@dataclasses.dataclass(frozen=True, slots=True)
class Counted:
    """What came within each lead of some minutes, and quantiles said before: [series, minutes, K].

    quantiles: [series, minutes, K, QUANTILE_LEVELS]; NaN in `came` where it is not known.
    """

    came: Floats
    quantiles: Floats


def count_forecasts(model: ArrivalModel, parts: Split) -> Counted:
    """Forecasts of counts at every fifth reported minute."""
    history, first = parts.future.history, parts.report_from
    said = [
        prediction.quantiles
        for _, prediction in backtest.forecasts_from(model, history, first, LEADS, COUNT_STEP)
    ]
    minutes = np.arange(first, history.counts.shape[1], COUNT_STEP)
    return Counted(came_within(history.counts, minutes), np.stack(said, axis=1))


def came_within(counts: np.ndarray, minutes: np.ndarray) -> Floats:
    """Arrivals in [t, t + lead) of each minute t: [series, minutes, LEADS]; NaN if not known."""
    sums = _sums(counts)
    last = counts.shape[1]
    result = np.full((len(counts), len(minutes), len(LEADS)), np.nan)
    for at, lead in enumerate(LEADS):
        known = minutes + lead <= last
        result[:, known, at] = sums(minutes[known], minutes[known] + lead)
    return result


class Reactive:
    """Scaling by what was: the largest of the last windows as long as the lead, times a headroom.

    For each lead and level the number of windows and the headroom are those with the least pinball
    loss on the minutes in which thresholds are fixed, over all series.
    """

    def __init__(self, counts: np.ndarray, first: int, last: int) -> None:
        minutes = np.arange(first, last, COUNT_STEP)
        came = came_within(counts[:, :last], minutes)
        scale = scale_of(counts[:, :first])
        self._best: dict[tuple[int, float], tuple[int, float]] = {}
        for at, lead in enumerate(LEADS):
            largest = {num: self._largest(counts, minutes, lead, num) for num in _WINDOWS}
            for level in UPPER:
                losses = {
                    (num, headroom): float(
                        np.nanmean(pinball_of(headroom * largest[num], came[..., at], level, scale))
                    )
                    for num in _WINDOWS
                    for headroom in _HEADROOMS
                }
                self._best[lead, level] = min(losses, key=losses.__getitem__)

    @staticmethod
    def _largest(counts: np.ndarray, minutes: np.ndarray, lead: int, num_windows: int) -> Floats:
        sums = _sums(np.nan_to_num(counts))
        windows = []
        for back in range(1, num_windows + 1):
            begins = np.maximum(minutes - back * lead, 0)
            windows.append(sums(begins, np.maximum(minutes - (back - 1) * lead, 0)))
        largest: Floats = np.max(windows, axis=0)
        return largest

    def said(self, counts: np.ndarray, minutes: np.ndarray) -> Floats:
        """[series, minutes, LEADS, UPPER]."""
        said = np.empty((len(counts), len(minutes), len(LEADS), len(UPPER)))
        for at, lead in enumerate(LEADS):
            for which, level in enumerate(UPPER):
                num_windows, headroom = self._best[lead, level]
                largest = self._largest(counts, minutes, lead, num_windows)
                said[:, :, at, which] = headroom * largest
        return said


def count_figures(
    ours: Counted, theirs: Floats, scale: Floats, weights: Floats, resamples: int
) -> Iterator[tuple[str, scores.Interval]]:
    """Coverage of the levels, and pinball losses over the reactive ones'.

    theirs: [series, minutes, LEADS, UPPER]; scale: [series], by which counts are divided.
    """
    rows = np.arange(len(weights))

    def over(values: Floats, against: Floats | None = None) -> scores.Interval:
        def figure(chosen: Floats) -> float:
            mean = summary.mean_loss(values, chosen)
            if against is None:
                return mean
            other = summary.mean_loss(against, chosen)
            return mean / other if other else float("nan")

        return interval_over(figure, rows, weights, resamples)

    for at, lead in enumerate(LEADS):
        came = ours.came[..., at]
        for which, level in enumerate(UPPER):
            said = ours.quantiles[..., at, QUANTILE_LEVELS.index(level)]
            known = np.where(np.isnan(came), np.nan, came <= said)
            yield f"coverage_{level * 100:g}_{lead}", over(row_means(known))
            reactive = theirs[..., at, which]
            lost = row_means(pinball_of(reactive, came, level, scale))
            for name, quantile in (("pinball", said), ("max_pinball", np.maximum(said, reactive))):
                mine = row_means(pinball_of(quantile, came, level, scale))
                yield f"{name}_{level * 100:g}_{lead}", over(mine, lost)


def pinball_of(said: Floats, came: Floats, level: float, scale: Floats) -> Floats:
    """[series, minutes], over the scale of each series."""
    return scores.pinball(said[..., None], came, [level])[..., 0] / scale[:, None]


def scale_of(counts: np.ndarray) -> Floats:
    """Mean count of each series, so that none counts more for being large; at least one."""
    known = np.isfinite(counts)
    means = np.where(known, counts, 0).sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    return np.maximum(means, 1.0).astype(np.float64)


def _sums(counts: np.ndarray) -> Callable[[np.ndarray, np.ndarray], Floats]:
    """Of [series, minutes]: the sum over [begin, end) for many of both; NaN if any is not known."""
    known = np.isfinite(counts)
    total = np.pad(
        np.cumsum(np.where(known, counts, 0), axis=1, dtype=np.float64), ((0, 0), (1, 0))
    )
    missing = np.pad(np.cumsum(~known, axis=1), ((0, 0), (1, 0)))

    def over(begins: np.ndarray, ends: np.ndarray) -> Floats:
        values: Floats = total[:, ends] - total[:, begins]
        return np.where(missing[:, ends] > missing[:, begins], np.nan, values)

    return over
