"""Counts of arrivals as distributions: what models that know only a rate can say."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashserve.forecast.core import QUANTILE_LEVELS, Floats, Prediction

_EXACT_BELOW = 60.0


def poisson_prediction(mean: Floats, p_arrival: Floats | None = None) -> Prediction:
    """Poisson counts. mean: [series, leads]; p_arrival: instead of the Poisson's own chance."""
    p = -np.expm1(-mean) if p_arrival is None else p_arrival
    return Prediction(p, mean, poisson_quantiles(mean))


def poisson_quantiles(mean: Floats, levels: Sequence[float] = QUANTILE_LEVELS) -> Floats:
    """The least count whose distribution function reaches each level: [*mean.shape, levels].

    Exact for means below 60, by the normal approximation above.
    """
    flat = np.maximum(mean.reshape(-1), 0.0)
    result = np.empty((flat.size, len(levels)))
    wanted = np.asarray(levels)
    large = flat >= _EXACT_BELOW
    scores = np.array([_normal_quantile(level) for level in levels])
    centre = flat[large, None]
    result[large] = np.maximum(np.round(centre + scores * np.sqrt(centre)), 0)
    small = flat[~large]
    chance = np.exp(-small)
    reached = chance.copy()
    result[~large] = np.where(reached[:, None] >= wanted, 0.0, -1.0)
    count = 0
    while (result[~large] < 0).any():
        count += 1
        chance = chance * small / count
        reached = reached + chance
        left = result[~large]
        is_here = (left < 0) & ((reached[:, None] >= wanted) | (count > 4 * _EXACT_BELOW))
        left[is_here] = count
        result[~large] = left
    return result.reshape(*mean.shape, len(levels))


def _normal_quantile(level: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(level)
