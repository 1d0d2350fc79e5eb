"""What models took: seconds of workers, and how long requests waited for starts."""

from __future__ import annotations

import dataclasses

from flashserve.policy.cost import Prices


@dataclasses.dataclass(slots=True)
class WorkerUsage:
    """Sums over some time.

    busy_s, loading_s, idle_s: of workers; wait_s: from arrival to dispatch, of the requests that
    waited for a start (`cold` of all `requests`); misses: those of them that waited longer than the
    SLO.
    """

    busy_s: float = 0.0
    loading_s: float = 0.0
    idle_s: float = 0.0
    wait_s: float = 0.0
    requests: int = 0
    cold: int = 0
    misses: int = 0

    @property
    def held_s(self) -> float:
        """Seconds of workers in all."""
        return self.busy_s + self.loading_s + self.idle_s

    def add(self, other: WorkerUsage) -> None:
        self.busy_s += other.busy_s  # one by one: a server adds these for each of its models
        self.loading_s += other.loading_s
        self.idle_s += other.idle_s
        self.wait_s += other.wait_s
        self.requests += other.requests
        self.cold += other.cold
        self.misses += other.misses

    def worker_price(self, prices: Prices) -> float:
        return self.held_s * prices.gpu_per_s

    def wait_price(self, prices: Prices) -> float:
        """What the waiting for starts was worth."""
        return self.wait_s * prices.wait_per_s + self.misses * prices.slo_miss

    def count_cold(self, wait_s: float, slo_s: float) -> None:
        """One request waited for a start."""
        self.cold += 1
        self.wait_s += wait_s
        self.misses += wait_s > slo_s

    @property
    def is_nothing(self) -> bool:
        return self == _NOTHING


FIELDS = tuple(field.name for field in dataclasses.fields(WorkerUsage))
_NOTHING = WorkerUsage()
