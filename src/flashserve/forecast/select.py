"""Which forecaster speaks for each series: the one whose decisions would have cost least so far.

A rolling-origin backtest, made while following: before each minute every candidate has said its
chance of an arrival; after it, each has cost a cold start, or the idle minute that it asked for, or
nothing. That is counted for each series and for each cohort, at several prices of a cold start, and
fades. A series of under 20 arrivals takes its cohort's best; with more, its own costs count ever
more. One without any arrival follows ski rental.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flashserve.forecast.cohorts import GROUPS, MIN_ACTIVE, NEW
from flashserve.forecast.core import Floats
from flashserve.forecast.decisions import fixed_threshold
from flashserve.forecast.scores import log_loss

Bools = npt.NDArray[np.bool_]
Codes = npt.NDArray[np.int8]

# Prices of a cold start, in idle minutes, that costs are averaged over.
PRICES = (5, 10, 30, 60)
_SERIES_FADING = 0.5 ** (1 / (3 * 1440))
_COHORT_FADING = 0.5 ** (1 / (7 * 1440))
# The cohort's costs count as much as so many arrivals of the series' own.
_COHORT_ARRIVALS = 200.0
# Before a cohort has costs: candidates that know more are supposed to be this much cheaper.
_PRIOR_COST = 20.0
_PRIOR_RATIOS = {"hybrid": 0.90, "hazard": 0.95}
# Of series without any arrival, where the first candidate is supposed to be the best.
_PRIOR_OF_FIRST = 0.85
# Another candidate must be cheaper by this much to take over.
_HYSTERESIS = 0.1
# What a nat of log loss adds to a cost, so that decisions that are equal do not hide worse odds.
_LOSS_SHARE = 0.2

_THRESHOLDS = np.sort([fixed_threshold(price) for price in PRICES])


def _costs() -> tuple[Floats, Floats]:
    """By how many of the ascending thresholds a chance exceeds: of a minute with and without."""
    prices = np.sort(PRICES)[::-1]  # the highest price has the lowest threshold
    num = len(prices)
    with_arrival = np.array([(num - above) / num for above in range(num + 1)])
    without = np.array([np.sum(1 / prices[:above]) / num for above in range(num + 1)])
    return with_arrival, without


_WITH_ARRIVAL, _WITHOUT = _costs()


def decision_costs(p: Floats, active: Bools) -> Floats:
    """What a minute cost, in cold starts, mean over PRICES; p: chances said before it."""
    exceeded = np.searchsorted(_THRESHOLDS, p, side="left")
    return np.where(active, _WITH_ARRIVAL[exceeded], _WITHOUT[exceeded])


class Selector:
    """Costs of every candidate, and the choice of each series.

    chosen: [series], the candidate's index. is_own: [series], whether the series' own costs had a
    say in it.
    """

    def __init__(self, names: Sequence[str], num_series: int, first: int) -> None:
        self.chosen = np.full(num_series, first, np.int8)
        self.is_own = np.zeros(num_series, np.bool_)
        # [candidates, series] and [candidates, cohorts].
        self._costs = np.zeros((len(names), num_series))
        ratios = np.array([_PRIOR_RATIOS.get(name, 1.0) for name in names])
        self._cohort_costs = np.tile(_PRIOR_COST * ratios[:, None], (1, len(GROUPS)))
        self._cohort_costs[first, GROUPS.index(NEW)] = _PRIOR_COST * _PRIOR_OF_FIRST
        self._num_arrivals = np.zeros(num_series)

    def learn(self, p: Floats, active: Bools, is_known: Bools, cohorts: Codes) -> None:
        """Count a minute; p: [candidates, series], chances said before it."""
        loss = log_loss(p, active.astype(np.float64))
        cost = np.where(is_known, decision_costs(p, active) + _LOSS_SHARE * loss, 0.0)
        self._costs = self._costs * np.where(is_known, _SERIES_FADING, 1.0) + cost
        self._num_arrivals = self._num_arrivals * _SERIES_FADING + (active & is_known)
        of_cohort = cohorts[:, None] == np.arange(len(GROUPS))
        self._cohort_costs = self._cohort_costs * _COHORT_FADING + cost @ of_cohort

    def choose(
        self, rows: npt.NDArray[np.intp], num_active: npt.NDArray[np.int64], cohorts: Codes
    ) -> None:
        """Choose anew for some series; num_active and cohorts: of all series."""
        own = self._costs[:, rows]
        mean = own.mean(axis=0)
        own = own / np.where(mean > 0, mean, 1.0)
        shared = self._cohort_costs / self._cohort_costs.mean(axis=0)
        weight = np.where(num_active[rows] >= MIN_ACTIVE, self._num_arrivals[rows], 0.0)
        weight = np.where(mean > 0, weight / (weight + _COHORT_ARRIVALS), 0.0)
        score = weight * own + (1 - weight) * shared[:, cohorts[rows]]
        now = self.chosen[rows].astype(np.intp)
        best = score.argmin(axis=0)
        at = np.arange(len(rows))
        takes_over = score[best, at] < (1 - _HYSTERESIS) * score[now, at]
        self.chosen[rows] = np.where(takes_over | (num_active[rows] == 1), best, now)
        self.is_own[rows] = weight > 0
