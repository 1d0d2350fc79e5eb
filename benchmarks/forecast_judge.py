"""Figures of forecasts on one split, with their intervals: what benchmarks/forecast.py reports."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from flashserve.forecast import backtest, decisions, registry, scores, summary
from flashserve.forecast.backtest import COLD_COSTS, COLD_SHARES, LEADS, Forecasts, Split
from flashserve.forecast.core import QUANTILE_LEVELS, ArrivalModel, Floats
from flashserve.forecast.decisions import Outcome

EWMAS = tuple(f"ewma-{half_life}" for half_life in registry.EWMA_HALF_LIVES)
# The levels that replicas are planned by, and every how many minutes busy series are forecast.
UPPER = (0.9, 0.99)
COUNT_STEP = 5
_WINDOWS = (1, 2, 3, 6, 12, 30)
_HEADROOMS = (0.7, 0.85, 1.0, 1.1, 1.25, 1.5, 2.0)


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """One figure of one model on one trace: by name, with its interval over `num_series`."""

    trace: str
    model: str
    seed: int
    cohort: str
    num_series: int
    figure: str
    interval: scores.Interval

    def row(self) -> dict[str, Any]:
        """What is not finite (nothing to compare with) is None."""
        row = dataclasses.asdict(self)
        bounds = {key: number_or_none(bound) for key, bound in row.pop("interval").items()}
        return row | bounds


def number_or_none(number: float) -> float | None:
    return float(number) if math.isfinite(number) else None


def interval_over(
    figure: Callable[[Floats], float], rows: np.ndarray, weights: Floats, resamples: int
) -> scores.Interval:
    """figure: of the weights of all series, those outside `rows` (indices) being zero."""

    def of_drawn(drawn: Floats) -> float:
        chosen = np.zeros(len(weights))
        chosen[rows] = weights[rows] * drawn
        return figure(chosen)

    return scores.bootstrap(of_drawn, len(rows), seed=0, num_resamples=resamples)


class Peers:
    """What every model is compared with, on one split."""

    def __init__(self, parts: Split) -> None:
        self.keep_alives = backtest.keep_alives(parts)
        outcomes = [backtest.run_policy(policy, parts) for policy in registry.histograms()]
        self.histograms = decisions.stack(outcomes)
        ewmas = registry.make_models(EWMAS, seed=0)
        self.forecasts = [backtest.run_model(model, parts) for model in ewmas]
        self.losses = np.stack([backtest.losses(said, parts) for said in self.forecasts])


class Judge:
    """Intervals of one model's figures on one split."""

    def __init__(self, parts: Split, peers: Peers, forecasts: Forecasts, resamples: int) -> None:
        self._parts, self._peers, self._forecasts = parts, peers, forecasts
        self._resamples = resamples
        self._weights = parts.future.weights
        self._cohorts = np.array(parts.cohorts())

    def figures(self) -> Iterator[tuple[str, int, str, scores.Interval]]:
        """Cohort, number of its series, figure and interval."""
        groups = {"all": np.arange(len(self._weights))}
        groups |= {str(c): np.flatnonzero(self._cohorts == c) for c in np.unique(self._cohorts)}
        losses = backtest.losses(self._forecasts, self._parts)
        for cohort, rows in groups.items():
            for figure, interval in self._of(rows, losses):
                yield cohort, len(rows), figure, interval

    def _of(self, rows: np.ndarray, losses: Floats) -> Iterator[tuple[str, scores.Interval]]:
        def over(figure: Callable[[Floats], float]) -> scores.Interval:
            return interval_over(figure, rows, self._weights, self._resamples)

        for share in COLD_SHARES:
            ours = self._at(self._forecasts.thresholds[share])
            yield f"idle_at_{share * 100:g}pct_cold", over(self._idle(ours))
            yield f"cold_at_{share * 100:g}pct_cold", over(_cold(ours))
        for cold_cost in COLD_COSTS:
            ours = self._at(decisions.fixed_threshold(cold_cost))
            yield f"cost_{cold_cost}", over(self._cost(ours, cold_cost))
        for at, lead in enumerate(LEADS):
            yield f"logloss_ratio_{lead}", over(self._loss(losses[:, at], at))

    def _at(self, threshold: float) -> Outcome:
        return self._forecasts.at_threshold(threshold, self._parts.counts)

    def _idle(self, ours: Outcome) -> Callable[[Floats], float]:
        def ratio(weights: Floats) -> float:
            share = float(ours.cold_share(weights))
            best = min(
                decisions.idle_at(peer.cold_share(weights), peer.idle_minutes(weights), share)
                for peer in (self._peers.keep_alives, self._peers.histograms)
            )
            return float(ours.idle_minutes(weights)) / best if best else float("nan")

        return ratio

    def _cost(self, ours: Outcome, cold_cost: int) -> Callable[[Floats], float]:
        theirs = self._peers.keep_alives
        return lambda weights: summary.cost_ratio(ours, theirs, cold_cost, weights)

    def _loss(self, ours: Floats, at: int) -> Callable[[Floats], float]:
        def ratio(weights: Floats) -> float:
            best = min(summary.mean_loss(theirs[:, at], weights) for theirs in self._peers.losses)
            return summary.mean_loss(ours, weights) / best if best else float("nan")

        return ratio


def _cold(ours: Outcome) -> Callable[[Floats], float]:
    return lambda weights: float(ours.cold_share(weights))


@dataclasses.dataclass(frozen=True, slots=True)
class Counted:
    """What came within each lead of some minutes, and quantiles said before: [series, minutes, K].

    quantiles: [series, minutes, K, QUANTILE_LEVELS]; NaN in `came` where it is not known.
    """

    came: Floats
    quantiles: Floats


def count_forecasts(
    model: ArrivalModel, parts: Split, first: int, last: int, *, of_past: bool
) -> Counted:
    """Forecasts of counts at every fifth minute of the columns [first, last)."""
    history = (parts.past if of_past else parts.future).history
    told = history.before(history.start + last)
    said = [
        prediction.quantiles
        for _, prediction in backtest.forecasts_from(model, told, first, LEADS, COUNT_STEP)
    ]
    minutes = np.arange(first, last, COUNT_STEP)
    return Counted(came_within(told.counts, minutes), np.stack(said, axis=1))


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
        self._best = {
            (lead, level): min(
                ((num, headroom) for num in _WINDOWS for headroom in _HEADROOMS),
                key=lambda how, at=at, lead=lead, level=level: float(  # type: ignore[misc]
                    np.nanmean(
                        pinball_of(
                            how[1] * self._largest(counts, minutes, lead, how[0]),
                            came[..., at],
                            level,
                            scale,
                        )
                    )
                ),
            )
            for at, lead in enumerate(LEADS)
            for level in UPPER
        }

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


def row_means(values: Floats) -> Floats:
    """Over the minutes that are known; NaN where there are none."""
    known = np.isfinite(values)
    num_known = known.sum(axis=1)
    total = np.where(known, values, 0.0).sum(axis=1)
    return np.where(num_known > 0, total / np.maximum(num_known, 1), np.nan)


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


def chosen_rows(num_series: int, at_most: int, seed: int = 0) -> Sequence[int]:
    """A seeded draw of at most so many series, in order."""
    return sorted(np.random.default_rng(seed).permutation(num_series)[:at_most].tolist())
