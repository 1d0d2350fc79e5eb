"""Asks for the bytes of adapters that a forecast expects to be asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from flashserve.forecast.arrivals import series_of
from flashserve.live.adapterrows import RegisteredAdapter
from flashserve.policy.prefetch import Candidate, choose
from flashserve.store.sources.source import scheme_of
from flashserve.types import ModelId

HORIZON_S = 300.0
_LATENCY_S = 0.05
_LOCAL_BYTES_PER_S = 1e9
_REMOTE_BYTES_PER_S = 1e8


class Prefetcher:
    """Within a budget, the adapters that save most waiting per byte.

    Args:
        adapters: those there are now.
        prefetch: brings the adapter of a series near; cheap for one that is.
    """

    def __init__(
        self,
        adapters: Callable[[], Iterable[RegisteredAdapter]],
        prefetch: Callable[[str], object],
        budget_bytes: int,
        least_p: float,
    ) -> None:
        self._adapters = adapters
        self._prefetch = prefetch
        self._budget_bytes = budget_bytes
        self._least_p = least_p

    def series(self) -> dict[ModelId, RegisteredAdapter]:
        return {series_of(each.spec.base, each.name): each for each in self._adapters()}

    def ask(self, chances: dict[ModelId, float]) -> list[str]:
        """chances: P(arrival within HORIZON_S) by series. Returns those that were asked for."""
        adapters = self.series()
        candidates = [
            Candidate(series, adapters[series].spec.size_bytes, p, _saved_s(adapters[series]))
            for series, p in chances.items()
            if series in adapters
        ]
        chosen = choose(candidates, self._budget_bytes, self._least_p)
        for series in chosen:
            self._prefetch(series)
        return chosen


def _saved_s(adapter: RegisteredAdapter) -> float:
    """What reading it takes, roughly: only how adapters compare counts."""
    is_remote = scheme_of(adapter.spec.source) in {"s3", "hf"}
    rate = _REMOTE_BYTES_PER_S if is_remote else _LOCAL_BYTES_PER_S
    return _LATENCY_S + adapter.spec.size_bytes / rate
