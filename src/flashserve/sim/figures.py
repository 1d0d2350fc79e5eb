"""What a policy came to, in figures that a person reads and a script parses."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import numpy.typing as npt

from flashserve.policy.cost import Prices
from flashserve.sim.results import PHASES, Floats, Requests, Results, Spent
from flashserve.types import Tier

_PERCENTS = (50, 95, 99)
_HOUR = 3600.0

Bools = npt.NDArray[np.bool_]


@dataclasses.dataclass(frozen=True, slots=True)
class Answers:
    """How some requests were answered.

    Shares are of all of them; one that was rejected counts as later than any time. Times to the
    first token are seconds, None where so many were rejected that there is none; requests that the
    run's end cut off before their first token are left out.
    """

    requests: int
    rejected: int
    cold_share: float
    under_1s: float
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    ttft_p99_s: float | None


@dataclasses.dataclass(frozen=True, slots=True)
class Costs:
    """Hours of workers by what they did, and prices.

    idle_cost: of workers that were held without a request: idle, and loading. cost: of all hours
    of workers that were held, and of the bytes in DRAM and on disk.
    """

    busy_h: float
    loading_h: float
    idle_h: float
    idle_cost: float
    cost: float


@dataclasses.dataclass(frozen=True, slots=True)
class Cohort:
    models: int
    answers: Answers
    costs: Costs


@dataclasses.dataclass(frozen=True, slots=True)
class Figures:
    """One policy. cold_by_tier: requests that waited for a start, by where the model was when they
    came; cold_parts_s: what they waited for, in the mean. commands: orders to nodes, by verb.
    """

    policy: str
    answers: Answers
    costs: Costs
    cold_by_tier: dict[str, int]
    cold_parts_s: dict[str, float]
    cohorts: dict[str, Cohort]
    commands: dict[str, int]
    events: int
    wall_s: float


def figures(results: Results, prices: Prices) -> Figures:
    requests = results.requests
    of_cohort = np.array(results.cohorts)
    everyone = np.ones(len(requests.model), np.bool_)
    cohorts = {}
    for cohort in sorted(set(results.cohorts)):
        members = of_cohort == cohort
        cohorts[cohort] = Cohort(
            int(members.sum()),
            answers(requests, members[requests.model]),
            costs(results.spent, members, prices),
        )
    return Figures(
        results.policy,
        answers(requests, everyone),
        costs(results.spent, np.ones(len(results.models), np.bool_), prices),
        _cold_by_tier(requests),
        _cold_parts(requests),
        cohorts,
        dict(results.num_commands),
        results.num_events,
        results.wall_s,
    )


def first_tokens(requests: Requests, chosen: Bools) -> Floats:
    """Ascending times to the first token of the chosen requests, infinite when rejected."""
    counted = chosen & (requests.is_rejected | ~np.isnan(requests.ttft_s))
    times = np.where(requests.is_rejected, np.inf, requests.ttft_s)[counted]
    return np.sort(times.astype(np.float64))


def answers(requests: Requests, chosen: Bools) -> Answers:
    """chosen: [requests]."""
    times = first_tokens(requests, chosen)
    p50, p95, p99 = (_percentile(times, percent) for percent in _PERCENTS)
    number = int(chosen.sum())
    return Answers(
        number,
        int(requests.is_rejected[chosen].sum()),
        float(requests.is_cold[chosen].mean()) if number else 0.0,
        float(np.searchsorted(times, 1.0, "left")) / len(times) if len(times) else 1.0,
        p50,
        p95,
        p99,
    )


def costs(spent: Spent, chosen: Bools, prices: Prices) -> Costs:
    """chosen: [models]."""
    busy, loading, idle = (
        float(seconds[chosen].sum()) for seconds in (spent.busy_s, spent.loading_s, spent.idle_s)
    )
    memory = float(spent.dram_gb_s[chosen].sum()) * prices.dram_gb_per_s
    disk = float(spent.disk_gb_s[chosen].sum()) * prices.disk_gb_per_s
    return Costs(
        busy / _HOUR,
        loading / _HOUR,
        idle / _HOUR,
        (loading + idle) * prices.gpu_per_s,
        (busy + loading + idle) * prices.gpu_per_s + memory + disk,
    )


def _percentile(ordered: Floats, percent: float) -> float | None:
    """The smallest that at least so many percent do not exceed; None when that is infinite."""
    if not len(ordered):
        return None
    found = float(ordered[max(1, math.ceil(len(ordered) * percent / 100)) - 1])
    return found if math.isfinite(found) else None


def _cold_by_tier(requests: Requests) -> dict[str, int]:
    tiers = requests.tier[requests.is_cold]
    return {tier.label: int((tiers == tier).sum()) for tier in Tier}


def _cold_parts(requests: Requests) -> dict[str, float]:
    """Seconds of each phase in the mean over the cold requests; empty when none were kept."""
    cold = requests.is_cold & ~np.isnan(requests.ttft_s)
    if requests.phases is None or not cold.any():
        return {}
    means = requests.phases[cold].mean(axis=0, dtype=np.float64)
    return {name: float(mean) for name, mean in zip(PHASES, means, strict=True)}
