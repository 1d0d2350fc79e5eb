"""FlashServe's policy: what a forecast is worth, in money, decides what is warm and for how long.

A minute of an idle replica costs what its accelerator costs. A request that finds none waits for a
start, which has a price as well, and the nearer its bytes the lower: a model in DRAM may sleep
sooner than one that would come from disk. A model is warm through the next window when the price of
a start times the chance of a request exceeds that of the idle window times the chance of none.
"""

from __future__ import annotations

import math

import msgspec

from flashserve.policy import text
from flashserve.policy.cost import Prices
from flashserve.policy.gaps import RecentGaps
from flashserve.policy.hazards import Hazards, hazard
from flashserve.policy.plans import Facts, Plan, clamp, replicas_for_load
from flashserve.types import ModelId, Tier

WINDOW_S = 60.0
"""Forecasts come once in so many seconds, so a decision holds for so long."""
_HEED_S = 600.0
"""A chance is heeded if it would earn a place in DRAM when all of it lay within half of this."""
_LATE_S = 20.0
"""So much later than due a forecast may be before it is missed."""
_MAX_AGE = 0.5
"""A forecast may be used for this share of its longest lead, if nothing arrived since."""


class _Fixed(msgspec.Struct, frozen=True):
    """Why the keep-alive decides."""

    keep_alive_s: float

    def __str__(self) -> str:
        return f"no forecast: keep-alive {text.seconds(self.keep_alive_s)}"


class _Kept(msgspec.Struct, frozen=True):
    """Why an idle replica stays, or does not, until the next forecast."""

    keep_s: float
    age_s: float
    cold_s: float
    """Idle seconds that cost as much as a start."""

    def __str__(self) -> str:
        worth = f"worth {text.seconds(self.keep_s)} more" if self.keep_s > 0 else "not worth more"
        return (
            f"{worth} after a request {text.seconds(self.age_s)} ago, "
            f"where a start costs as much as {text.seconds(self.cold_s)} idle"
        )


class _Weighed(msgspec.Struct, frozen=True):
    """A start that may be waited for against a window that may be idle."""

    lead_s: float
    p: float
    start: float
    idle: float
    """Both as expected, in money."""

    @property
    def is_worth(self) -> bool:
        return self.start > self.idle

    def __str__(self) -> str:
        return (
            f"P(request in {text.seconds(self.lead_s)}) {self.p:.2g}: "
            f"start {self.start:.2g} {'>' if self.is_worth else '≤'} idle {self.idle:.2g}"
        )


class _Ahead(msgspec.Struct, frozen=True):
    """Why replicas are wanted before requests."""

    weighed: _Weighed
    wanted: int
    ahead: int
    now: int

    def __str__(self) -> str:
        wanted = text.count(self.wanted, "replica")
        return f"{self.weighed}; {wanted} for {self.ahead} forecast, {self.now} now"


class Predictive:
    """Warm where the expected cost of a cold start exceeds that of an idle window.

    The wanted number of replicas is the larger of what runs and waits now and of what the forecast
    says will run, at the quantile where one replica too few costs as much as one too many. Without
    a forecast that can be trusted the keep-alive decides, as it does for a model that was given one
    of its own.
    """

    name = "flashserve"
    shares_slots = True

    def __init__(self, prices: Prices, window_s: float = WINDOW_S) -> None:
        self._prices = prices
        self._window_s = window_s
        self._gaps = RecentGaps()

    def arrived(self, model_id: ModelId, now: float) -> None:
        self._gaps.arrived(model_id, now)

    def forget(self, model_id: ModelId) -> None:
        self._gaps.forget(model_id)

    def plan(self, facts: Facts, now: float) -> Plan:
        by_load = replicas_for_load(facts)
        forecast = facts.forecast
        if forecast is not None and _is_trusted(forecast, now):
            if facts.unseen_since is None:
                return self._by_chance(facts, forecast, by_load, now)
            next_due = self._next_due(forecast, facts.unseen_since)
            if now <= next_due + self._window_s:  # else one is missed that should know of it
                return self._until_next(facts, by_load, next_due, now)
        why = _Fixed(facts.keep_alive_s)
        return Plan(clamp(by_load, facts), facts.keep_alive_s, why=why)

    def _next_due(self, forecast: Hazards, unseen_since: float) -> float:
        """When the forecast that knows of the first unseen request is there at the latest.

        A model's forecast is made each window and told when it has changed, or a request came.
        """
        made_at, window_s = forecast.made_at, self._window_s
        windows = math.ceil((unseen_since - made_at) / window_s)
        return made_at + max(1, windows) * window_s + _LATE_S

    def _until_next(self, facts: Facts, by_load: int, next_due: float, now: float) -> Plan:
        """Something arrived since the forecast was made: the gaps between requests decide.

        Only until the next forecast, which has seen it. One that is late is not asked for again:
        until it is not trusted any more, nothing would change.
        """
        assert facts.forecast is not None
        assert facts.last_arrival_at is not None
        rate = facts.forecast.rate(now)
        wanted = clamp(by_load, facts)
        left_s = next_due - now if next_due > now else 0.0
        review_at = next_due if left_s else next_due + self._window_s
        if facts.has_own_keep_alive:
            return Plan(wanted, facts.keep_alive_s, review_at, rate, why="its own keep-alive")
        if facts.idle_since is None:
            return Plan(wanted, self._keep_s(facts), review_at, rate, why="it has requests")
        cold_s = self._cold(facts) / max(self._prices.gpu_per_s, 1e-12)
        age_s = now - facts.last_arrival_at
        keep_s = self._gaps.keep_s(facts.model_id, age_s, left_s, cold_s)
        return Plan(
            wanted,
            now - facts.idle_since + keep_s,
            review_at,
            rate,
            outlives_replicas=True,
            why=_Kept(keep_s, age_s, cold_s),
        )

    def _by_chance(self, facts: Facts, forecast: Hazards, by_load: int, now: float) -> Plan:
        rate = forecast.rate(now)
        lead_s = self._window_s + facts.restart_s
        p = forecast.chance(now, lead_s)
        cold = self._cold(facts)
        idle = self._prices.gpu_per_s * self._window_s
        if not facts.num_replicas:  # a start that nobody uses costs its own time as well
            idle += self._prices.gpu_per_s * facts.restart_s
        weighed = _Weighed(lead_s, p, p * cold, (1 - p) * idle)
        if not weighed.is_worth:
            keep_s = facts.keep_alive_s if facts.has_own_keep_alive else 0.0
            return Plan(
                clamp(by_load, facts),
                keep_s,
                rate_per_s=rate,
                heed_first=self._least_chance(facts, forecast, idle / (cold + idle)),
                heed_last=self._least_chance_of_room(facts, forecast, cold),
                why=weighed,
            )
        ahead = self._by_forecast(facts, forecast, cold)
        if facts.tier < Tier.DRAM and facts.restart_s > self._prices.slo_s:
            ahead = min(ahead, facts.num_replicas)  # its rate brings it to DRAM, after others
        wanted = clamp(max(by_load, ahead), facts)
        why = _Ahead(weighed, wanted, ahead, by_load)
        return Plan(wanted, self._keep_s(facts), now + self._window_s, rate, why=why)

    def _least_chance(self, facts: Facts, forecast: Hazards, least: float) -> float:
        """Within the first lead, so that `least` could be reached within a window and a start.

        Half of what a constant hazard would make of it, since a hazard may grow.
        """
        per_s = hazard(least) / (self._window_s + facts.restart_s)
        return -math.expm1(-per_s * forecast.leads_s[0] / 2)

    def _least_chance_of_room(self, facts: Facts, forecast: Hazards, cold: float) -> float:
        """Within the last lead, so that a place in DRAM could be worth its price."""
        rate = self._prices.dram_gb_per_s * facts.size_bytes / 1e9 / max(cold, 1e-12)
        return -math.expm1(-rate * min(_HEED_S, forecast.leads_s[-1]) / 2)

    def _by_forecast(self, facts: Facts, forecast: Hazards, cold: float) -> int:
        """Replicas for what will run at once (Little's law), at the quantile of the costs."""
        over = self._prices.gpu_per_s * self._window_s
        count = forecast.count(self._window_s, cold / (cold + over))
        at_once = count / self._window_s * facts.run_s
        return max(1, math.ceil(at_once / max(facts.scaling.target or facts.limit, 1)))

    def _cold(self, facts: Facts) -> float:
        return self._prices.cold_start(facts.restart_s, facts.prefill_s)

    def _keep_s(self, facts: Facts) -> float:
        """Of replicas beyond the wanted ones: as long as another start costs (ski rental)."""
        if facts.has_own_keep_alive:
            return facts.keep_alive_s
        cold = self._cold(facts)
        return min(cold / max(self._prices.gpu_per_s, 1e-12), self._window_s)


def _is_trusted(forecast: Hazards, now: float) -> bool:
    """It says what can be, and is recent enough."""
    age_s = now - forecast.made_at
    return forecast.is_sound and -_LATE_S <= age_s <= forecast.leads_s[-1] * _MAX_AGE
