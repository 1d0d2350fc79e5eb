"""Watches whether what speaks for a series still holds, and says when to fall back.

Two signs, over the last hours. The log likelihood of what came is lower than under a plain
forecaster (EWMA, keep-alive), by more than chance or a small difference would have it. Or counts
leave the 90 % quantile too often, or of busy series too seldom, and the chances are not far ahead
of the plain forecasters'. Then a plain forecaster speaks until the model has caught up again, so a
model that was right for weeks and is wrong since noon costs hours.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flashserve.forecast.core import Floats
from flashserve.forecast.scores import log_loss

Bools = npt.NDArray[np.bool_]

HOLDS, SCORE, COVERAGE = 0, 1, 2
_FADING = 0.5 ** (1 / 360)
# How far a log likelihood must fall behind: nats, and their share of the plain forecaster's.
_BEHIND = 5.0
_BEHIND_SHARE = 0.1
# The share of counts within the 90 % quantile, of minutes in which it is not zero.
_BAND = (0.75, 0.995)
_BACK_IN_BAND = (0.82, 0.985)
_MIN_MINUTES = 30.0
# An integer quantile of few arrivals covers more than its level by nature.
_MIN_BUSY_COUNT = 20.0


class DriftWatch:
    """sign: [series], HOLDS or why a plain forecaster should speak."""

    def __init__(self, num_models: int, num_series: int) -> None:
        self.sign = np.zeros(num_series, np.int8)
        self._losses = np.zeros((num_models, num_series))
        # Of the watched quantile, where it is not zero: minutes, those covered, sum of bounds.
        self._asked = np.zeros(num_series)
        self._covered = np.zeros(num_series)
        self._size = np.zeros(num_series)

    def learn(self, p: Floats, upper: Floats, counts: Floats, is_known: Bools) -> None:
        """Count a minute, of which p and upper were said before.

        p: [models, series]; upper: [series], the 90 % quantile that is watched; counts: [series].
        """
        loss = np.where(is_known, log_loss(p, (counts > 0).astype(np.float64)), 0.0)
        self._losses = self._losses * _FADING + loss
        asked = is_known & (upper > 0)
        self._asked = self._asked * _FADING + asked
        self._covered = self._covered * _FADING + (asked & (counts <= upper))
        self._size = self._size * _FADING + np.where(asked, upper, 0.0)

    def forget_coverage(self, rows: npt.NDArray[np.intp]) -> None:
        """Another model is watched: its coverage is not known yet."""
        for table in (self._asked, self._covered, self._size):
            table[rows] = 0.0

    def judge(
        self,
        chosen: npt.NDArray[np.intp],
        bounding: npt.NDArray[np.intp],
        plain: npt.NDArray[np.intp],
    ) -> None:
        """Of each series, the model whose chances are watched, and the one whose quantile is.

        plain: indices of those to fall back to, which are never set aside.
        """
        is_plain, has_plain_bound = np.isin(chosen, plain), np.isin(bounding, plain)
        reference = self._losses[plain].min(axis=0)
        behind = self._losses[chosen, np.arange(len(chosen))] - reference
        is_behind = ~is_plain & (behind > np.maximum(_BEHIND, _BEHIND_SHARE * reference))
        is_far_ahead = behind < -_BEHIND
        leaves, stays = self._coverage()
        leaves &= ~is_far_ahead & ~has_plain_bound
        sign = np.where(is_behind, SCORE, np.where(leaves, COVERAGE, HOLDS))
        is_back = (behind <= 0) & (stays | is_far_ahead)
        kept = np.where(is_back, HOLDS, self.sign)
        kept = np.where(is_plain & (kept == SCORE), HOLDS, kept)
        kept = np.where(has_plain_bound & (kept == COVERAGE), HOLDS, kept)
        self.sign = np.where(sign != HOLDS, sign, kept).astype(np.int8)

    def _coverage(self) -> tuple[Bools, Bools]:
        """Whether the watched quantile is out of its band; whether it is well inside."""
        asked = np.maximum(self._asked, 1e-9)
        share, is_busy = self._covered / asked, self._size / asked >= _MIN_BUSY_COUNT
        enough = self._asked >= _MIN_MINUTES
        is_out = (share < _BAND[0]) | (is_busy & (share > _BAND[1]))
        is_in = (share >= _BACK_IN_BAND[0]) & ((share <= _BACK_IN_BAND[1]) | ~is_busy)
        return enough & is_out, is_in | ~enough

    def fallback(self, plain: npt.NDArray[np.intp]) -> npt.NDArray[np.intp]:
        """The plain model whose log likelihood of the last hours is best: [series]."""
        best: npt.NDArray[np.intp] = plain[self._losses[plain].argmin(axis=0)]
        return best
