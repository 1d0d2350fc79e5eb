"""ARIMA through statsforecast (extra `forecast`): of the next gap, and of counts as Dynamo does."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from flashserve.errors import InputError
from flashserve.forecast.core import Floats, History, Prediction
from flashserve.forecast.counts import poisson_prediction

_MIN_GAPS = 4
_MIN_COUNTS = 5
_MAX_ORDER = 3


def next_gap(gaps: Sequence[int]) -> float:
    """The gap after `gaps` (minutes, oldest first); under four of them, their mean."""
    if len(gaps) < _MIN_GAPS or len(set(gaps)) == 1:
        return float(np.mean(gaps))
    values = np.asarray(gaps, np.float64)
    with _quiet():
        ahead = float(_auto_arima().fit(values).predict(h=1)["mean"][0])
    return max(ahead, 1.0) if np.isfinite(ahead) else float(values.mean())


class Arima:
    """An ARIMA of each series' counts, as in NVIDIA Dynamo's planner: fitted once, then continued.

    The order is searched at a series' first forecast with at least five minutes since its first
    arrival; before that, and where all counts are equal, the last count is what comes. Slow: about
    a tenth of a second for each series.
    """

    name = "arima"

    def __init__(self, window: int = 240) -> None:
        self._window = window
        self._fitted: dict[str, Any] = {}

    def fit(self, history: History, weights: Floats | None = None) -> None:
        """Forgets what was fitted, so that the order is searched anew."""
        del history, weights
        self._fitted = {}

    def predict(self, history: History, leads: Sequence[int]) -> Prediction:
        counts = np.nan_to_num(history.counts[:, -self._window :]).astype(np.float64)
        ahead = max(leads)
        with _quiet():
            paths = [
                self._path(name, row, ahead)
                for name, row in zip(history.names, counts, strict=True)
            ]
        path = np.stack(paths) if paths else np.zeros((0, ahead))
        return poisson_prediction(np.cumsum(path, axis=1)[:, np.asarray(leads) - 1])

    def _path(self, name: str, row: Floats, ahead: int) -> Floats:
        """The expected counts of the coming minutes."""
        begun = np.flatnonzero(row)
        values = row[begun[0] :] if begun.size else row[:0]
        if len(values) < _MIN_COUNTS or values.min() == values.max():
            return np.full(ahead, values[-1] if len(values) else 0.0)
        if name in self._fitted:
            path = self._fitted[name].forward(values, h=ahead)["mean"]
        else:
            self._fitted[name] = _auto_arima().fit(values)
            path = self._fitted[name].predict(h=ahead)["mean"]
        path = np.asarray(path, np.float64)
        return np.maximum(path, 0.0) if np.isfinite(path).all() else np.full(ahead, values[-1])


def _auto_arima() -> Any:
    try:
        from statsforecast.models import AutoARIMA
    except ImportError:
        raise InputError("ARIMA needs statsforecast: install flashserve[forecast]") from None
    return AutoARIMA(max_p=_MAX_ORDER, max_q=_MAX_ORDER, max_order=2 * _MAX_ORDER)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The search tries models that do not fit, and says so."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        yield
