"""How soon after a request the next one comes, by the second: what minute forecasts cannot say."""

from __future__ import annotations

import bisect

from flashserve.types import ModelId

EDGES_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 120.0)
"""Bin b holds gaps in (EDGES_S[b - 1], EDGES_S[b]]; longer ones are one more bin."""
_NUM_BINS = len(EDGES_S) + 1
_FADING = 0.98
"""What a gap still weighs after each later one of its model."""
_POOL_WEIGHT = 3.0
"""So many gaps of a model's own weigh as much as those of all models."""
_POOL_FADING = 0.9999
_MAX_UNIT = 1e100


class _Histogram:
    """Counts that fade with each gap. Instead of all older ones, the unit of the next one changes:
    a count is worth `counts[b] / unit` gaps.
    """

    __slots__ = ("_growth", "counts", "unit")

    def __init__(self, fading: float, each: float) -> None:
        self._growth = 1 / fading
        self.counts = [each] * _NUM_BINS
        self.unit = 1.0

    def add(self, found: int) -> None:
        self.unit *= self._growth
        self.counts[found] += self.unit
        if self.unit > _MAX_UNIT:
            self.counts = [count / self.unit for count in self.counts]
            self.unit = 1.0


class RecentGaps:
    """Histograms of the gaps between requests, one for each model and one of all together."""

    def __init__(self) -> None:
        self._last: dict[ModelId, float] = {}
        self._own: dict[ModelId, _Histogram] = {}
        self._all = _Histogram(_POOL_FADING, 1.0)

    def arrived(self, model_id: ModelId, now: float) -> None:
        last = self._last.get(model_id)
        self._last[model_id] = now
        if last is None or now < last:
            return
        own = self._own.get(model_id)
        if own is None:
            own = self._own[model_id] = _Histogram(_FADING, 0.0)
        found = bisect.bisect_left(EDGES_S, now - last)
        own.add(found)
        self._all.add(found)

    def forget(self, model_id: ModelId) -> None:
        self._last.pop(model_id, None)
        self._own.pop(model_id, None)

    def keep_s(self, model_id: ModelId, age_s: float, limit_s: float, cold_s: float) -> float:
        """How long an idle replica is worth keeping from now on; 0 when it is not.

        Of all lengths up to limit_s, the one for which what is saved in expectation exceeds the
        idle time most; gaps lie evenly within their bin.

        Args:
            age_s: since the model's last request.
            cold_s: idle seconds that cost as much as a cold start.
        """
        first = bisect.bisect_right(EDGES_S, age_s)  # whose gaps may still end
        if first == len(EDGES_S):
            return 0.0
        left = self._left(model_id, first, age_s)
        total = sum(left)
        until = age_s + limit_s
        best_s = best = 0.0
        came = waited = 0.0  # of all that is left: the share that came, seconds waited for it
        begin = age_s
        for edge, weight in zip(EDGES_S[first:], left, strict=False):
            end = min(until, edge)
            inside = weight / total * ((end - begin) / (edge - begin))
            # Who came in this bin waited to its middle, everyone else to its end.
            came += inside
            waited += inside * ((begin + end) / 2 - age_s)
            gain = came * cold_s - waited - (1 - came) * (end - age_s)
            if gain > best:
                best, best_s = gain, end - age_s
            if end >= until:
                break
            begin = end
        return best_s

    def _left(self, model_id: ModelId, first: int, age_s: float) -> list[float]:
        """The weights of the bins from `first` on, of the gaps that are longer than age_s."""
        share = _POOL_WEIGHT / sum(self._all.counts)
        pool = self._all.counts[first:]
        if own := self._own.get(model_id):
            unit = own.unit
            weights = [
                count * share + mine / unit
                for count, mine in zip(pool, own.counts[first:], strict=True)
            ]
        else:
            weights = [count * share for count in pool]
        low, high = EDGES_S[first - 1] if first else 0.0, EDGES_S[first]
        weights[0] *= (high - max(low, age_s)) / (high - low)
        return weights
