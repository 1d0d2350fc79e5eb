"""FlashServe's hybrid as an arrival model: one LSTM over what decomposition and hazard tell it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flashserve.errors import InputError
from flashserve.forecast.core import Floats, History, Prediction, known_counts, replay
from flashserve.forecast.hurdle import at_leads, hurdle_prediction, p_at_leads
from flashserve.forecast.network import weights as files
from flashserve.forecast.network.features import LEADS, Features
from flashserve.forecast.network.process import TrainSettings, train_apart
from flashserve.forecast.network.weights import NetworkWeights, p_within


class NetworkModel:
    """A global LSTM with hurdle heads. Series are told apart by their features alone."""

    name = "hybrid"

    def __init__(
        self, weights: NetworkWeights | None = None, settings: TrainSettings | None = None
    ) -> None:
        self.weights = weights
        self._settings = settings or TrainSettings()

    @classmethod
    def load(cls, path: Path) -> NetworkModel:
        """The model whose weights were saved at `path`; see `weights.load` for what it raises."""
        return cls(files.load(path))

    def fit(self, history: History, weights: Floats | None = None) -> None:
        """Trains in a process of its own; from where the last fit ended, if there was one.

        weights: [series], how many series of the population each stands for.
        """
        self.weights = train_apart(history, weights, self._settings, self.weights)

    def follow(self, names: Sequence[str], start: int) -> NetworkFollower:
        """The state of new series.

        Raises:
            InputError: there are no weights yet.
        """
        if self.weights is None:
            raise InputError("the hybrid forecaster has no weights: call fit, or load them")
        return NetworkFollower(self.weights, len(names), start)

    def predict(self, history: History, leads: Sequence[int]) -> Prediction:
        return replay(self, history, leads)


class NetworkFollower:
    """Features and LSTM state of some series: what a tick of all of them moves on."""

    def __init__(self, weights: NetworkWeights, num_series: int, start: int) -> None:
        self._weights = weights
        self._features = Features(num_series, start, weights.pool)
        self._hidden = np.zeros((num_series, weights.num_hidden), dtype=np.float32)
        self._cell = np.zeros_like(self._hidden)
        self._look()

    def advance(self, counts: npt.ArrayLike) -> None:
        self._features.advance(known_counts(counts))
        self._look()

    def _look(self) -> None:
        self._rows = self._features.rows()
        self._x = self._weights.normalised(self._rows)
        self._hidden, self._cell = self._weights.step(self._x, self._hidden, self._cell)

    def forecast(self, leads: Sequence[int]) -> Prediction:
        hazard, extra, shape = self._weights.heads(self._x, self._hidden, self._rows)
        p = p_within(hazard)
        more = np.exp(self._features.log_offset() + extra)
        wanted = p_at_leads(LEADS, p, leads)
        log_shape = self._features.shape_offset()[:, None] + shape
        return hurdle_prediction(
            wanted,
            np.maximum(at_leads(LEADS, more, leads), 0),
            np.exp(at_leads(LEADS, log_shape, leads)),
            self._components(float(leads[0]), wanted[:, 0], more[:, 0]),
        )

    def _components(self, lead: float, p: Floats, extra: Floats) -> dict[str, Floats]:
        """Per minute: what the seasons say, and what the network adds to them."""
        season = self._features.decomposition.at(self._features.minute).astype(np.float64)
        mean = p * (1 + extra) / lead
        return {
            "trend": season[0],
            "daily": season[1],
            "weekly": season[2],
            "residual": np.nan_to_num(mean) - season.sum(axis=0),
            "hazard": p,
        }
