"""What the network and its challenger see of a series at the beginning of a minute.

One code makes them for training and for serving, a minute at a time, so the two cannot differ.
Counts are not clamped: logarithms keep them small, and a bound at e^12 once corrupted busy clients.
"""

from __future__ import annotations

import numpy as np

from flashserve.forecast.core import Floats
from flashserve.forecast.hazard import Gaps, Pool, Singles
from flashserve.forecast.network.scatter import Scatter
from flashserve.forecast.network.seasons import DailyDecomposition, DaySlots, HourPhase

# The leads, in minutes, that the heads are trained for; others are interpolated.
LEADS = (1, 2, 5, 10, 20, 30, 60)
LAGS = (1, 2, 3, 5, 10, 15, 20, 30, 60)
HALF_LIVES = (3, 15, 60, 240, 1440)
_FORGETTING: Floats = 1 - np.exp2(-1 / np.array(HALF_LIVES, dtype=np.float64))[:, None]
_CLOCKS = (5, 10, 15, 30, 60)
_RING = 64

NAMES = (
    *(f"lag_{lag}" for lag in LAGS),
    *(f"log_rate_{half_life}" for half_life in HALF_LIVES),
    *(f"log_activity_{half_life}" for half_life in HALF_LIVES),
    *(f"due_{lead}" for lead in LEADS),
    *("log_age", "log_known", "log_gaps", "log_longer_gaps"),
    *("age_to_gap_1", "age_to_gap_2", "age_to_gap_3", "log_gap", "gap_change"),
    *("gap_mean", "gap_spread", "gap_z", "is_due_as_last", "is_due_as_before"),
    *("phase_1", "phase_5", "phase_15"),
    *("slot_now", "slot_soon"),
    *("season_ratio", "season_daily", "season_weekly"),
    *(f"clock_{period}" for period in _CLOCKS),
    *("hour_sin", "hour_cos", "day_sin", "day_cos"),
)
NUM_FEATURES = len(NAMES)
FIRST_DUE = NAMES.index("due_1")
# What repeats with the day tells nothing to who has seen less than a few of them.
OF_THE_DAY = tuple(
    index for index, name in enumerate(NAMES) if name.split("_")[0] in {"slot", "season", "day"}
)


def logit(p: Floats | Singles) -> Floats:
    clipped = np.clip(np.asarray(p, dtype=np.float64), 1e-5, 1 - 1e-5)
    odds: Floats = np.log(clipped / (1 - clipped))
    return odds


class Features:
    """The state behind the features of some series; `minute` is the first that was not told."""

    def __init__(self, num_series: int, start: int, pool: Pool) -> None:
        self.minute = start
        self.gaps = Gaps(num_series)
        self.decomposition = DailyDecomposition(num_series, start)
        self._pool = pool
        self._phase = HourPhase(num_series)
        self._slots = DaySlots(num_series)
        self._scatter = Scatter(num_series)
        self._ring: Singles = np.zeros((_RING, num_series), dtype=np.float32)
        # [half lives, series] of counts and of active minutes, and how much of each is filled.
        self._counts = np.zeros((len(HALF_LIVES), num_series))
        self._activity = np.zeros((len(HALF_LIVES), num_series))
        self._filled = np.zeros((len(HALF_LIVES), num_series))
        # Mean and variance of log gaps.
        self._gap_mean = np.zeros(num_series)
        self._gap_variance = np.ones(num_series)
        self._typical = np.zeros(num_series)

    def advance(self, counts: Floats) -> None:
        """Tell the counts of `minute`: [series], NaN where not known."""
        known = ~np.isnan(counts)
        values = np.where(known, counts, 0.0)
        forgetting = _FORGETTING * known
        self._scatter.advance(values, self.rates()[1], known)
        self._counts += forgetting * (values - self._counts)
        self._activity += forgetting * ((values > 0) - self._activity)
        self._filled += forgetting * (1 - self._filled)
        self._ring[self.minute % _RING] = np.log1p(values)
        self._learn_gap(values > 0)
        self._learn_typical(values)
        self.gaps.advance(counts)
        self._phase.advance(self.minute, counts)
        self._slots.advance(self.minute, counts)
        self.decomposition.advance(self.minute, counts)
        self.minute += 1

    def rates(self) -> Floats:
        """Mean counts per minute, by half-life: [half lives, series]."""
        rates: Floats = self._counts / np.maximum(self._filled, 1e-9)
        return rates

    def log_offset(self) -> Floats:
        """Log of the arrivals to expect beyond the first, [series, LEADS]; the heads correct it."""
        ahead = np.array(LEADS, dtype=np.float64)[None, :] * self.rates()[1][:, None]
        offset: Floats = np.log(np.maximum(ahead, np.expm1(self._typical)[:, None]) + 0.05)
        return offset

    def shape_offset(self) -> Floats:
        """Log of the shape of the arrivals beyond the first: [series]; the heads correct it."""
        return self._scatter.log_shape(self.rates()[1])

    def rows(self) -> Singles:
        """[series, NUM_FEATURES] for the coming minute."""
        gaps, minute = self.gaps, self.minute
        filled = np.maximum(self._filled, 1e-9)
        activity = self._activity / filled
        rate = activity[3].astype(np.float32)
        due, longer = gaps.due(LEADS, self._pool)
        age = np.log2(gaps.age + 1.0)
        recent = np.where(gaps.recent > 0, gaps.recent, 2.0**14)
        log_recent = np.log2(recent)
        spread = np.sqrt(self._gap_variance)
        season = self.decomposition.at(minute).astype(np.float64)
        size = self.rates()[3]
        scale = size + np.abs(season).sum(axis=0) + 1e-6
        hour, day = 2 * np.pi * (minute % 60) / 60, 2 * np.pi * (minute % 1440) / 1440
        num_series = len(age)
        columns = [
            *(self._ring[(minute - lag) % _RING] for lag in LAGS),
            *np.log(self.rates() + 1e-4),
            *np.log(activity + 1e-4),
            *logit(due).T,
            *(age, np.log1p(gaps.num_known), np.log1p(gaps.num_gaps), np.log1p(longer)),
            *np.clip(age[:, None] - log_recent[:, :3], -8, 8).T,
            *(log_recent[:, 0], np.clip(log_recent[:, 0] - log_recent[:, 1], -8, 8)),
            *(self._gap_mean, spread, np.clip((age - self._gap_mean) / (spread + 0.1), -8, 8)),
            *(gaps.age + 1 == recent[:, 0], gaps.age + 1 == recent[:, 1]),
            *(logit(self._phase.expected(minute, ahead, rate)) for ahead in (1, 5, 15)),
            *(self._slots.log_odds(minute + ahead, rate) for ahead in (0, 15)),
            np.log((np.maximum(season.sum(axis=0), 0) + 1e-4) / (size + 1e-4))
            * (np.abs(season).sum(axis=0) > 0),
            *(season[1:] / scale),
            *(np.full(num_series, minute % period == 0) for period in _CLOCKS),
            *(np.full(num_series, wave) for wave in (np.sin(hour), np.cos(hour))),
            *(np.full(num_series, wave) for wave in (np.sin(day), np.cos(day))),
        ]
        return np.stack(columns, axis=1, dtype=np.float32)

    def _learn_gap(self, active: np.ndarray[tuple[int], np.dtype[np.bool_]]) -> None:
        (ended,) = np.nonzero(active & self.gaps.has_arrived)
        gap = np.log2(self.gaps.age[ended] + 1.0)
        first = self.gaps.num_gaps[ended] == 0
        step = np.where(first, 1.0, 0.15)
        miss = gap - self._gap_mean[ended]
        self._gap_mean[ended] += step * miss
        variance = self._gap_variance[ended]
        self._gap_variance[ended] = np.where(first, 1.0, 0.85 * (variance + 0.15 * miss**2))

    def _learn_typical(self, values: Floats) -> None:
        """Log of what an active minute brings beyond its first arrival."""
        (active,) = np.nonzero(values > 0)
        step = np.where(self.gaps.has_arrived[active], 0.1, 1.0)
        self._typical[active] += step * (np.log(values[active]) - self._typical[active])
