"""Forecasters that platforms use today, to be measured against: each an ArrivalModel.

Naive (also NVIDIA Dynamo's "constant"), seasonal naive, EWMA, Dynamo's Kalman filter, and the
Fourier extrapolation of IceBreaker. Policies that decide without a forecast are in `keeping`,
ARIMA in `arima`.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flashserve.forecast.core import Floats, History, Prediction
from flashserve.forecast.counts import poisson_prediction

DAY = 1440


class SteadyModel(abc.ABC):
    """Base of models that expect every coming minute to be like the next one."""

    name: str

    def fit(self, history: History) -> None:  # noqa: B027 - what most of them do
        """Nothing is shared between series."""

    @abc.abstractmethod
    def levels(self, history: History, first: int) -> tuple[Floats, Floats]:
        """Chance of an arrival and mean count per minute, as known before each minute.

        Both [series, history.end - first + 1]: before `first`, ..., before `history.end`.
        """

    def predict(self, history: History, leads: Sequence[int]) -> Prediction:
        chance, mean = self.levels(history, history.end)
        steps = np.asarray(leads, np.float64)
        return poisson_prediction(mean * steps, 1 - (1 - chance) ** steps)

    def sweep(self, history: History, first: int, leads: Sequence[int]) -> Floats:
        """P(arrival) as `predict` says before each minute from first: [series, minutes, leads]."""
        chance, _ = self.levels(history, first)
        steps = np.asarray(leads, np.float64)
        swept: Floats = 1 - (1 - chance[:, :-1, None]) ** steps
        return swept


class Naive(SteadyModel):
    """Every minute will be as the last one."""

    name = "naive"

    def levels(self, history: History, first: int) -> tuple[Floats, Floats]:
        counts = np.nan_to_num(history.counts).astype(np.float64)
        before = np.concatenate([np.zeros((len(counts), 1)), counts], axis=1)
        mean = before[:, first - history.start :]
        return -np.expm1(-mean), mean


class Ewma(SteadyModel):
    """Exponentially weighted means of the count, and of whether there was any.

    Weights halve every `half_life` minutes. `prior_minutes` of the mean activity of all fitted
    series stand before each series' first minute; minutes that nobody watched change nothing.
    """

    def __init__(self, half_life: float, prior_minutes: float = 1.0) -> None:
        self.name = f"ewma-{half_life:g}"
        self._decay = 0.5 ** (1 / half_life)
        self._prior_minutes = prior_minutes
        self._prior = 0.01

    def fit(self, history: History) -> None:
        known = ~np.isnan(history.counts)
        if known.any():
            self._prior = float((history.counts > 0).sum() / known.sum())

    def levels(self, history: History, first: int) -> tuple[Floats, Floats]:
        num_series, num_minutes = history.counts.shape
        known = ~np.isnan(history.counts)
        counts = np.nan_to_num(history.counts).astype(np.float64)
        offset = first - history.start
        shape = (num_series, num_minutes - offset + 1)
        chances, means = np.empty(shape), np.empty(shape)
        weight = np.full(num_series, self._prior_minutes)
        active = weight * self._prior
        total = weight * self._prior
        for column in range(num_minutes + 1):
            if column >= offset:
                chances[:, column - offset] = active / weight
                means[:, column - offset] = total / weight
            if column < num_minutes:
                step = np.where(known[:, column], self._decay, 1.0)
                weight = weight * step + known[:, column]
                active = active * step + (counts[:, column] > 0)
                total = total * step + counts[:, column]
        return chances, means


class Kalman(SteadyModel):
    """A local linear trend filtered from the counts, as in NVIDIA Dynamo's planner.

    Its variances are the planner's defaults (level 1, trend 0.1, observation 10); it starts with a
    series' first arrival and says the last count until it has five. A negative level means none.
    """

    name = "kalman"

    def __init__(self, level: float = 1.0, trend: float = 0.1, noise: float = 10.0) -> None:
        self._drift = np.diag([level, trend])
        self._noise = noise
        self._min_points = 5

    def levels(self, history: History, first: int) -> tuple[Floats, Floats]:
        counts = np.nan_to_num(history.counts).astype(np.float64)
        num_series, num_minutes = counts.shape
        offset = first - history.start
        means = np.zeros((num_series, num_minutes - offset + 1))
        state = np.zeros((num_series, 2))
        age = np.zeros(num_series, np.int64)
        gains = self._gains(num_minutes)
        last = np.zeros(num_series)
        for column in range(num_minutes + 1):
            ahead = state[:, 0] + state[:, 1]
            if column >= offset:
                means[:, column - offset] = np.where(age < self._min_points, last, ahead)
            if column == num_minutes:
                break
            last = counts[:, column]
            gain = gains[np.maximum(age - 1, 0)]
            surprise = last - ahead
            moved = np.stack([ahead, state[:, 1]], axis=1) + gain * surprise[:, None]
            started = (age > 0)[:, None]
            state = np.where(started, moved, np.stack([last, np.zeros(num_series)], axis=1))
            age = np.where((age > 0) | (last > 0), age + 1, 0)
        means = np.maximum(means, 0.0)
        return -np.expm1(-means), means

    def _gains(self, num_steps: int) -> Floats:
        """[steps, 2]: they do not depend on what is observed, only on how much."""
        step = np.array([[1.0, 1.0], [0.0, 1.0]])
        spread = np.eye(2) * 1000.0
        gains = np.empty((max(num_steps, 1), 2))
        for number in range(len(gains)):
            spread = step @ spread @ step.T + self._drift
            gain = spread[:, 0] / (spread[0, 0] + self._noise)
            spread = spread - np.outer(gain, spread[0])
            gains[number] = gain
        return gains


class SeasonalNaive:
    """As many as in the same minutes one season ago; before there was one, the mean so far."""

    def __init__(self, season: int = DAY) -> None:
        self.name = f"seasonal-naive-{season}"
        self._season = season

    def fit(self, history: History) -> None:
        """Nothing is shared between series."""

    def predict(self, history: History, leads: Sequence[int]) -> Prediction:
        counts = np.nan_to_num(history.counts).astype(np.float64)
        num_minutes = counts.shape[1]
        ahead = np.arange(max(leads))
        back = num_minutes + ahead - self._season * (ahead // self._season + 1)
        typical = counts.mean(axis=1, keepdims=True) if num_minutes else np.zeros((len(counts), 1))
        path = np.where(back >= 0, counts[:, np.maximum(back, 0)] if num_minutes else 0.0, typical)
        return poisson_prediction(_within(path, leads))


class Fourier:
    """The strongest harmonics of the last minutes around a quadratic trend, as in IceBreaker.

    Source: IceBreaker, ASPLOS 2022, section 4.1: a polynomial and the ten strongest waves, from a
    window of recent minutes, continued.
    """

    name = "fourier"

    def __init__(self, window: int = 720, num_harmonics: int = 10) -> None:
        self._window = window
        self._num_harmonics = num_harmonics

    def fit(self, history: History) -> None:
        """Nothing is shared between series."""

    def predict(self, history: History, leads: Sequence[int]) -> Prediction:
        recent = np.nan_to_num(history.counts[:, -self._window :]).astype(np.float64)
        num_series, length = recent.shape
        horizon = max(leads)
        if length < 4:
            return poisson_prediction(np.zeros((num_series, len(leads))))
        at = np.arange(length + horizon) / length
        basis = np.stack([np.ones_like(at), at, at**2], axis=1)
        trend = np.linalg.lstsq(basis[:length], recent.T, rcond=None)[0]
        spectrum = np.fft.rfft(recent - (basis[:length] @ trend).T, axis=1)
        spectrum[:, 0] = 0
        num_kept = min(self._num_harmonics, spectrum.shape[1])
        strongest = np.argpartition(-np.abs(spectrum), num_kept - 1, axis=1)[:, :num_kept]
        waves = _continued(spectrum, strongest, length, horizon)
        path = np.maximum((basis[length:] @ trend).T + waves, 0.0)
        return poisson_prediction(_within(path, leads))


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


def _within(path: Floats, leads: Sequence[int]) -> Floats:
    """Expected counts per coming minute, [series, minutes], as counts within each lead."""
    total = np.cumsum(path, axis=1)
    within: Floats = total[:, np.asarray(leads) - 1]
    return within
