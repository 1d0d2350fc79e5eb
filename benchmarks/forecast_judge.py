"""Figures of forecasts on one split, with their intervals: what benchmarks/forecast.py reports."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from flashserve.forecast import backtest, decisions, registry, scores, summary
from flashserve.forecast.backtest import COLD_COSTS, COLD_SHARES, LEADS, Forecasts, Split
from flashserve.forecast.core import ArrivalModel, Floats
from flashserve.forecast.decisions import Outcome

EWMAS = tuple(f"ewma-{half_life}" for half_life in registry.EWMA_HALF_LIVES)


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
            return decisions.idle_over(float(ours.idle_minutes(weights)), best)

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


def row_means(values: Floats) -> Floats:
    """Over the minutes that are known; NaN where there are none."""
    known = np.isfinite(values)
    num_known = known.sum(axis=1)
    total = np.where(known, values, 0.0).sum(axis=1)
    return np.where(num_known > 0, total / np.maximum(num_known, 1), np.nan)


class Runs:
    """Models on splits; what one part ran is there for the next."""

    def __init__(self) -> None:
        self._forecasts: dict[tuple[str, str, int], Forecasts] = {}
        self._fitted: dict[tuple[str, str, int], ArrivalModel] = {}

    def forecasts(self, name: str, trace: str, parts: Split, seed: int) -> Forecasts:
        """P(arrival) of every reported minute of the series that come and go."""
        key = (name, trace, seed)
        if key not in self._forecasts:
            say(f"seed {seed}: {trace}: {name}")
            [model] = registry.make_models([name], seed)
            self._forecasts[key] = backtest.run_model(model, parts)
        return self._forecasts[key]

    def fitted(self, name: str, trace: str, parts: Split, seed: int) -> ArrivalModel:
        """The model, fitted to the series that are always busy."""
        key = (name, trace, seed)
        if key not in self._fitted:
            say(f"seed {seed}: counts of {trace}: {name}")
            [model] = registry.make_models([name], seed)
            past = parts.past
            model.fit(past.history.before(past.history.start + parts.fit_until), past.weights)
            self._fitted[key] = model
        return self._fitted[key]


def judged(
    trace: str, parts: Split, peers: Peers, said: Forecasts, seed: int, resamples: int
) -> Iterator[Measured]:
    for cohort, num_series, figure, interval in Judge(parts, peers, said, resamples).figures():
        yield Measured(trace, said.model, seed, cohort, num_series, figure, interval)


def say(line: str) -> None:
    print(line, flush=True)


def chosen_rows(num_series: int, at_most: int, seed: int = 0) -> Sequence[int]:
    """A seeded draw of at most so many series, in order."""
    return sorted(np.random.default_rng(seed).permutation(num_series)[:at_most].tolist())
