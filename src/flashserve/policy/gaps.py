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


class RecentGaps:
    """Histograms of the gaps between requests, one for each model and one of all together."""

    def __init__(self) -> None:
        self._last: dict[ModelId, float] = {}
        self._own: dict[ModelId, list[float]] = {}
        self._all = [1.0] * _NUM_BINS

    def arrived(self, model_id: ModelId, now: float) -> None:
        last = self._last.get(model_id)
        self._last[model_id] = now
        if last is None or now < last:
            return
        found = bisect.bisect_left(EDGES_S, now - last)
        own = self._own.setdefault(model_id, [0.0] * _NUM_BINS)
        for bins, fading in ((own, _FADING), (self._all, _POOL_FADING)):
            bins[:] = [count * fading for count in bins]
            bins[found] += 1.0

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
        weights = self._weights(model_id)
        total = sum(self._left(weights, bin_number, age_s) for bin_number in range(_NUM_BINS))
        best_s = best = 0.0
        came = waited = 0.0  # of all that is left: the share that came, seconds waited for it
        begin = age_s
        for bin_number, edge in enumerate(EDGES_S):
            if edge <= age_s:
                continue
            end = min(edge, age_s + limit_s)
            inside = self._left(weights, bin_number, begin) / total
            inside *= (end - begin) / (edge - begin)
            # Who came in this bin waited to its middle, everyone else to its end.
            came += inside
            waited += inside * ((begin + end) / 2 - age_s)
            gain = came * cold_s - waited - (1 - came) * (end - age_s)
            if gain > best:
                best, best_s = gain, end - age_s
            begin = end
            if end >= age_s + limit_s:
                break
        return best_s

    def _weights(self, model_id: ModelId) -> list[float]:
        own = self._own.get(model_id)
        share = _POOL_WEIGHT / sum(self._all)
        if own is None:
            return [count * share for count in self._all]
        return [count * share + mine for count, mine in zip(self._all, own, strict=True)]

    @staticmethod
    def _left(weights: list[float], bin_number: int, age_s: float) -> float:
        """The weight of a bin's gaps that are longer than age_s."""
        if bin_number == len(EDGES_S):
            return weights[bin_number]
        low = EDGES_S[bin_number - 1] if bin_number else 0.0
        high = EDGES_S[bin_number]
        if age_s >= high:
            return 0.0
        return weights[bin_number] * (high - max(low, age_s)) / (high - low)
