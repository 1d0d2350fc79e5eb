"""How good distributions were: losses, coverage, calibration, and how sure that is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from flashserve.forecast.core import Floats

_LEAST_CHANCE = 1e-4


def log_loss(p: Floats, happened: Floats) -> Floats:
    """-log of the chance that was given to what happened, in nats.

    p: chances; happened: 1.0, 0.0 or NaN (not known: NaN), of one shape. Chances are taken as
    between 10^-4 and 1 - 10^-4, so that one wrong certainty costs 9.2 and not everything.
    """
    bounded = np.clip(p, _LEAST_CHANCE, 1 - _LEAST_CHANCE)
    losses: Floats = -(happened * np.log(bounded) + (1 - happened) * np.log1p(-bounded))
    return losses


def arrivals_within(counts: npt.NDArray[np.float32], first: int, leads: Sequence[int]) -> Floats:
    """Whether anything arrived in [t, t + lead): 1, 0, or NaN where that is not known.

    counts: [series, minutes]; t runs over the columns from `first`. Returns [series, minutes,
    leads]. Not known is what runs past the end, or into minutes that nobody watched.
    """
    num_series, num_minutes = counts.shape
    known = ~np.isnan(counts)
    active = np.cumsum(np.pad((counts > 0).astype(np.int64), ((0, 0), (1, 0))), axis=1)
    watched = np.cumsum(np.pad(known.astype(np.int64), ((0, 0), (1, 0))), axis=1)
    result = np.full((num_series, num_minutes - first, len(leads)), np.nan)
    for number, lead in enumerate(leads):
        ends = np.arange(first + lead, num_minutes + 1)
        begins = ends - lead
        within = (active[:, ends] - active[:, begins] > 0).astype(np.float64)
        within[watched[:, ends] - watched[:, begins] < lead] = np.nan
        result[:, : len(ends), number] = within
    return result


def pinball(quantiles: Floats, counts: Floats, levels: Sequence[float]) -> Floats:
    """The loss that the true quantiles minimise. quantiles: [..., levels]; counts: [...]."""
    over = counts[..., None] - quantiles
    at = np.asarray(levels)
    losses: Floats = np.maximum(at * over, (at - 1) * over)
    return losses


def coverage(quantiles: Floats, counts: Floats) -> Floats:
    """[levels]: how often the count did not exceed each quantile; NaN counts are left out."""
    known = ~np.isnan(counts)
    covered: Floats = (counts[known][..., None] <= quantiles[known]).mean(axis=0)
    return covered


@dataclasses.dataclass(frozen=True, slots=True)
class Calibration:
    """Of each bin of chances: the mean chance, how often it came true, and its share of all."""

    said: Floats
    came: Floats
    share: Floats

    def error(self) -> float:
        """The mean distance between what was said and what came."""
        return float(np.sum(self.share * np.abs(self.said - self.came)))


def calibration(p: Floats, happened: Floats, weights: Floats, num_bins: int = 20) -> Calibration:
    """In bins of equal weight. p, happened: [series, minutes]; weights: [series]."""
    known = ~np.isnan(happened)
    heavy = np.broadcast_to(weights[:, None], p.shape)[known]
    said, came = p[known], happened[known]
    order = np.argsort(said, kind="stable")
    heavy, said, came = heavy[order], said[order], came[order]
    total = heavy.sum()
    if total == 0:
        empty = np.zeros(0)
        return Calibration(empty, empty, empty)
    bins = np.minimum((np.cumsum(heavy) - heavy / 2) / total * num_bins, num_bins - 1).astype(int)
    mass = np.bincount(bins, heavy, num_bins)
    used = mass > 0
    return Calibration(
        np.bincount(bins, heavy * said, num_bins)[used] / mass[used],
        np.bincount(bins, heavy * came, num_bins)[used] / mass[used],
        mass[used] / total,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class Interval:
    """A figure and the bounds that 95 % of its resamplings keep."""

    value: float
    low: float
    high: float


def bootstrap(
    figure: Callable[[Floats], float], num_series: int, seed: int, num_resamples: int = 1000
) -> Interval:
    """The interval of a figure over which series there happen to be.

    figure: of how often each series is drawn, [series]; the figure itself has each drawn once.
    Resamplings without the figure (NaN) count as unfavourable: as infinite.
    """
    rng = np.random.default_rng(seed)
    chances = np.full(num_series, 1 / num_series)
    draws = rng.multinomial(num_series, chances, num_resamples).astype(np.float64)
    figures = np.array([figure(draw) for draw in draws])
    figures[np.isnan(figures)] = np.inf
    low, high = np.quantile(figures, [0.025, 0.975], method="inverted_cdf")
    return Interval(figure(np.ones(num_series)), float(low), float(high))
