"""Arrivals drawn from ServeGen's statistics: rate and shape of the gaps per client and window.

Source: ServeGen, arXiv:2505.09999; windows of ten minutes.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flashserve.forecast.core import Floats

_MINUTES = 10
_MANY = 600
_MIN_SHAPE = 0.05


def draw_arrivals(
    rates: Floats, shapes: Floats, is_gamma: npt.NDArray[np.bool_], seed: int
) -> npt.NDArray[np.float32]:
    """Counts per minute, [clients, windows * 10], whose windows hold as many as were measured.

    A window's gaps are drawn with the published shape and stretched to fill the window, so the
    number of its arrivals stays the published one; windows of more than 600 arrivals have some in
    every minute, and are spread evenly.

    rates: [clients, windows], requests per second. shapes: of the Gamma or Weibull gaps.
    """
    rng = np.random.default_rng(seed)
    totals = np.rint(rates * 60 * _MINUTES).astype(np.int64)
    counts = np.repeat(totals / _MINUTES, _MINUTES, axis=1).astype(np.float32)
    for client, window in np.argwhere((totals > 0) & (totals <= _MANY)):
        shape = max(float(shapes[client, window]), _MIN_SHAPE)
        size = int(totals[client, window]) + 1
        draw = rng.standard_gamma if is_gamma[client, window] else rng.weibull
        gaps = draw(shape, size)
        total = gaps.sum()
        ends = np.cumsum(gaps)[:-1] / total if total > 0 else rng.random(size - 1)
        minutes = np.minimum((ends * _MINUTES).astype(np.int64), _MINUTES - 1)
        first = window * _MINUTES
        counts[client, first : first + _MINUTES] = np.bincount(minutes, minlength=_MINUTES)
    return counts
