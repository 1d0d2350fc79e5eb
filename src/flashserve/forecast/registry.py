"""Every forecaster and policy by name, for backtests and the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flashserve.errors import InputError
from flashserve.forecast.arima import Arima, next_gap
from flashserve.forecast.auto import AutoModel, default_candidates
from flashserve.forecast.baselines import Ewma, Fourier, Kalman, Naive, SeasonalNaive
from flashserve.forecast.boosted import BoostedModel
from flashserve.forecast.core import ArrivalModel
from flashserve.forecast.decisions import Policy
from flashserve.forecast.hazard import HazardModel
from flashserve.forecast.keeping import FixedKeepAlive, HistogramSettings, HybridHistogram
from flashserve.forecast.network.model import NetworkModel
from flashserve.forecast.network.process import TrainSettings
from flashserve.forecast.prophet import ProphetLstm
from flashserve.forecast.ski import SkiRental

EWMA_HALF_LIVES = (2, 5, 15, 60, 240)


def _ewma(half_life: int) -> Callable[[int], ArrivalModel]:
    return lambda _seed: Ewma(half_life)


MODELS: dict[str, Callable[[int], ArrivalModel]] = {
    "naive": lambda _seed: Naive(),
    "seasonal-naive": lambda _seed: SeasonalNaive(),
    **{f"ewma-{half_life}": _ewma(half_life) for half_life in EWMA_HALF_LIVES},
    "kalman": lambda _seed: Kalman(),
    "fourier": lambda _seed: Fourier(),
    "arima": lambda _seed: Arima(),
    "ski-rental": lambda _seed: SkiRental(),
    "hazard": lambda _seed: HazardModel(),
    "hybrid": lambda seed: NetworkModel(settings=TrainSettings(seed=seed)),
    "auto": lambda seed: AutoModel(
        [*default_candidates(), NetworkModel(settings=TrainSettings(seed=seed))]
    ),
    "boosted": BoostedModel,
    "prophet-lstm": ProphetLstm,
}
"""Makes each model from a seed."""

DEFAULT_MODELS = ("naive", "seasonal-naive", "ewma-15", "kalman", "fourier", "hazard")

_HISTOGRAMS = ((0.0, 100.0), (1.0, 99.0), (5.0, 99.0), (5.0, 95.0), (5.0, 90.0), (10.0, 80.0))
_RANGES = (60, 120, 240)


def make_models(names: Sequence[str], seed: int) -> list[ArrivalModel]:
    """Raises InputError for a name that is not known, naming those that are."""
    for name in names:
        if name not in MODELS:
            raise InputError(f"no forecaster is named {name}; there are {', '.join(MODELS)}")
    return [MODELS[name](seed) for name in names]


def named_policies() -> list[Policy]:
    """What platforms do: keep alive for ten minutes or an hour, or the histogram as published."""
    return [FixedKeepAlive(10), FixedKeepAlive(60), HybridHistogram(next_gap=next_gap)]


def histograms() -> list[Policy]:
    """Hybrid histograms of other percentiles and ranges than the published ones, for a frontier.

    Those of the published range have its ARIMA branch.
    """
    return [
        HybridHistogram(
            HistogramSettings(range_minutes, head, tail),
            next_gap if range_minutes == HistogramSettings().range_minutes else None,
        )
        for head, tail in _HISTOGRAMS
        for range_minutes in _RANGES
    ]
