"""The FlashServe paper's hybrid as published: Prophet for trend and season, an LSTM on the rest.

The forecast is the sum of both, a number; arrivals are Poisson about it. Prophet is fitted to every
series for itself, on its own past, again every six hours: at 0.05 to 0.7 s each this is no model
for thousands of series. It stands here so that FlashServe's own can be measured against it.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from flashserve.errors import InputError
from flashserve.forecast.core import Floats, History, Prediction, known_counts, replay
from flashserve.forecast.counts import poisson_prediction
from flashserve.forecast.decomposition import binned
from flashserve.forecast.residual import (
    HORIZON_BINS,
    WINDOW_BINS,
    ResidualWeights,
    train_apart,
    windows_of,
)

BIN_MINUTES = 5
_REFIT_BINS = 72
_FIRST_FIT_BINS = 24
_MAX_PAST_BINS = 14 * 288
# Of so many series the LSTM learns.
_MAX_FITTED = 200
_LEAST_PER_MINUTE = 1e-4


def fit_prophet(
    values: Floats, start: int, num_ahead: int, bin_minutes: int = BIN_MINUTES
) -> tuple[Floats, Floats]:
    """Prophet's values of the bins it was fitted to, and of those to come: [bins], [num_ahead].

    values: per bin, NaN where not known; start: minute of the first bin. A series with fewer than
    two known bins, or only zeros, is forecast as its mean.

    Raises:
        InputError: prophet is not installed.
    """
    known = np.isfinite(values)
    level = float(values[known].mean()) if known.any() else 0.0
    if known.sum() < 2 or level == 0:
        return np.full(len(values), level), np.full(num_ahead, level)
    prophet, pandas = _prophet()
    bins = np.arange(len(values) + num_ahead)
    stamps = pandas.to_datetime((start + bins * bin_minutes) * 60, unit="s")
    # Its own scaling fails on values that are too large to be told apart.
    scale = float(np.abs(values[known]).max())
    with warnings.catch_warnings():
        # Prophet uses what pandas means to change.
        warnings.simplefilter("ignore")
        model = prophet.Prophet(uncertainty_samples=0, yearly_seasonality=False)
        model.fit(
            pandas.DataFrame({"ds": stamps[: len(values)][known], "y": values[known] / scale})
        )
        result = model.predict(pandas.DataFrame({"ds": stamps}))["yhat"].to_numpy() * scale
    return result[: len(values)], result[len(values) :]


Fit = Callable[[Floats, int, int], tuple[Floats, Floats]]


class ProphetLstm:
    """Prophet plus an LSTM on the additive residual, with squared loss.

    fit_one: `fit_prophet`, or one that remembers what it fitted.
    """

    name = "prophet-lstm"

    def __init__(self, seed: int = 0, num_epochs: int = 15, fit_one: Fit = fit_prophet) -> None:
        self._seed = seed
        self._num_epochs = num_epochs
        self._fit_one = fit_one
        self._weights: ResidualWeights | None = None

    def fit(self, history: History, weights: Floats | None = None) -> None:  # noqa: ARG002
        """Learns how residuals go on, from at most 200 series; the rest is each series' own.

        weights do not enter: the recipe knows none.
        """
        draw = np.random.default_rng(self._seed)
        chosen = draw.permutation(len(history.names))[:_MAX_FITTED]
        values = binned(known_counts(history.counts)[chosen], BIN_MINUTES).astype(np.float64)
        parts = []
        for row in values:
            fitted, _ = self._fit_one(row, history.start, 0)
            residual = np.nan_to_num(row - fitted)
            spread = float(residual.std())
            if spread > 0:
                parts.append(windows_of(residual / spread))
        inputs, outputs = (
            np.concatenate([part[side] for part in [*parts, windows_of(np.empty(0))]])
            for side in range(2)
        )
        self._weights = train_apart(inputs, outputs, self._seed, self._num_epochs)

    def follow(self, names: Sequence[str], start: int) -> _ProphetFollower:
        """The state of new series.

        Raises:
            InputError: there was no fit yet.
        """
        if self._weights is None:
            raise InputError("the Prophet + LSTM forecaster was not trained: call fit first")
        return _ProphetFollower(self._weights, len(names), start, self._fit_one)

    def predict(self, history: History, leads: Sequence[int]) -> Prediction:
        return replay(self, history, leads)


class _ProphetFollower:
    """Bins so far, what Prophet says of those to come, and how far it was off lately.

    A fit that is due is made at the first forecast after it, of the bins until it was due: minutes
    that nobody asks about cost nothing.
    """

    def __init__(self, weights: ResidualWeights, num_series: int, start: int, fit_one: Fit) -> None:
        self._weights = weights
        self._fit_one = fit_one
        self._minute = self._start = start
        self._bins: list[Floats] = []
        self._sum: Floats = np.zeros(num_series)
        self._num_known: Floats = np.zeros(num_series)
        # [series, bins to come] since the last fit, and the number of bins that it was fitted to.
        self._base: Floats = np.zeros((num_series, HORIZON_BINS))
        self._fitted_bins = 0
        # [series, bins]: what Prophet left of the last bins that it was fitted to.
        self._left: Floats = np.zeros((num_series, WINDOW_BINS))
        self._outlook: Floats = np.zeros((num_series, HORIZON_BINS))
        self._seen_bins = 0

    def advance(self, counts: npt.ArrayLike) -> None:
        values = known_counts(counts)
        self._sum += np.nan_to_num(values)
        self._num_known += ~np.isnan(values)
        self._minute += 1
        if (self._minute - self._start) % BIN_MINUTES == 0:
            self._close_bin()

    def _close_bin(self) -> None:
        mean = np.where(self._num_known > 0, self._sum / np.maximum(self._num_known, 1), np.nan)
        self._sum[:] = 0
        self._num_known[:] = 0
        self._bins.append(mean)

    def _catch_up(self) -> None:
        """The fit that is due, if it was not made, and the outlook after the last whole bin."""
        num_bins = len(self._bins)
        due = num_bins // _REFIT_BINS * _REFIT_BINS or _FIRST_FIT_BINS
        if num_bins < due or num_bins == self._seen_bins:
            return
        if due != self._fitted_bins:
            self._refit(due)
        self._look()
        self._seen_bins = num_bins

    def _refit(self, due: int) -> None:
        past = np.stack(self._bins[max(due - _MAX_PAST_BINS, 0) : due], axis=1)
        start = self._start + (due - past.shape[1]) * BIN_MINUTES
        self._fitted_bins = due
        fits = [self._fit_one(row, start, _REFIT_BINS + HORIZON_BINS) for row in past]
        self._base = np.stack([ahead for _, ahead in fits])
        off = np.nan_to_num(past - np.stack([fitted for fitted, _ in fits]))
        self._left = off[:, -WINDOW_BINS:]

    def _look(self) -> None:
        first = len(self._bins) - self._fitted_bins
        base = self._base[:, first : first + HORIZON_BINS]
        since = np.stack(self._bins[self._fitted_bins :], axis=1) if first else base[:, :0]
        off = np.nan_to_num(since - self._base[:, :first])
        residuals = np.concatenate([self._left, off], axis=1)[:, -WINDOW_BINS:].astype(np.float32)
        spread = np.maximum(residuals.std(axis=1, keepdims=True), 1e-6)
        self._outlook = base + self._weights.ahead(residuals / spread) * spread

    def forecast(self, leads: Sequence[int]) -> Prediction:
        self._catch_up()
        into = (self._minute - self._start) % BIN_MINUTES
        per_minute = np.repeat(np.maximum(self._outlook, _LEAST_PER_MINUTE), BIN_MINUTES, axis=1)
        minutes = np.minimum(into + np.arange(max(leads)), per_minute.shape[1] - 1)
        expected = np.cumsum(per_minute[:, minutes], axis=1)
        mean = np.stack([expected[:, lead - 1] for lead in leads], axis=1)
        first = min(max(len(self._bins) - self._fitted_bins, 0), self._base.shape[1] - 1)
        base = self._base[:, first]
        plain = poisson_prediction(mean)
        parts = {"trend": base, "residual": self._outlook[:, 0] - base}
        return Prediction(plain.p_arrival, plain.mean, plain.quantiles, parts)


def _prophet() -> tuple[Any, Any]:
    try:
        import pandas
        import prophet
    except ImportError as error:
        raise InputError(
            "the Prophet + LSTM forecaster needs prophet: pip install 'flashserve[forecast]'"
        ) from error
    # They tell of every chain, and cmdstanpy sets its level when it is first used.
    for name in ("cmdstanpy", "prophet"):
        logging.getLogger(name).disabled = True
    return prophet, pandas
