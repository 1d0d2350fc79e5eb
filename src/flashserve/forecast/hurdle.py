"""Counts with a hurdle: none at all, or one and then a negative binomial number more.

With p = P(count >= 1), the count is 0 with probability 1 - p, else 1 + X, where X has mean `extra`
and variance extra + extra^2 / shape. The hurdle decides whether to be warm, the rest how many
replicas; on/off traffic needs the two apart.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from flashserve.forecast.core import MAX_COUNT, QUANTILE_LEVELS, Floats, Index, Prediction

# Acklam's rational approximation of the normal quantile (relative error 1.15e-9), public domain:
# the central region and the lower tail.
_CENTRAL = (
    (-3.969683028665376e1, 2.209460984245205e2, -2.759285104469687e2),
    (1.383577518672690e2, -3.066479806614716e1, 2.506628277459239),
    (-5.447609879822406e1, 1.615858368580409e2, -1.556989798598866e2),
    (6.680131188771972e1, -1.328068155288572e1, 1.0),
)
_TAIL = (
    (-7.784894002430293e-3, -3.223964580411365e-1, -2.400758277161838),
    (-2.549732539343734, 4.374664141464968, 2.938163982698783),
    (7.784695709041462e-3, 3.224671290700398e-1, 2.445134137142996, 3.754408661907416, 1.0),
)
_TAIL_BELOW = 0.02425


def normal_quantile(level: Floats) -> Floats:
    """The standard normal's quantile at levels in (0, 1)."""
    p = np.clip(level, 1e-12, 1 - 1e-12)
    centre = p - 0.5
    square = centre * centre
    middle = (
        np.polyval((*_CENTRAL[0], *_CENTRAL[1]), square)
        * centre
        / np.polyval((*_CENTRAL[2], *_CENTRAL[3]), square)
    )
    depth = np.sqrt(-2 * np.log(np.minimum(p, 1 - p)))
    tail = np.polyval((*_TAIL[0], *_TAIL[1]), depth) / np.polyval(_TAIL[2], depth)
    outer = np.where(p < 0.5, tail, -tail)
    return np.where((p < _TAIL_BELOW) | (p > 1 - _TAIL_BELOW), outer, middle)


def negative_binomial_quantile(level: Floats, mean: Floats, shape: Floats) -> Floats:
    """The least integer that a negative binomial stays at or below with probability `level`.

    Exact at zero; above it the gamma distribution of the same mean and variance, by
    Wilson and Hilferty's cube root, with a correction for continuity.
    """
    mean = np.clip(mean, 1e-9, MAX_COUNT)
    shape = np.clip(shape, 1e-3, 1e6)
    at_zero = np.exp(-shape * np.log1p(mean / shape))
    gamma_shape = mean / (1 + mean / shape)
    ninth = 1 / (9 * gamma_shape)
    root = 1 - ninth + normal_quantile(level) * np.sqrt(ninth)
    above = mean * np.maximum(root, 0) ** 3
    return np.where(level <= at_zero, 0.0, np.maximum(np.ceil(above - 0.5), 1.0))


def hurdle_prediction(
    p_arrival: Floats,
    extra: Floats,
    shape: Floats,
    components: dict[str, Floats] | None = None,
) -> Prediction:
    """The whole prediction from its three parameters, each [series, leads], leads ascending.

    What must hold for every forecast is made to hold here: no NaN (unknown is no arrival),
    probabilities in [0, 1], and neither they nor means nor quantiles fall as the lead grows.
    """
    p = np.maximum.accumulate(np.clip(np.nan_to_num(p_arrival), 0.0, 1.0), axis=1)
    extra = np.clip(np.nan_to_num(extra, posinf=MAX_COUNT), 0.0, MAX_COUNT)
    shape = np.nan_to_num(shape, nan=1.0)
    mean = np.maximum.accumulate(p * (1 + extra), axis=1)

    def quantiles(rows: Index, leads: Index) -> Floats:
        return _quantiles(*(part[rows][:, leads] for part in (p, extra, shape)))

    return Prediction(p, mean, quantiles, components)


def _quantiles(p: Floats, extra: Floats, shape: Floats) -> Floats:
    """[series, leads, QUANTILE_LEVELS]."""
    quantiles = np.zeros((*p.shape, len(QUANTILE_LEVELS)))
    for index, level in enumerate(QUANTILE_LEVELS):
        # Below the level there is only zero; the rest is the level within the positive part.
        above_zero = level - (1 - p)
        at = above_zero > 0
        rest = above_zero[at] / p[at]
        above = negative_binomial_quantile(np.clip(rest, 1e-9, 1 - 1e-9), extra[at], shape[at])
        quantiles[at, index] = 1 + above
    return np.maximum.accumulate(np.maximum.accumulate(quantiles, axis=1), axis=2)


def at_leads(known: Sequence[int], values: Floats, wanted: Sequence[float]) -> Floats:
    """Values that grow with the lead, [series, known], read at other leads: [series, wanted].

    Linear between the known leads and from zero at lead 0; beyond the last, at its last slope.
    """
    grid = np.array([0, *known], dtype=np.float64)
    table = np.concatenate([np.zeros((len(values), 1)), values], axis=1)
    leads = np.asarray(wanted, dtype=np.float64)
    right = np.clip(np.searchsorted(grid, leads), 1, len(grid) - 1)
    share = (leads - grid[right - 1]) / (grid[right] - grid[right - 1])
    return table[:, right - 1] * (1 - share) + table[:, right] * share


def p_at_leads(known: Sequence[int], p: Floats, wanted: Sequence[float]) -> Floats:
    """P(arrival) at other leads, from a hazard that is constant between the known ones."""
    cumulative = -np.log1p(-np.clip(p, 0.0, 1 - 1e-9))
    result: Floats = -np.expm1(-at_leads(known, cumulative, wanted))
    return result
