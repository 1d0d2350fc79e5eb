"""Which cohort each series belongs to, as minutes pass; the definitions are `traces.cohort_of`'s.

A series is judged anew every quarter of an hour, by its last gaps and by how its hours repeat with
the day, of which old ones fade.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flashserve.forecast.core import Floats
from flashserve.forecast.traces import BURSTY, COHORTS, DAY, DIURNAL, RARE, TIMER

# How many series share a minute in which they are judged: those of the same row modulo this.
JUDGED_EVERY = 15
MIN_ACTIVE = 20
# Groups of their own: series of which no arrival was ever seen, and those that have few because
# they are young, at whose pace a day brings more.
NEW, YOUNG = "new", "young"
GROUPS = (*COHORTS, NEW, YOUNG)
_NUM_GAPS = 16
_TIMER_SHARE = 0.8
_DIURNAL_SHARE = 0.3
_MIN_HOURS = 12
_FADING = 0.5 ** (1 / (14 * 24))


class CohortWatch:
    """code: [series], an index of GROUPS. num_active: [series], minutes with arrivals so far."""

    def __init__(self, num_series: int) -> None:
        self.code = np.full(num_series, GROUPS.index(NEW), np.int8)
        self.num_active = np.zeros(num_series, np.int64)
        self._age = np.zeros(num_series, np.int32)
        self._gaps = np.zeros((num_series, _NUM_GAPS), np.float32)
        self._counts = np.zeros((num_series, _NUM_GAPS), np.float32)
        self._sum = np.zeros(num_series)
        # Known minutes, of this hour and in all.
        self._num_known = np.zeros(num_series, np.int32)
        self._num_watched = np.zeros(num_series, np.int32)
        # [10, series]: moments of the hours' roots against a sine of one day.
        self._moments = np.zeros((10, num_series))

    def advance(self, minute: int, counts: Floats) -> None:
        """Tell the counts of a minute, NaN where not known."""
        active = counts > 0
        (rows,) = np.nonzero(active)
        slots = self.num_active[rows] % _NUM_GAPS
        self._gaps[rows, slots] = self._age[rows] + 1
        self._counts[rows, slots] = counts[rows]
        self.num_active += active
        self._age = np.where(active, 0, self._age + 1)
        self._sum += np.sqrt(np.where(active, counts, 0.0))
        self._num_known += ~np.isnan(counts)
        self._num_watched += ~np.isnan(counts)
        if (minute + 1) % 60 == 0:
            self._learn_hour(minute // 60 % 24)
        self._judge(np.arange(minute % JUDGED_EVERY, len(counts), JUDGED_EVERY))
        (firsts,) = np.nonzero(active & (self.num_active == 1))
        self._judge(firsts)

    def _learn_hour(self, hour: int) -> None:
        known = self._num_known > 0
        y = np.where(known, self._sum / np.maximum(self._num_known, 1), 0.0)
        angle = 2 * np.pi * hour / (DAY / 60)
        sine, cosine = np.sin(angle), np.cos(angle)
        moments = np.stack([np.ones_like(y), np.full_like(y, sine), np.full_like(y, cosine)])
        seen = [
            *moments,
            *(moments[1] * sine, moments[1] * cosine, moments[2] * cosine),
            *(y, y * sine, y * cosine, y * y),
        ]
        self._moments = np.where(known, self._moments * _FADING + np.stack(seen), self._moments)
        self._sum[:] = 0
        self._num_known[:] = 0

    def _judge(self, rows: npt.NDArray[np.intp]) -> None:
        gaps = self._gaps[rows]
        middle = np.median(gaps, axis=1)
        slack = np.where(middle > 2, np.maximum(1.0, middle / 10), 0.0)
        are_equal = (np.abs(gaps - middle[:, None]) <= slack[:, None]).mean(axis=1) >= _TIMER_SHARE
        counts = self._counts[rows]
        usual = np.median(counts, axis=1)[:, None]
        are_same = (counts == usual).mean(axis=1) >= _TIMER_SHARE
        is_timer = are_equal & ((middle > 1) | are_same)
        is_diurnal = self._daily_share(rows) >= _DIURNAL_SHARE
        code = np.where(is_diurnal, GROUPS.index(DIURNAL), GROUPS.index(BURSTY))
        code = np.where(is_timer, GROUPS.index(TIMER), code)
        active = self.num_active[rows]
        is_young = active * DAY >= MIN_ACTIVE * self._num_watched[rows]
        few = np.where(is_young, GROUPS.index(YOUNG), GROUPS.index(RARE))
        code = np.where(active < MIN_ACTIVE, few, code)
        self.code[rows] = np.where(active == 0, GROUPS.index(NEW), code)

    def _daily_share(self, rows: npt.NDArray[np.intp]) -> Floats:
        """The share of the variance between hours that a daily sine explains."""
        n, s, c, ss, sc, cc, y, ys, yc, yy = self._moments[:, rows]
        enough = n >= _MIN_HOURS * 0.95
        n = np.maximum(n, 1.0)
        # Centred second moments, and the explained variance of two regressors.
        ss, sc, cc = ss - s * s / n, sc - s * c / n, cc - c * c / n
        ys, yc, yy = ys - y * s / n, yc - y * c / n, yy - y * y / n
        determinant = ss * cc - sc * sc
        good = enough & (determinant > 1e-6) & (yy > 1e-12)
        explained = (ys * ys * cc - 2 * ys * yc * sc + yc * yc * ss) / np.where(
            good, determinant, 1.0
        )
        share: Floats = np.where(good, explained / np.where(good, yy, 1.0), 0.0)
        return share
