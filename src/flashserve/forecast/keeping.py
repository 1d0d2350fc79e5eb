"""Policies that decide without a forecast: the fixed keep-alive and the hybrid histogram."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from flashserve.forecast import decisions
from flashserve.forecast.core import History
from flashserve.forecast.decisions import Bools, Ints


class FixedKeepAlive:
    """Warm for so many minutes after each arrival."""

    def __init__(self, minutes: int) -> None:
        self.name = f"keep-alive-{minutes}"
        self._minutes = minutes

    def warm(self, history: History, first: int) -> Bools:
        return decisions.keep_alive(history.counts, first - history.start, self._minutes)


@dataclasses.dataclass(frozen=True, slots=True)
class HistogramSettings:
    """As published; `head` and `tail` are percentiles of the gaps."""

    range_minutes: int = 240
    head: float = 5.0
    tail: float = 99.0
    margin: float = 0.1
    min_variation: float = 2.0
    max_outside: float = 0.5
    outside_margin: float = 0.15


class HybridHistogram:
    """The policy of "Serverless in the Wild" (Shahrad et al., ATC 2020, section 4).

    Each series has a histogram of its gaps, in minutes up to a range of hours. Where it is
    concentrated (the bins' counts vary by at least 2), the model is let go after an arrival, warmed
    shortly before the head of the gaps, and kept until shortly after their tail. Where most gaps
    lie outside the range, a forecast of the next gap (ARIMA) gives the window. Otherwise, and at
    the first arrivals, the model is kept for the whole range.

    next_gap: forecasts a gap (minutes) from those before it, oldest first; None leaves that branch
    out, so that such series are kept for the whole range.
    """

    def __init__(
        self,
        settings: HistogramSettings | None = None,
        next_gap: Callable[[Sequence[int]], float] | None = None,
    ) -> None:
        self._settings = settings or HistogramSettings()
        self._next_gap = next_gap
        s = self._settings
        self.name = f"hybrid-histogram-{s.head:g}-{s.tail:g}-{s.range_minutes}"

    def warm(self, history: History, first: int) -> Bools:
        active = history.counts > 0
        num_series, num_minutes = active.shape
        offset = first - history.start
        state = _Gaps(num_series, self._settings, self._next_gap)
        last = np.full(num_series, -1)
        warm = np.zeros((num_series, num_minutes - offset), np.bool_)
        for column in range(num_minutes):
            if column >= offset:
                age = column - last
                is_inside = (state.begins <= age) & (age <= state.ends)
                warm[:, column - offset] = is_inside & (last >= 0)
            rows = np.flatnonzero(active[:, column])
            again = rows[last[rows] >= 0]
            if again.size:
                state.add(again, column - last[again])
            last[rows] = column
        return warm


class _Gaps:
    """The histograms of all series, and the window of ages in which each is warm."""

    def __init__(
        self,
        num_series: int,
        settings: HistogramSettings,
        next_gap: Callable[[Sequence[int]], float] | None,
    ) -> None:
        self._settings = settings
        self._next_gap = next_gap
        self._bins = np.zeros((num_series, settings.range_minutes + 1), np.int32)
        self._outside = np.zeros(num_series, np.int64)
        self._past: dict[int, list[int]] = {}
        self.begins = np.zeros(num_series, np.int64)
        self.ends = np.full(num_series, settings.range_minutes)

    def add(self, rows: Ints, gaps: Ints) -> None:
        """One more gap of each of the rows; their windows follow."""
        inside = gaps <= self._settings.range_minutes
        self._bins[rows[inside], gaps[inside]] += 1
        self._outside[rows[~inside]] += 1
        if self._next_gap is not None:
            for row, gap in zip(rows.tolist(), gaps.tolist(), strict=True):
                self._past.setdefault(row, []).append(gap)
        self.begins[rows], self.ends[rows] = self._windows(rows)

    def _windows(self, rows: Ints) -> tuple[Ints, Ints]:
        s = self._settings
        bins = self._bins[rows]
        inside = bins.sum(axis=1)
        mean = inside / s.range_minutes
        spread = bins[:, 1:].std(axis=1)
        concentrated = spread >= s.min_variation * mean
        total = np.cumsum(bins, axis=1)
        head = (total >= np.ceil(inside * s.head / 100)[:, None].clip(1)).argmax(axis=1)
        tail = (total >= np.ceil(inside * s.tail / 100)[:, None].clip(1)).argmax(axis=1)
        follows = concentrated & (inside > 0)
        begins = np.where(follows, np.floor(head * (1 - s.margin)), 0).astype(np.int64)
        ends = np.where(follows, np.ceil(tail * (1 + s.margin)), s.range_minutes).astype(np.int64)
        self._forecast(rows, inside, begins, ends)
        return begins, ends

    def _forecast(
        self, rows: Ints, inside: npt.NDArray[np.int64], begins: Ints, ends: Ints
    ) -> None:
        """Where most gaps are outside: the window around the gap that is forecast next."""
        s = self._settings
        outside = self._outside[rows]
        far = outside > s.max_outside * (outside + inside)
        begins[far], ends[far] = 0, s.range_minutes
        if self._next_gap is None:
            return
        for at in np.flatnonzero(far):
            gap = self._next_gap(self._past[int(rows[at])])
            begins[at] = int(gap * (1 - s.outside_margin))
            ends[at] = int(np.ceil(gap * (1 + s.outside_margin)))
