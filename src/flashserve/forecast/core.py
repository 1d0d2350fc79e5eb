"""What every forecaster takes and gives: minute counts of many series, and a distribution for each.

Everything is batched over series, pure given what was fitted, and takes time as an argument.
Minutes are whole minutes since 1970 (UTC), or since the start of a trace.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

QUANTILE_LEVELS = (0.1, 0.5, 0.9, 0.99)

# No minute brings more: a larger number is a mistake. It bounds the arithmetic, not the traffic.
MAX_COUNT = 1e12


@dataclasses.dataclass(frozen=True, slots=True)
class History:
    """What is known of some series before a moment.

    counts: [series, minutes], not negative; column j is minute `start + j`, and the first minute
    that is not known is `end`. A series that is younger than that has NaN before its first minute.
    """

    names: tuple[str, ...]
    start: int
    counts: npt.NDArray[np.float32]

    @property
    def end(self) -> int:
        return self.start + int(self.counts.shape[1])

    def before(self, minute: int) -> History:
        """The same series as they were known at the beginning of `minute`."""
        return History(self.names, self.start, self.counts[:, : max(minute - self.start, 0)])


Index = npt.NDArray[np.intp] | slice


class Prediction:
    """Counts of each series in [end, end + lead) for each lead, as distributions.

    p_arrival: [series, leads], P(count >= 1). mean: [series, leads]. quantiles:
    [series, leads, QUANTILE_LEVELS] of the count, or a function that makes those of some series and
    leads: they cost the most and are made only for who asks. components: by name (trend, daily,
    weekly, residual, hazard), [series], what the forecast is made of, as far as the model knows.
    """

    __slots__ = ("_quantiles", "components", "mean", "p_arrival")

    def __init__(
        self,
        p_arrival: Floats,
        mean: Floats,
        quantiles: Floats | Callable[[Index, Index], Floats],
        components: dict[str, Floats] | None = None,
    ) -> None:
        self.p_arrival = p_arrival
        self.mean = mean
        self.components = components or {}
        self._quantiles = quantiles

    @property
    def quantiles(self) -> Floats:
        if callable(self._quantiles):
            self._quantiles = self._quantiles(slice(None), slice(None))
        return self._quantiles

    def quantiles_of(self, rows: Index, leads: Index) -> Floats:
        """Those of some series and leads only: [rows, leads, QUANTILE_LEVELS]."""
        if callable(self._quantiles):
            return self._quantiles(rows, leads)
        return self._quantiles[rows][:, leads]


class ArrivalModel(Protocol):
    """A forecaster. `fit` may take long and sees earlier data only; `predict` is quick."""

    name: str

    def fit(self, history: History, weights: Floats | None = None) -> None:
        """Learns what all series share, and what each has of its own.

        weights: [series], how many series of the population each stands for.
        """

    def predict(self, history: History, leads: Sequence[int]) -> Prediction:
        """Forecasts from `history.end` on, for leads in minutes, ascending.

        The series may be others than those of `fit`: what is not known of one comes from all.
        """


class Follower(Protocol):
    """A model's state of some series, moved on a minute at a time: what a tick costs.

    `advance(counts)` tells the counts of the next minute, [series], NaN where not known;
    `forecast(leads)` is the prediction from the first minute not told yet.
    """

    def advance(self, counts: npt.ArrayLike) -> None: ...

    def forecast(self, leads: Sequence[int]) -> Prediction: ...


class FollowingModel(ArrivalModel, Protocol):
    """A model whose prediction at every minute of a history costs one pass, not one pass each."""

    def follow(self, names: Sequence[str], start: int) -> Follower:
        """The state of these series, of which nothing is known before minute `start`."""


def replay(model: FollowingModel, history: History, leads: Sequence[int]) -> Prediction:
    """`predict` by telling a new follower every minute of the history."""
    follower = model.follow(history.names, history.start)
    for column in history.counts.T:
        follower.advance(column)
    return follower.forecast(leads)


def known_counts(counts: npt.ArrayLike) -> Floats:
    """The counts as they are, and NaN for what cannot be one (negative, above MAX_COUNT)."""
    values = np.asarray(counts, dtype=np.float64)
    return np.where((values >= 0) & (values <= MAX_COUNT), values, np.nan)
