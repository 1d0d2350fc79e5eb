"""The hybrid histogram policy of "Serverless in the Wild", one model and one gap at a time."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable, Sequence

from flashserve.policy.plans import Facts, Plan, clamp, replicas_for_load
from flashserve.types import ModelId

_MINUTE_S = 60.0
_MAX_PAST = 200
"""Gaps that the forecast of the next one sees."""

NextGap = Callable[[Sequence[int]], float]
"""Forecasts a gap (minutes) from those before it, oldest first."""


@dataclasses.dataclass(frozen=True, slots=True)
class Window:
    """Ages since the last arrival, in minutes, between which the model is to be warm."""

    begin: float
    end: float


class HybridHistogram:
    """Lets a model go after an arrival, warms it before the head of its gaps, keeps it to the tail.

    That is where its histogram of gaps (minutes, up to a range of hours) is concentrated: the bins'
    counts have a coefficient of variation of 2 or more. Where most gaps lie outside the range, a
    forecast of the next gap gives the window. Otherwise the model is kept for the whole range.

    Args:
        next_gap: that forecast (ARIMA as published); None keeps such models for the whole range.

    Source: Shahrad et al., USENIX ATC 2020, section 4 (5th and 99th percentile, 10 % margin, four
    hours, 15 % around the forecast).
    """

    name = "histogram"
    shares_slots = True

    def __init__(
        self,
        next_gap: NextGap | None = None,
        *,
        range_minutes: int = 240,
        head: float = 0.05,
        tail: float = 0.99,
    ) -> None:
        self._next_gap = next_gap
        self._range = range_minutes
        self._head, self._tail = head, tail
        self._gaps: dict[ModelId, _Gaps] = {}

    def arrived(self, model_id: ModelId, now: float) -> None:
        gaps = self._gaps.get(model_id)
        if gaps is None:
            self._gaps[model_id] = gaps = _Gaps()
        gaps.arrived(int(now // _MINUTE_S), self._range)

    def forget(self, model_id: ModelId) -> None:
        self._gaps.pop(model_id, None)

    def plan(self, facts: Facts, now: float) -> Plan:
        wanted = replicas_for_load(facts)
        gaps = self._gaps.get(facts.model_id)
        if gaps is None or facts.last_arrival_at is None:
            return Plan(clamp(wanted, facts), self._range * _MINUTE_S, why="no arrivals yet")
        window = self._window(gaps)
        begin_at = facts.last_arrival_at + window.begin * _MINUTE_S
        end_at = facts.last_arrival_at + window.end * _MINUTE_S
        reason = f"gaps end {window.begin:.0f} to {window.end:.0f} min after an arrival"
        if now < begin_at:
            return Plan(clamp(wanted, facts), 0.0, begin_at, why=reason)
        if now < end_at:
            return Plan(clamp(max(wanted, 1), facts), 0.0, end_at, why=reason)
        return Plan(clamp(wanted, facts), 0.0, why=reason)

    def _window(self, gaps: _Gaps) -> Window:
        """Computed anew only when a gap has ended since."""
        if gaps.window is None:
            gaps.window = self._new_window(gaps)
        return gaps.window

    def _new_window(self, gaps: _Gaps) -> Window:
        if gaps.num_outside > gaps.num_inside:
            if self._next_gap is None:
                return Window(0.0, self._range)
            ahead = self._next_gap(list(gaps.past))
            return Window(math.floor(ahead * 0.85), math.ceil(ahead * 1.15))
        if not gaps.num_inside or gaps.variation(self._range) < 2.0:
            return Window(0.0, self._range)
        head = gaps.percentile(self._head)
        tail = gaps.percentile(self._tail)
        return Window(math.floor(head * 0.9), math.ceil(tail * 1.1))


class _Gaps:
    """The histogram of one model's gaps."""

    def __init__(self) -> None:
        self.bins: dict[int, int] = {}
        self.num_inside = self.num_outside = 0
        self.past: collections.deque[int] = collections.deque(maxlen=_MAX_PAST)
        self.window: Window | None = None
        self._last: int | None = None

    def arrived(self, minute: int, range_minutes: int) -> None:
        last, self._last = self._last, minute
        if last is None or minute <= last:
            return
        gap = minute - last
        self.window = None
        self.past.append(gap)
        if gap > range_minutes:
            self.num_outside += 1
        else:
            self.num_inside += 1
            self.bins[gap] = self.bins.get(gap, 0) + 1

    def variation(self, range_minutes: int) -> float:
        """Standard deviation of the bins' counts over their mean, empty ones included."""
        mean = self.num_inside / range_minutes
        squares = sum(count * count for count in self.bins.values()) / range_minutes
        return math.sqrt(max(squares - mean * mean, 0.0)) / mean

    def percentile(self, share: float) -> int:
        """The least gap that this share of the gaps inside the range does not exceed."""
        needed = max(1, math.ceil(self.num_inside * share))
        seen = 0
        for gap in sorted(self.bins):
            seen += self.bins[gap]
            if seen >= needed:
                return gap
        raise AssertionError("the histogram is empty")
