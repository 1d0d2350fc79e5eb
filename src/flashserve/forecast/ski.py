"""Keep-alive for a model without history: rent for as long as buying would have cost.

Keeping warm for C_cold / c_idle minutes after each arrival costs at most twice what somebody who
knows the future would pay (the ski-rental bound; Karlin et al., Algorithmica 1988). Written as a
forecast: if the time to the next arrival exceeds x with probability 1 / (1 + 2x), the rule "warm
while P(arrival) exceeds the threshold" keeps alive for exactly that long, at every price at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flashserve.forecast.core import Floats, History, Prediction, known_counts, replay
from flashserve.forecast.hurdle import hurdle_prediction

# A model that was deployed and never asked for: one arrival a day is as good a guess as any.
_FIRST_ARRIVAL_MINUTES = 1440.0


class SkiRental:
    """P(arrival within L | a quiet minutes) = L / (a + 1/2 + L). Learns nothing."""

    name = "ski-rental"

    def fit(self, history: History, weights: Floats | None = None) -> None:
        """Nothing to learn: the rule is for want of history."""

    def follow(self, names: Sequence[str], start: int) -> _SkiFollower:
        return _SkiFollower(len(names), start)

    def predict(self, history: History, leads: Sequence[int]) -> Prediction:
        return replay(self, history, leads)


class _SkiFollower:
    def __init__(self, num_series: int, start: int) -> None:
        self.minute = start
        # Quiet minutes since the last arrival, or since the series is known.
        self._quiet: Floats = np.zeros(num_series)
        self._has_arrived = np.zeros(num_series, dtype=bool)

    def advance(self, counts: npt.ArrayLike) -> None:
        values = known_counts(counts)
        arrived = values > 0
        self._quiet = np.where(arrived, 0.0, self._quiet + ~np.isnan(values))
        self._has_arrived |= arrived
        self.minute += 1

    def forecast(self, leads: Sequence[int]) -> Prediction:
        ahead = np.asarray(leads, dtype=np.float64)[None, :]
        offset = np.where(self._has_arrived, 0.5, _FIRST_ARRIVAL_MINUTES)
        p = ahead / (self._quiet[:, None] + offset[:, None] + ahead)
        return hurdle_prediction(p, np.zeros_like(p), np.ones_like(p), {"hazard": p[:, 0]})
