"""What a time of day and of the hour usually brings to each series, learnt as minutes pass."""

from __future__ import annotations

import numpy as np

from flashserve.forecast.core import Floats
from flashserve.forecast.decomposition import DAY_MINUTES, Shape, decompose
from flashserve.forecast.hazard import Singles

_HOURS_KEPT = 14 * 24
_SLOT_MINUTES = 15
_NUM_SLOTS = DAY_MINUTES // _SLOT_MINUTES
_PHASE_FADING = np.float32(0.95)
_SLOT_FADING = np.float32(0.9)


class HourPhase:
    """P(active) of each minute of the hour: what a cron line shows itself by."""

    def __init__(self, num_series: int) -> None:
        self._active: Singles = np.zeros((num_series, 60), dtype=np.float32)
        self._visits: Singles = np.zeros((num_series, 60), dtype=np.float32)

    def advance(self, minute: int, counts: Floats) -> None:
        phase = minute % 60
        known = ~np.isnan(counts)
        for table, value in ((self._active, counts > 0), (self._visits, known)):
            table[:, phase] = np.where(
                known, table[:, phase] * _PHASE_FADING + value, table[:, phase]
            )

    def expected(self, minute: int, num_minutes: int, rate: Singles) -> Singles:
        """Active minutes expected in [minute, minute + num_minutes), per minute: [series]."""
        phases = (minute + np.arange(num_minutes)) % 60
        active = self._active[:, phases].sum(axis=1)
        visits = self._visits[:, phases].sum(axis=1)
        result: Singles = (active + 2 * rate) / (visits + 2)
        return result


class DaySlots:
    """P(active) of each quarter of an hour of the day, from earlier days."""

    def __init__(self, num_series: int) -> None:
        self._active: Singles = np.zeros((num_series, _NUM_SLOTS), dtype=np.float32)
        self._days: Singles = np.zeros((num_series, _NUM_SLOTS), dtype=np.float32)
        self._now: Singles = np.zeros(num_series, dtype=np.float32)
        self._num_known: Singles = np.zeros(num_series, dtype=np.float32)

    def advance(self, minute: int, counts: Floats) -> None:
        """A slot counts once it has ended, so a day never tells of itself."""
        self._now += counts > 0
        self._num_known += ~np.isnan(counts)
        if (minute + 1) % _SLOT_MINUTES:
            return
        slot = minute % DAY_MINUTES // _SLOT_MINUTES
        seen = self._num_known > 0
        share = self._now / np.maximum(self._num_known, 1)
        for table, value in ((self._active, share), (self._days, 1.0)):
            table[:, slot] = np.where(seen, table[:, slot] * _SLOT_FADING + value, table[:, slot])
        self._now[:] = 0
        self._num_known[:] = 0

    def log_odds(self, minute: int, rate: Singles) -> Singles:
        """Log of P(active) at that time of day over the series' rate; 0 before the second day."""
        slot = minute % DAY_MINUTES // _SLOT_MINUTES
        days = self._days[:, slot]
        p = (self._active[:, slot] + 0.5 * rate) / (days + 0.5)
        result: Singles = np.where(days > 0, np.log((p + 1e-4) / (rate + 1e-4)), 0)
        return result.astype(np.float32)


class DailyDecomposition:
    """Trend, daily and weekly parts of each hour to come, refitted at midnight on past days only.

    Zero until two days are known. Out of fold by construction: a value was never part of the fit
    that forecasts it (in-sample decompositions flatter whoever learns from them).
    """

    def __init__(self, num_series: int, start: int) -> None:
        self._hours: Singles = np.full((num_series, _HOURS_KEPT), np.nan, dtype=np.float32)
        self._sum = np.zeros(num_series)
        self._num_known = np.zeros(num_series)
        self._num_hours = 0
        self._minute = start
        # [3, series, 24]: the parts of the day's hours, mean arrivals per minute.
        self._parts = np.zeros((3, num_series, 24), dtype=np.float32)

    def advance(self, minute: int, counts: Floats) -> None:
        known = ~np.isnan(counts)
        self._sum += np.where(known, counts, 0)
        self._num_known += known
        if (minute + 1) % 60:
            return
        mean = np.where(self._num_known > 0, self._sum / np.maximum(self._num_known, 1), np.nan)
        self._hours[:, :-1] = self._hours[:, 1:]
        self._hours[:, -1] = mean
        self._sum[:] = 0
        self._num_known[:] = 0
        self._num_hours = min(self._num_hours + 1, _HOURS_KEPT)
        if (minute + 1) % DAY_MINUTES == 0 and self._num_hours >= 48:
            self._refit(minute + 1)

    def _refit(self, midnight: int) -> None:
        past = self._hours[:, -self._num_hours :]
        fitted = decompose(past, midnight - 60 * self._num_hours, Shape())
        parts = fitted.components(midnight + 60 * np.arange(24, dtype=np.int64))
        for index, name in enumerate(("trend", "daily", "weekly")):
            self._parts[index] = parts[name]

    def at(self, minute: int) -> Singles:
        """[3, series]: trend, daily and weekly part at a minute."""
        result: Singles = self._parts[:, :, minute % DAY_MINUTES // 60]
        return result
