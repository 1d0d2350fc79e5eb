"""How far counts scatter about their recent mean: where the heads' negative binomial starts from.

A platform's sum over thousands of functions varies by a percent, a bursty client by its own size.
The heads learn corrections to what each series' last hours show, not the whole range.
"""

from __future__ import annotations

import numpy as np

from flashserve.forecast.core import Floats

_MEMORY = 1 - 0.5 ** (1 / 120)
_LOW, _HIGH = -3.0, 9.0


class Scatter:
    """Squared relative misses of the recent mean, [series], halving in two hours."""

    def __init__(self, num_series: int) -> None:
        self._squared = np.ones(num_series)

    def advance(self, values: Floats, expected: Floats, known: Floats) -> None:
        """Values came where `expected` were; both [series], known is 1 or 0."""
        miss = np.minimum(np.abs(values - expected) / (expected + 1), 1e3)
        self._squared += _MEMORY * known * (miss * miss - self._squared)

    def log_shape(self, expected: Floats) -> Floats:
        """Log of the shape that gives such misses beyond Poisson's: [series].

        Drawn to 0, a geometric number, where there is less than about one a minute.
        """
        beyond = np.maximum(self._squared - 1 / (expected + 1), 1e-6)
        certain = expected / (expected + 1)
        shape: Floats = np.clip(-np.log(beyond), _LOW, _HIGH) * certain
        return shape
