"""On and off: how long a client has been at work, against how long it usually is.

A session is a run of minutes with arrivals in which no rest is as long as a quarter of an hour.
Clients of language models come and go so; within a session they ask often, and between sessions
not at all, whatever their mean rate is.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flashserve.forecast.core import Floats
from flashserve.forecast.hazard import Singles

REST_MINUTES = 15
_LEARNING = 0.2


class Sessions:
    """Of some series, moved on a minute at a time; lengths and rests are kept in log2 minutes."""

    def __init__(self, num_series: int) -> None:
        self._is_on = np.zeros(num_series, dtype=np.bool_)
        self._minutes = np.zeros(num_series)  # since the session began, or since it ended
        self._active = np.zeros(num_series)  # minutes with arrivals in the session
        # [on or off, series]: usual log2 length, and how many were learnt from.
        self._usual = np.zeros((2, num_series))
        self._num = np.zeros((2, num_series))

    def advance(self, active: npt.NDArray[np.bool_], age: npt.NDArray[np.int64]) -> None:
        """One minute: who had arrivals, and for how long each has been quiet after it."""
        began = active & ~self._is_on
        ended = self._is_on & (age >= REST_MINUTES)
        self._minutes += 1
        # The rest that ended a session was no part of it, but is part of what follows.
        self._learn(0, ended, self._minutes - REST_MINUTES)
        self._learn(1, began & (self._num[0] > 0), self._minutes - 1)
        self._minutes = np.where(ended, REST_MINUTES, np.where(began, 1, self._minutes))
        self._active = np.where(began, 1, self._active + active)
        self._is_on = (self._is_on & ~ended) | active

    def _learn(self, which: int, chosen: npt.NDArray[np.bool_], minutes: Floats) -> None:
        (rows,) = np.nonzero(chosen)
        step = np.where(self._num[which, rows] > 0, _LEARNING, 1.0)
        off = np.log2(np.maximum(minutes[rows], 1)) - self._usual[which, rows]
        self._usual[which, rows] += step * off
        self._num[which, rows] += 1

    def columns(self) -> list[Floats | Singles]:
        """is_on; log2 minutes on, or off; both against the usual ones; the session's activity.

        0 where a series is in the other state, or nothing is usual yet.
        """
        on = self._is_on
        lasted = np.log2(self._minutes + 1)
        against = np.clip(lasted - self._usual, -8, 8) * (self._num > 0)
        return [
            on.astype(np.float64),
            np.where(on, lasted, 0),
            np.where(on, 0, lasted) * (self._num[0] > 0),
            np.where(on, against[0], 0),
            np.where(on, 0, against[1]),
            np.where(on, self._active / np.maximum(self._minutes, 1), 0),
            self._usual[0] * (self._num[0] > 0),
            self._usual[1] * (self._num[1] > 0),
        ]
