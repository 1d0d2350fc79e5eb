"""When the next arrival is due: the age since the last one against the series' own gaps.

A gap is the number of minutes from one minute with arrivals to the next. Each series keeps a
histogram of its gaps (minute by minute up to half an hour, then in bins that grow by an eighth, to
a week), in which old gaps fade. P(arrival within L | quiet for a) is the share of its gaps longer
than a that end within a + L, drawn towards what series of about its rate do.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flashserve.forecast.core import Floats, History, Prediction, known_counts, replay
from flashserve.forecast.hurdle import hurdle_prediction

Singles = npt.NDArray[np.float32]

MAX_GAP_MINUTES = 10080
# What a gap still weighs after each later gap of its series.
_FADING = np.float32(0.99)
# How many gaps of one's own weigh as much as those of all series of about the same rate.
_POOL_WEIGHT = 4.0
# Rate classes by minutes per active minute, in powers of two.
_NUM_CLASSES = 12
# With fewer known minutes a series is young; what is taken for its rate at first, and how many
# minutes of evidence that weighs.
_YOUNG_MINUTES = 10
_FIRST_RATE, _FIRST_MINUTES = 0.25, 0.5
# How many minutes of evidence what is expected of an age weighs.
_PRIOR_MINUTES = 50.0
_RATE_MEMORY = np.float32(1 - 0.5 ** (1 / 360))


def _edges() -> npt.NDArray[np.int64]:
    edges = list(range(1, 31))
    while edges[-1] < MAX_GAP_MINUTES:
        edges.append(int(edges[-1] * 1.125) + 1)
    return np.array(edges)


# Bin b holds gaps in (EDGES[b - 1], EDGES[b]].
EDGES = _edges()
NUM_BINS = len(EDGES)
_BOUNDS = np.concatenate([[0], EDGES]).astype(np.float64)
_MINUTES = np.arange(MAX_GAP_MINUTES + 1, dtype=np.float64)
# For every whole number of minutes: the bound below it, and how far towards the next one it lies.
_BELOW = np.clip(np.searchsorted(_BOUNDS, _MINUTES, side="right") - 1, 0, NUM_BINS - 1)
_SHARE = np.clip((_MINUTES - _BOUNDS[_BELOW]) / np.diff(_BOUNDS)[_BELOW], 0, 1).astype(np.float32)


class Gaps:
    """Ages and gap histograms of some series, moved on a minute at a time.

    age: [series], quiet minutes since the last minute with arrivals; num_known: minutes known.
    recent: [series, 4], the last gaps, newest first, zero where there were fewer.
    """

    def __init__(self, num_series: int) -> None:
        self.age = np.zeros(num_series, dtype=np.int64)
        self.has_arrived = np.zeros(num_series, dtype=bool)
        self.num_known = np.zeros(num_series, dtype=np.int64)
        self.recent: Singles = np.zeros((num_series, 4), dtype=np.float32)
        self.rate: Singles = np.zeros(num_series, dtype=np.float32)
        # The share of the rate's memory that has been filled, to tell a young rate from a low one.
        self._filled: Singles = np.zeros(num_series, dtype=np.float32)
        # [series, bounds]: gaps at or below each bound of the bins; the last is their number.
        self.at_most: Singles = np.zeros((num_series, NUM_BINS + 1), dtype=np.float32)

    def advance(self, counts: Floats) -> None:
        """One more minute; NaN counts are a minute of which nothing is known but that it passed."""
        known = ~np.isnan(counts)
        active = counts > 0
        self.num_known += known
        self.rate[known] += _RATE_MEMORY * (active[known] - self.rate[known])
        self._filled[known] += _RATE_MEMORY * (1 - self._filled[known])
        (ended,) = np.nonzero(active & self.has_arrived)
        gaps = np.minimum(self.age[ended] + 1, MAX_GAP_MINUTES)
        self.recent[ended, 1:] = self.recent[ended, :-1]
        self.recent[ended, 0] = gaps
        bound = np.searchsorted(EDGES, gaps)
        counted = np.arange(NUM_BINS + 1)[None, :] > bound[:, None]
        self.at_most[ended] = self.at_most[ended] * _FADING + counted
        self.has_arrived |= active
        self.age = np.where(active, 0, np.minimum(self.age + 1, MAX_GAP_MINUTES - 1))

    @property
    def num_gaps(self) -> Singles:
        total: Singles = self.at_most[:, -1]
        return total

    def ended_by(self, minutes: npt.NDArray[np.int64]) -> Singles:
        """Gaps at most this long, of each series its own number of minutes: [series]."""
        rows = np.arange(len(minutes))
        at = np.minimum(minutes, MAX_GAP_MINUTES)
        below = self.at_most[rows, _BELOW[at]]
        above = self.at_most[rows, _BELOW[at] + 1]
        result: Singles = below + (above - below) * _SHARE[at]
        return result

    def due(self, leads: Sequence[int], pool: Pool) -> tuple[Floats, Singles]:
        """P(arrival within each lead), [series, leads], and the own gaps behind it, [series]."""
        so_far = self.ended_by(self.age)
        longer = np.maximum(self.num_gaps - so_far, 0)
        pooled = pool.due(self._likely_class(), self.age, leads)
        p = np.empty((len(self.age), len(leads)))
        for index, lead in enumerate(leads):
            ended = np.maximum(self.ended_by(self.age + lead) - so_far, 0)
            p[:, index] = (ended + _POOL_WEIGHT * pooled[:, index]) / (longer + _POOL_WEIGHT)
        return p, longer

    def rate_class(self) -> npt.NDArray[np.int64]:
        """0 for series active every minute, one more for each halving; the last is never active."""
        return _class_of(self.rate / np.maximum(self._filled, 1e-6))

    def _likely_class(self) -> npt.NDArray[np.int64]:
        """The same, but the first arrival of a young series, with which it began, says nothing of
        how often it is active: judged by it, each would be active every minute.
        """
        share = self.rate / np.maximum(self._filled, 1e-6)
        is_young = self.has_arrived & (self.num_known < _YOUNG_MINUTES)
        known = np.maximum(self.num_known - 1, 0)
        active = np.maximum(share * self.num_known - 1, 0)
        likely = (active + _FIRST_MINUTES * _FIRST_RATE) / (known + _FIRST_MINUTES)
        return _class_of(np.where(is_young, likely, share))


def _class_of(rate: Floats | Singles) -> npt.NDArray[np.int64]:
    halvings = -np.log2(np.maximum(rate, 2.0**-_NUM_CLASSES))
    return np.clip(np.round(halvings), 0, _NUM_CLASSES - 1).astype(np.int64)


class Pool:
    """The hazard that series of about the same rate share: P(active | class, age) per minute.

    exposures and events: [classes, bins of age].
    """

    def __init__(self, exposures: Floats | None = None, events: Floats | None = None) -> None:
        self.exposures = np.zeros((_NUM_CLASSES, NUM_BINS)) if exposures is None else exposures
        self.events = np.zeros((_NUM_CLASSES, NUM_BINS)) if events is None else events

    def count(self, gaps: Gaps, counts: Floats, weights: Floats) -> None:
        """Learn from what the minute that follows `gaps` brought; NaN teaches nothing."""
        known = ~np.isnan(counts) & (gaps.num_known > 0)
        cell = (gaps.rate_class()[known], _BELOW[gaps.age[known]])
        np.add.at(self.exposures, cell, weights[known])
        np.add.at(self.events, cell, weights[known] * (counts[known] > 0))

    def hazard(self) -> Floats:
        """[classes, bins]. Where little was seen of an age, the age before tells.

        It then falls as one over the age, as that of a heavy tail does and as ski rental supposes,
        so that a series that stopped is not due for ever.
        """
        nominal = 2.0 ** -np.arange(_NUM_CLASSES)
        middle = (_BOUNDS[1:] + _BOUNDS[:-1]) / 2
        hazard = np.empty_like(self.exposures)
        expected = nominal
        for index in range(NUM_BINS):
            drawn = self.events[:, index] + _PRIOR_MINUTES * expected
            hazard[:, index] = drawn / (self.exposures[:, index] + _PRIOR_MINUTES)
            following = middle[min(index + 1, NUM_BINS - 1)]
            expected = hazard[:, index] * middle[index] / following
        return hazard

    def due(
        self, classes: npt.NDArray[np.int64], age: npt.NDArray[np.int64], leads: Sequence[int]
    ) -> Floats:
        """P(arrival within each lead) at an age: [series, leads]."""
        # [classes, bounds]: the cumulative hazard up to each bound of the bins.
        per_minute = -np.log1p(-np.clip(self.hazard(), 0, 1 - 1e-9))
        grown = np.cumsum(per_minute * np.diff(_BOUNDS), axis=1)
        cumulative = np.concatenate([np.zeros((_NUM_CLASSES, 1)), grown], axis=1)

        def until(minutes: npt.NDArray[np.int64]) -> Floats:
            at = np.minimum(minutes, MAX_GAP_MINUTES)
            below, above = cumulative[classes, _BELOW[at]], cumulative[classes, _BELOW[at] + 1]
            result: Floats = below + (above - below) * _SHARE[at]
            return result

        so_far = until(age)
        return np.stack([-np.expm1(so_far - until(age + lead)) for lead in leads], axis=1)


def learn_pool(counts: Floats, weights: Floats) -> Pool:
    """The hazard that series share, from [series, minutes]; weights are taken over their mean."""
    pool, gaps = Pool(), Gaps(len(counts))
    share = weights / max(float(weights.mean()), 1e-12) if len(weights) else weights
    for column in counts.T:
        pool.count(gaps, column, share)
        gaps.advance(column)
    return pool


class HazardModel:
    """Forecasts from gaps alone."""

    name = "hazard"

    def __init__(self) -> None:
        self.pool = Pool()

    def fit(self, history: History, weights: Floats | None = None) -> None:
        """Learns the shared hazard; `weights`, [series], say how many series each stands for."""
        share = np.ones(len(history.names)) if weights is None else np.asarray(weights, np.float64)
        self.pool = learn_pool(known_counts(history.counts), share)

    def follow(self, names: Sequence[str], start: int) -> _HazardFollower:
        return _HazardFollower(len(names), start, self.pool)

    def predict(self, history: History, leads: Sequence[int]) -> Prediction:
        return replay(self, history, leads)


class _HazardFollower:
    def __init__(self, num_series: int, start: int, pool: Pool) -> None:
        self.minute = start
        self._pool = pool
        self._gaps = Gaps(num_series)
        self._num_active = np.zeros(num_series)
        # Log of the counts of active minutes, summed: busy minutes of 10^9 do not drown the rest.
        self._log_counts = np.zeros(num_series)

    def advance(self, counts: npt.ArrayLike) -> None:
        values = known_counts(counts)
        self._gaps.advance(values)
        active = values > 0
        self._num_active += active
        self._log_counts += np.log(np.where(active, values, 1.0))
        self.minute += 1

    def forecast(self, leads: Sequence[int]) -> Prediction:
        p, _ = self._gaps.due(leads, self._pool)
        typical = np.exp(self._log_counts / np.maximum(self._num_active, 1))
        # So many active minutes are expected in each lead, and so many more arrivals than one.
        ahead = np.asarray(leads, dtype=np.float64)[None, :]
        num_active = np.maximum(ahead * self._gaps.rate[:, None], 1.0)
        extra = typical[:, None] * num_active - 1
        return hurdle_prediction(p, extra, np.full_like(p, 1.5), {"hazard": p[:, 0]})
