"""Isotonic calibration of P(arrival), learnt from what came true.

Each forecast is filed under its log odds, in steps of a quarter from -9 to 9. When its lead has
passed, the step learns whether something arrived; old evidence fades. A curve is the isotonic
regression (pool adjacent violators; Ayer et al., 1955) of these shares, drawn towards the identity
with the weight of a few arrivals, so a step of which little was seen stays where it was. A
forecast is filed before its outcome is known: the curve that it meets never saw it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from flashserve.forecast.core import Floats

Ints = npt.NDArray[np.integer[Any]]

_REACH = 9.0
_STEP = 0.25
KNOTS = np.arange(-_REACH, _REACH + _STEP / 2, _STEP)
NUM_KNOTS = len(KNOTS)
_IDENTITY = 1 / (1 + np.exp(-KNOTS))
# The identity weighs as much as so many arrivals, or as minutes without one where those are rarer;
# but where hardly anything was said to happen, what happened soon weighs more.
_PRIOR_EVENTS = 3.0
_PRIOR: Floats = _PRIOR_EVENTS / np.maximum(np.minimum(_IDENTITY, 1 - _IDENTITY), 0.01)
# A share of the identity stays, so that what was told apart is not made equal.
_KEPT_SLOPE = 0.05
_HALF_LIFE_MINUTES = 3 * 1440.0
_FADING = 0.5 ** (1 / _HALF_LIFE_MINUTES)


def log_odds(p: Floats) -> Floats:
    """Within the reach of the knots."""
    bounded = np.clip(p, _IDENTITY[0], _IDENTITY[-1])
    odds: Floats = np.log(bounded / (1 - bounded))
    return odds


def isotonic(values: Floats, weights: Floats) -> Floats:
    """The non-decreasing sequence that is nearest to `values` in weighted squares: [knots]."""
    means: list[float] = []
    masses: list[float] = []
    sizes: list[int] = []
    for value, weight in zip(values.tolist(), weights.tolist(), strict=True):
        mean, mass, size = value, weight, 1
        while means and means[-1] >= mean:
            mean = (mean * mass + means.pop() * masses[-1]) / (mass + masses[-1])
            mass += masses.pop()
            size += sizes.pop()
        means.append(mean)
        masses.append(mass)
        sizes.append(size)
    return np.repeat(means, sizes)


class Curves:
    """Calibration curves by any number of groups: the identity until something is learnt.

    seen and came: [groups, knots], how many forecasts were filed there, and how many came true.
    """

    def __init__(self, num_groups: int) -> None:
        self.seen = np.zeros((num_groups, NUM_KNOTS))
        self.came = np.zeros((num_groups, NUM_KNOTS))
        self._log_odds = np.tile(KNOTS, (num_groups, 1))
        self._next = 0

    def cells(self, groups: Ints, odds: Floats) -> Ints:
        """Where forecasts of these log odds are filed: indices for `learn`."""
        at = np.rint((odds + _REACH) / _STEP).astype(np.int64)
        cells: Ints = groups * NUM_KNOTS + at
        return cells

    def learn(self, cells: Ints, came: npt.NDArray[np.bool_], weight: float = 1.0) -> None:
        """What became of forecasts. Overlapping forecasts should share a weight."""
        size = self.seen.size
        self.seen += weight * np.bincount(cells, minlength=size).reshape(self.seen.shape)
        self.came += weight * np.bincount(cells[came], minlength=size).reshape(self.seen.shape)

    def fade(self) -> None:
        """A minute has passed."""
        self.seen *= _FADING
        self.came *= _FADING

    def refit(self, num_groups: int) -> None:
        """Draw the next few groups' curves anew, in turn."""
        for _ in range(min(num_groups, len(self.seen))):
            self._draw(self._next)
            self._next = (self._next + 1) % len(self.seen)

    def refit_all(self) -> None:
        self.refit(len(self.seen))

    def _draw(self, group: int) -> None:
        weights = self.seen[group] + _PRIOR
        shares = (self.came[group] + _PRIOR * _IDENTITY) / weights
        drawn = log_odds(isotonic(shares, weights))
        self._log_odds[group] = (1 - _KEPT_SLOPE) * drawn + _KEPT_SLOPE * KNOTS

    def apply(self, groups: Ints, odds: Floats) -> Floats:
        """Calibrated P(arrival) of forecasts of these log odds; groups: of the same shape."""
        at = (odds + _REACH) / _STEP
        left = np.minimum(at.astype(np.int64), NUM_KNOTS - 2)
        share = at - left
        table = self._log_odds.ravel()
        cell = groups * NUM_KNOTS + left
        below = table[cell]
        read = below + (table[cell + 1] - below) * share
        calibrated: Floats = 1 / (1 + np.exp(-read))
        return calibrated
