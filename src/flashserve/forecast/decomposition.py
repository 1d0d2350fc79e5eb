"""Trend and seasons of all series at once: Prophet's decomposition as one ridge regression.

Each series, scaled by its largest value, is a piecewise-linear trend with changepoints over the
first 80 % of its past plus Fourier series of the day and the week (Taylor and Letham, "Forecasting
at scale", 2018), with normal priors. The design is the same for every series, so one factor
of its normal matrix solves them all: the state is one row of coefficients each.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flashserve.forecast.core import Floats

DAY_MINUTES = 1440
WEEK_MINUTES = 7 * DAY_MINUTES
_CHANGEPOINT_RANGE = 0.8
# Rounds in which minutes that are not known are filled with what the fit says of them.
_FILL_ROUNDS = 3
_BLOCK_SERIES = 2048


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """What the decomposition is made of. Ridge weights are noise variance over prior variance.

    bin_minutes: minutes a value covers. holidays: first minutes of days that have their own level.
    changepoint_ridges: from flexible to stiff; each series gets the one that forecasts it best.
    A season is used only where two of its periods are known, as Prophet does.
    """

    bin_minutes: int = 60
    num_changepoints: int = 25
    daily_order: int = 4
    weekly_order: int = 3
    changepoint_ridges: tuple[float, ...] = (4.0, 32.0)
    season_ridge: float = 1.0
    holidays: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, slots=True)
class Fitted:
    """The decomposition of some series; `coefficients` is [series, columns], float32.

    start and end are minutes; scale: [series], what the coefficients are multiplied with.
    """

    shape: Shape
    start: int
    end: int
    coefficients: npt.NDArray[np.float32]
    scale: npt.NDArray[np.float32]

    def components(self, minutes: Sequence[int] | npt.NDArray[np.int64]) -> dict[str, Floats]:
        """trend, daily, weekly and holidays at these minutes: each [series, minutes].

        Their sum is the forecast. Minutes after `end` are extrapolated: the last slope goes on.
        """
        at = np.asarray(minutes, dtype=np.int64)
        design = design_matrix(self.shape, self.start, self.end, at)
        parts = {}
        for name, columns in _columns(self.shape, self.end - self.start).items():
            part = self.coefficients[:, columns].astype(np.float64) @ design[:, columns].T
            parts[name] = part * self.scale[:, None]
        return parts

    def values(self, minutes: Sequence[int] | npt.NDArray[np.int64]) -> Floats:
        """The sum of the components: [series, minutes]."""
        at = np.asarray(minutes, dtype=np.int64)
        design = design_matrix(self.shape, self.start, self.end, at)
        return (self.coefficients.astype(np.float64) @ design.T) * self.scale[:, None]


def decompose(values: npt.ArrayLike, start: int, shape: Shape | None = None) -> Fitted:
    """Fit every series: `values` is [series, bins], NaN where not known, from minute `start` on.

    A series of which nothing is known, or only zeros, gets coefficients of zero.

    Raises:
        ValueError: there is not a single bin.
    """
    shape = shape or Shape()
    table = np.asarray(values, dtype=np.float32)
    num_series, num_bins = table.shape
    if num_bins == 0:
        raise ValueError("decompose needs at least one bin")
    minutes = start + np.arange(num_bins, dtype=np.int64) * shape.bin_minutes
    end = start + num_bins * shape.bin_minutes
    design = design_matrix(shape, start, end, minutes)
    chosen = _stiffness(table, start, shape)
    coefficients = np.zeros((num_series, design.shape[1]), dtype=np.float32)
    scale = np.zeros(num_series, dtype=np.float32)
    for index, changepoint_ridge in enumerate(shape.changepoint_ridges):
        (rows,) = np.nonzero(chosen == index)
        ridge = _ridge(shape, end - start, changepoint_ridge)
        # [columns, bins]: what turns the values of any series into its coefficients.
        solver = np.linalg.solve(design.T @ design + np.diag(ridge), design.T)
        for first in range(0, len(rows), _BLOCK_SERIES):
            block = rows[first : first + _BLOCK_SERIES]
            coefficients[block], scale[block] = _solve(
                table[block], solver.astype(np.float32), design.astype(np.float32)
            )
    return Fitted(shape, start, end, coefficients, scale)


def _stiffness(table: npt.NDArray[np.float32], start: int, shape: Shape) -> npt.NDArray[np.intp]:
    """Which changepoint ridge each series gets: [series], an index.

    The one that, fitted without the last fifth of the past, forecasts it best; where the past is
    too short for that (under three days), the stiffest.
    """
    num_series, num_bins = table.shape
    num_held = num_bins // 5
    ridges = shape.changepoint_ridges
    if len(ridges) == 1 or num_bins * shape.bin_minutes < 3 * DAY_MINUTES:
        return np.full(num_series, len(ridges) - 1)
    errors = np.empty((len(ridges), num_series))
    num_kept = num_bins - num_held
    held = start + np.arange(num_kept, num_bins, dtype=np.int64) * shape.bin_minutes
    for index, ridge in enumerate(ridges):
        one = dataclasses.replace(shape, changepoint_ridges=(ridge,))
        fitted = decompose(table[:, :num_kept], start, one)
        miss = np.abs(fitted.values(held) - table[:, num_kept:])
        errors[index] = np.where(np.isfinite(miss), miss, 0).sum(axis=1)
    # From the stiffest to the most flexible: a tie (a silent series) goes to the stiffest.
    best: npt.NDArray[np.intp] = len(ridges) - 1 - np.argmin(errors[::-1], axis=0)
    return best


def design_matrix(shape: Shape, start: int, end: int, minutes: npt.NDArray[np.int64]) -> Floats:
    """[minutes, columns]: level, slope, changes of slope, then the seasons and holidays."""
    span = max(end - start, 1)
    # Bins are known by their middle, so that a season is not shifted by half a bin.
    middle = minutes.astype(np.float64) + shape.bin_minutes / 2
    elapsed = (middle - start) / span
    knots = _knots(shape.num_changepoints, span // shape.bin_minutes)
    blocks: list[Floats] = [np.ones((len(minutes), 1)), elapsed[:, None] - 0.5]
    blocks.append(np.subtract.outer(elapsed, knots).clip(min=0.0))
    for period, order in _seasons(shape, span):
        blocks.append(_fourier(middle, period, order))
    if shape.holidays:
        days = np.asarray(shape.holidays, dtype=np.int64)
        into = minutes[:, None] - days[None, :]
        num_holidays: Floats = ((into >= 0) & (into < DAY_MINUTES)).sum(axis=1, dtype=np.float64)
        blocks.append(np.minimum(num_holidays, 1.0)[:, None])
    return np.concatenate(blocks, axis=1)


def binned(counts: npt.ArrayLike, bin_minutes: int) -> npt.NDArray[np.float32]:
    """Counts per minute, [series, minutes], as means of whole bins from the first minute on.

    A bin is NaN where none of its minutes is known; minutes after the last whole bin are left out.
    """
    table = np.asarray(counts, dtype=np.float32)
    num_bins = table.shape[1] // bin_minutes
    cut = table[:, : num_bins * bin_minutes].reshape(len(table), num_bins, bin_minutes)
    known = np.isfinite(cut) & (cut >= 0)
    num_known = known.sum(axis=2)
    total = np.where(known, cut, 0).sum(axis=2, dtype=np.float32)
    return np.where(num_known > 0, total / np.maximum(num_known, 1), np.float32(np.nan)).astype(
        np.float32
    )


def _solve(
    block: npt.NDArray[np.float32],
    solver: npt.NDArray[np.float32],
    design: npt.NDArray[np.float32],
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    known = np.isfinite(block)
    filled = np.where(known, block, np.float32(0))
    scale = np.abs(filled).max(axis=1)
    filled = filled / np.where(scale > 0, scale, 1)[:, None]
    level = filled.sum(axis=1) / np.maximum(known.sum(axis=1), 1)
    filled = np.where(known, filled, level[:, None])
    coefficients = filled @ solver.T
    partly = ~known.all(axis=1)
    for _ in range(_FILL_ROUNDS if partly.any() else 0):
        guess = coefficients[partly] @ design.T
        filled[partly] = np.where(known[partly], filled[partly], guess)
        coefficients[partly] = filled[partly] @ solver.T
    return coefficients, scale


def _knots(num_changepoints: int, num_bins: int) -> Floats:
    """Changepoints as shares of the past; never more than there are bins to tell them apart."""
    usable = int(num_bins * _CHANGEPOINT_RANGE)
    count = max(min(num_changepoints, usable - 1), 0)
    return np.linspace(0, _CHANGEPOINT_RANGE, count + 1)[1:]


def _seasons(shape: Shape, span: int) -> list[tuple[int, int]]:
    """(period, order) of the seasons of which two periods are known."""
    seasons = [(DAY_MINUTES, shape.daily_order), (WEEK_MINUTES, shape.weekly_order)]
    return [(period, order) for period, order in seasons if span >= 2 * period and order > 0]


def _fourier(minutes: Floats, period: int, order: int) -> Floats:
    angle = 2 * np.pi / period * minutes[:, None] * np.arange(1, order + 1)[None, :]
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def _columns(shape: Shape, span: int) -> dict[str, slice]:
    """Where each component's columns lie in the design; the absent ones are empty."""
    num_trend = 2 + len(_knots(shape.num_changepoints, span // shape.bin_minutes))
    widths = {period: 2 * order for period, order in _seasons(shape, span)}
    bounds = [0, num_trend]
    for width in (
        widths.get(DAY_MINUTES, 0),
        widths.get(WEEK_MINUTES, 0),
        1 if shape.holidays else 0,
    ):
        bounds.append(bounds[-1] + width)
    names = ("trend", "daily", "weekly", "holidays")
    return {name: slice(bounds[i], bounds[i + 1]) for i, name in enumerate(names)}


def _ridge(shape: Shape, span: int, changepoint_ridge: float) -> Floats:
    columns = _columns(shape, span)
    ridge = np.full(columns["holidays"].stop, shape.season_ridge)
    ridge[:2] = 1e-3  # level and slope are all but free
    ridge[2 : columns["trend"].stop] = changepoint_ridge
    return ridge
