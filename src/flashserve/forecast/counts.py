"""Counts of arrivals as distributions: what models that know only a rate can say."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Sequence

import numpy as np

from flashserve.forecast.core import QUANTILE_LEVELS, Floats, Prediction

_EXACT_BELOW = 60.0
_MAX_EXACT = 120
_BISECTIONS = 60


def poisson_prediction(mean: Floats, p_arrival: Floats | None = None) -> Prediction:
    """Poisson counts. mean: [series, leads]; p_arrival: instead of the Poisson's own chance."""
    p = -np.expm1(-mean) if p_arrival is None else p_arrival
    return Prediction(p, mean, lambda rows, leads: poisson_quantiles(mean[rows][:, leads]))


def poisson_quantiles(mean: Floats, levels: Sequence[float] = QUANTILE_LEVELS) -> Floats:
    """The least count whose distribution function reaches each level: [*mean.shape, levels].

    Exact for means below 60, by the normal approximation above.
    """
    result = np.empty((*mean.shape, len(levels)))
    large = mean >= _EXACT_BELOW
    for number, level in enumerate(levels):
        result[..., number] = np.searchsorted(_largest_means(level), mean)
        score = statistics.NormalDist().inv_cdf(level)
        result[large, number] = np.round(mean[large] + score * np.sqrt(mean[large]))
    return result


@functools.cache
def _largest_means(level: float) -> Floats:
    """[counts]: the largest mean whose quantile at `level` is still each count, by bisection."""
    counts = np.arange(_MAX_EXACT)
    factorials = np.array([math.lgamma(count + 1) for count in counts])
    low, high = np.zeros(_MAX_EXACT), np.full(_MAX_EXACT, 2.0 * _MAX_EXACT)
    up_to = np.tri(_MAX_EXACT)
    for _ in range(_BISECTIONS):
        mean = (low + high) / 2
        chances = np.exp(counts * np.log(mean)[:, None] - mean[:, None] - factorials)
        reaches = (chances * up_to).sum(axis=1) >= level
        low, high = np.where(reaches, mean, low), np.where(reaches, high, mean)
    return low
