"""The challenger: boosted trees for each lead on what the network sees, without its memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from flashserve.errors import InputError
from flashserve.forecast.core import Floats, History, Prediction, known_counts, replay
from flashserve.forecast.hazard import Singles
from flashserve.forecast.hurdle import at_leads, hurdle_prediction, p_at_leads
from flashserve.forecast.network.dataset import Dataset, make_dataset, targets
from flashserve.forecast.network.features import LEADS, Features

# The leads that have trees of their own; the others are read between them.
TREE_LEADS = (1, 5, 10, 30)
_TREES: dict[str, Any] = {
    "objective": "binary",
    "learning_rate": 0.08,
    "num_leaves": 31,
    "min_data_in_leaf": 200,
    "lambda_l2": 10.0,
    "feature_fraction": 0.7,
    "bagging_fraction": 0.7,
    "bagging_freq": 1,
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
    "verbosity": -1,
}


class BoostedModel:
    """LightGBM's P(arrival within each lead); counts beyond the first come from the recent rate."""

    name = "boosted"

    def __init__(self, seed: int = 0, num_rounds: int = 120, max_cells: int = 400_000) -> None:
        self._seed = seed
        self._num_rounds = num_rounds
        self._max_cells = max_cells
        self._trees: list[Any] = []
        self._data: Dataset | None = None

    def fit(self, history: History, weights: Floats | None = None) -> None:
        """Learns from at most `max_cells` minutes; `weights`: [series], what each stands for.

        Raises:
            InputError: LightGBM is not installed.
        """
        lightgbm = _lightgbm()
        share = np.ones(len(history.names)) if weights is None else np.asarray(weights, np.float64)
        draw = np.random.default_rng(self._seed)
        counts = known_counts(history.counts)
        data = make_dataset(counts, history.start, share, self._max_cells, draw)
        rows = data.rows.reshape(-1, data.rows.shape[2]).astype(np.float32)
        self._trees = []
        for lead in TREE_LEADS:
            arrived, is_known = _within(data, lead)
            taught = lightgbm.Dataset(
                rows[is_known],
                label=arrived[is_known],
                weight=np.tile(data.weights, data.num_minutes)[is_known],
            )
            settings = {**_TREES, "seed": self._seed}
            self._trees.append(lightgbm.train(settings, taught, self._num_rounds))
        self._data = data

    def follow(self, names: Sequence[str], start: int) -> _BoostedFollower:
        """The state of new series.

        Raises:
            InputError: there was no fit yet.
        """
        if self._data is None:
            raise InputError("the boosted forecaster was not trained: call fit first")
        return _BoostedFollower(self._trees, self._data, len(names), start)

    def predict(self, history: History, leads: Sequence[int]) -> Prediction:
        return replay(self, history, leads)


class _BoostedFollower:
    def __init__(self, trees: list[Any], data: Dataset, num_series: int, start: int) -> None:
        self._trees = trees
        self._data = data
        self._features = Features(num_series, start, data.pool)

    def advance(self, counts: npt.ArrayLike) -> None:
        self._features.advance(known_counts(counts))

    def forecast(self, leads: Sequence[int]) -> Prediction:
        data = self._data
        x = np.clip((self._features.rows() - data.mean) * data.scale, data.low, data.high)
        # Half precision, as in training: a split must fall on the same side.
        rows = x.astype(np.float16).astype(np.float32)
        p = np.stack([trees.predict(rows, num_threads=1) for trees in self._trees], axis=1)
        wanted = p_at_leads(TREE_LEADS, np.maximum.accumulate(p, axis=1), leads)
        extra = at_leads(LEADS, np.exp(self._features.log_offset()), leads)
        return hurdle_prediction(wanted, extra, np.ones_like(wanted), {"hazard": wanted[:, 0]})


def _within(data: Dataset, lead: int) -> tuple[Singles, npt.NDArray[np.bool_]]:
    """Whether something came within the lead, and whether that is known: [minutes x series]."""
    at_risk, arrived, more = targets(data.counts, data.num_minutes)
    index = LEADS.index(lead)
    came = ~np.isnan(more[..., index])
    # Nothing came: the last interval was still at risk and brought nothing.
    quiet = (at_risk[..., index] == 1) & (arrived[..., index] == 0)
    return came.T.ravel().astype(np.float32), (came | quiet).T.ravel()


def _lightgbm() -> Any:
    try:
        import lightgbm
    except ImportError as error:
        raise InputError(
            "the boosted forecaster needs LightGBM: pip install 'flashserve[forecast]'"
        ) from error
    return lightgbm
