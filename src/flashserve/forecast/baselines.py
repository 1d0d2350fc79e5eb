"""Forecasters that platforms use today, to be measured against: each a FollowingModel.

Naive (also NVIDIA Dynamo's "constant"), seasonal naive, EWMA, Dynamo's Kalman filter, and the
Fourier extrapolation of IceBreaker. Policies that decide without a forecast are in `keeping`,
ARIMA in `arima`.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flashserve.forecast.core import (
    Floats,
    Follower,
    History,
    Prediction,
    known_counts,
    replay,
)
from flashserve.forecast.counts import poisson_prediction

DAY = 1440


class _Baseline(abc.ABC):
    """What all of them share: nothing to learn, and a prediction is what a follower says."""

    name: str

    def fit(self, history: History, weights: Floats | None = None) -> None:  # noqa: B027
        """Nothing is shared between series."""

    @abc.abstractmethod
    def follow(self, names: Sequence[str], start: int) -> Follower: ...

    def predict(self, history: History, leads: Sequence[int]) -> Prediction:
        return replay(self, history, leads)


def _steady(chance: Floats, mean: Floats, leads: Sequence[int]) -> Prediction:
    """Every coming minute like the next one; chance and mean of a minute: [series]."""
    steps = np.asarray(leads, np.float64)
    quiet = np.log1p(-np.minimum(chance, 1 - 1e-15))
    return poisson_prediction(mean[:, None] * steps, -np.expm1(quiet[:, None] * steps))


def _within(path: Floats, leads: Sequence[int]) -> Prediction:
    """From the expected counts of each coming minute, [series, minutes]."""
    return poisson_prediction(np.cumsum(path, axis=1)[:, np.asarray(leads) - 1])


class Naive(_Baseline):
    """Every minute will be as the last one."""

    name = "naive"

    def follow(self, names: Sequence[str], start: int) -> Follower:
        del start
        return _NaiveFollower(len(names))


class _NaiveFollower:
    def __init__(self, num_series: int) -> None:
        self._last = np.zeros(num_series)

    def advance(self, counts: npt.ArrayLike) -> None:
        self._last = np.nan_to_num(known_counts(counts))

    def forecast(self, leads: Sequence[int]) -> Prediction:
        return _steady(-np.expm1(-self._last), self._last, leads)


class Ewma(_Baseline):
    """Exponentially weighted means of the count, and of whether there was any.

    Weights halve every `half_life` minutes. `prior_minutes` of the mean activity of all fitted
    series stand before each series' first minute; minutes that nobody watched change nothing.
    """

    def __init__(self, half_life: float, prior_minutes: float = 1.0) -> None:
        self.name = f"ewma-{half_life:g}"
        self._decay = 0.5 ** (1 / half_life)
        self._prior_minutes = prior_minutes
        self._prior = 0.01

    def fit(self, history: History, weights: Floats | None = None) -> None:
        share = np.ones(len(history.names)) if weights is None else weights
        watched = float(share @ (~np.isnan(history.counts)).sum(axis=1))
        if watched:
            self._prior = float(share @ (history.counts > 0).sum(axis=1)) / watched

    def follow(self, names: Sequence[str], start: int) -> Follower:
        del start
        return _EwmaFollower(len(names), self._decay, self._prior, self._prior_minutes)


class _EwmaFollower:
    def __init__(self, num_series: int, decay: float, prior: float, prior_minutes: float) -> None:
        self._decay = decay
        self._weight = np.full(num_series, prior_minutes)
        self._active = self._weight * prior
        self._total = self._weight * prior

    def advance(self, counts: npt.ArrayLike) -> None:
        values = known_counts(counts)
        known = ~np.isnan(values)
        step = np.where(known, self._decay, 1.0)
        self._weight = self._weight * step + known
        self._active = self._active * step + (values > 0)
        self._total = self._total * step + np.nan_to_num(values)

    def forecast(self, leads: Sequence[int]) -> Prediction:
        return _steady(self._active / self._weight, self._total / self._weight, leads)


class Kalman(_Baseline):
    """A local linear trend filtered from the counts, as in NVIDIA Dynamo's planner.

    Its variances are the planner's defaults (level 1, trend 0.1, observation 10); it starts with a
    series' first arrival and says the last count until it has five. A negative level means none.
    """

    name = "kalman"

    def __init__(
        self, level: float = 1.0, trend: float = 0.1, noise: float = 10.0, min_points: int = 5
    ) -> None:
        self._drift = np.diag([level, trend])
        self._noise = noise
        self._min_points = min_points

    def follow(self, names: Sequence[str], start: int) -> Follower:
        del start
        return _KalmanFollower(len(names), self._drift, self._noise, self._min_points)


class _KalmanFollower:
    """Series of equal age have equal gains, whatever they counted: one recursion gives them all."""

    def __init__(self, num_series: int, drift: Floats, noise: float, min_points: int) -> None:
        self._drift, self._noise, self._min_points = drift, noise, min_points
        self._level, self._slope = np.zeros(num_series), np.zeros(num_series)
        self._last = np.zeros(num_series)
        self._age = np.zeros(num_series, np.int64)
        self._spread = np.eye(2) * 1000.0
        self._gains = np.zeros((1, 2))

    def advance(self, counts: npt.ArrayLike) -> None:
        self._last = np.nan_to_num(known_counts(counts))
        self._add_gain()
        begun = self._age > 0
        gain = self._gains[self._age]
        ahead = self._level + self._slope
        surprise = np.where(begun, self._last - ahead, 0.0)
        self._level = np.where(begun, ahead + gain[:, 0] * surprise, self._last)
        self._slope = self._slope + gain[:, 1] * surprise
        self._age += begun | (self._last > 0)

    def _add_gain(self) -> None:
        """The gain of a series that has been observed once more than any so far."""
        step = np.array([[1.0, 1.0], [0.0, 1.0]])
        spread = step @ self._spread @ step.T + self._drift
        gain = spread[:, 0] / (spread[0, 0] + self._noise)
        self._spread = spread - np.outer(gain, spread[0])
        self._gains = np.concatenate([self._gains, gain[None]])

    def forecast(self, leads: Sequence[int]) -> Prediction:
        ahead = np.maximum(self._level + self._slope, 0.0)
        mean = np.where(self._age < self._min_points, self._last, ahead)
        return _steady(-np.expm1(-mean), mean, leads)


class SeasonalNaive(_Baseline):
    """As many as in the same minutes one season ago; before there was one, the mean so far."""

    def __init__(self, season: int = DAY) -> None:
        self.name = f"seasonal-naive-{season}"
        self._season = season

    def follow(self, names: Sequence[str], start: int) -> Follower:
        del start
        return _SeasonalFollower(len(names), self._season)


class _SeasonalFollower:
    def __init__(self, num_series: int, season: int) -> None:
        self._recent = _Recent(num_series, season)
        self._season = season
        self._total = np.zeros(num_series)

    def advance(self, counts: npt.ArrayLike) -> None:
        values = np.nan_to_num(known_counts(counts))
        self._total += values
        self._recent.add(values)

    def forecast(self, leads: Sequence[int]) -> Prediction:
        table, known = self._recent.table(), self._recent.num_minutes
        ahead = np.arange(max(leads)) % self._season
        typical = (self._total / max(known, 1))[:, None]
        is_seen = ahead >= self._season - known
        return _within(np.where(is_seen, table[:, ahead], typical), leads)


class Fourier(_Baseline):
    """The strongest harmonics of the last minutes around a quadratic trend, as in IceBreaker.

    Source: IceBreaker, ASPLOS 2022, section 4.1: a polynomial and the ten strongest waves, from a
    window of recent minutes, continued.
    """

    name = "fourier"

    def __init__(self, window: int = 720, num_harmonics: int = 10) -> None:
        self._window = window
        self._num_harmonics = num_harmonics

    def follow(self, names: Sequence[str], start: int) -> Follower:
        del start
        return _FourierFollower(len(names), self._window, self._num_harmonics)


class _FourierFollower:
    def __init__(self, num_series: int, window: int, num_harmonics: int) -> None:
        self._recent = _Recent(num_series, window)
        self._num_harmonics = num_harmonics

    def advance(self, counts: npt.ArrayLike) -> None:
        self._recent.add(np.nan_to_num(known_counts(counts)))

    def forecast(self, leads: Sequence[int]) -> Prediction:
        table, horizon = self._recent.table(), max(leads)
        length = min(self._recent.num_minutes, table.shape[1])
        if length < 4:
            return _within(np.zeros((len(table), horizon)), leads)
        recent = table[:, -length:]
        at = np.arange(length + horizon) / length
        basis = np.stack([np.ones_like(at), at, at**2], axis=1)
        trend = np.linalg.pinv(basis[:length]) @ recent.T
        spectrum = np.fft.rfft(recent - (basis[:length] @ trend).T, axis=1)
        num_kept = min(self._num_harmonics, spectrum.shape[1] - 1)
        strongest = 1 + np.argpartition(-np.abs(spectrum[:, 1:]), num_kept - 1, axis=1)
        waves = _continued(spectrum, strongest[:, :num_kept], length, horizon)
        return _within(np.maximum((basis[length:] @ trend).T + waves, 0.0), leads)


def _continued(
    spectrum: npt.NDArray[np.complex128], kept: npt.NDArray[np.int64], length: int, horizon: int
) -> Floats:
    """[series, horizon]: the kept waves after the window they were taken from."""
    coefficients = np.take_along_axis(spectrum, kept, axis=1)
    ahead = np.arange(horizon)  # a wave of the window repeats after it
    phases = np.exp(2j * np.pi * kept[:, :, None] * ahead / length)
    # rfft leaves out the mirrored half, but for the highest frequency of an even length.
    doubled = np.where(2 * kept == length, 1.0, 2.0)
    waves: Floats = ((coefficients * doubled)[:, :, None] * phases).real.sum(axis=1) / length
    return waves


class _Recent:
    """The counts of the last `window` minutes, the newest last; zero before there were any."""

    def __init__(self, num_series: int, window: int) -> None:
        self._window = window
        # Twice as long, so that a window moves back once in `window` minutes only.
        self._counts = np.zeros((num_series, 2 * window))
        self._end = window
        self.num_minutes = 0

    def add(self, counts: Floats) -> None:
        if self._end == self._counts.shape[1]:
            self._counts[:, : self._window] = self._counts[:, self._window :]
            self._end = self._window
        self._counts[:, self._end] = counts
        self._end += 1
        self.num_minutes += 1

    def table(self) -> Floats:
        """[series, window]."""
        return self._counts[:, self._end - self._window : self._end]
