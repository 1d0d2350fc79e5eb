"""Savings are against the cheapest keep-alives that are as good, and bounds are the worse ones."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import policy
from flashserve.sim.profiles import H100_NODE
from policyruns import (
    _EDGES,
    Case,
    Outcome,
    Sources,
    Task,
    interval,
    pooled,
    run,
    without_dram_tier,
)

CASE = Case("tiny", 1, 2, 100)
ONES = np.ones(2)


def outcome(
    cold: float, idle_s: float, slow_s: float, cost: float = 1.0, rejected: float = 0.0
) -> Outcome:
    """Two models of 100 requests each, of which `cold` take slow_s and the others 0.1 s."""
    ttft = np.zeros((2, len(_EDGES) + 1), np.float32)
    ttft[:, np.searchsorted(_EDGES, 0.1)] = 100 - cold
    ttft[:, np.searchsorted(_EDGES, slow_s)] += cold
    under = 100.0 if slow_s < 1 else 100.0 - cold
    columns = (100.0, cold, cold, rejected, under, idle_s, 1.0, cost)
    return Outcome(*(np.full(2, value) for value in columns), ttft)


@pytest.fixture
def compared() -> policy.Compared:
    ran = {
        Task(CASE, 0, "keep-alive-60s"): outcome(20, 100.0, 0.5),
        Task(CASE, 0, "keep-alive-600s"): outcome(10, 300.0, 0.5),
        Task(CASE, 0, "serverlessllm-60s"): outcome(20, 100.0, 0.5, cost=2.0),
        Task(CASE, 0, "serverlessllm-600s"): outcome(0, 300.0, 0.5, cost=5.0),
    }
    return policy.Compared(ran, CASE, [0])


def test_a_saving_is_against_a_mixture_of_keep_alives_with_as_many_cold_starts(
    compared: policy.Compared,
) -> None:
    assert compared.saving(outcome(15, 100.0, 0.5), ONES, at_p95=False) == pytest.approx(0.5)
    assert compared.saving(outcome(20, 100.0, 0.5), ONES) == pytest.approx(0.0)


def test_who_is_colder_than_all_keep_alives_saves_nothing_by_it(compared: policy.Compared) -> None:
    assert compared.saving(outcome(40, 100.0, 0.5), ONES) == pytest.approx(0.0)


def test_who_is_warmer_than_all_is_compared_with_the_warmest(compared: policy.Compared) -> None:
    assert compared.saving(outcome(0, 150.0, 0.5), ONES, at_p95=False) == pytest.approx(0.5)


def test_serverlessllm_has_its_best_keep_alive_whatever_that_costs(
    compared: policy.Compared,
) -> None:
    ours = outcome(10, 100.0, 0.05, cost=3.0)
    assert compared.p99_ratio(ours, ONES) == pytest.approx(1.0, rel=0.05)


def test_who_gives_requests_up_is_no_measure_of_who_does_not() -> None:
    ran = {
        Task(CASE, 0, "serverlessllm-1s"): outcome(20, 100.0, 2.0),
        Task(CASE, 0, "serverlessllm-60s"): outcome(20, 100.0, 0.2, rejected=1.0),
    }
    compared = policy.Compared(ran, CASE, [0])
    assert compared.p99_ratio(outcome(20, 1.0, 0.5), ONES) == pytest.approx(4.0, rel=0.05)


def test_requests_of_the_warm_up_are_not_reported() -> None:
    case = Case("warm", 1, 2, 400)
    sources = Sources(None, None, "hazard")
    late = dataclasses.replace(case, warm_up_s=43_200.0)
    whole, half = (run(sources, Task(each, 0, "keep-alive-60s")) for each in (case, late))
    assert 0 < half.requests.sum() < whole.requests.sum()
    assert half.cost.sum() == whole.cost.sum()


def test_percentiles_are_within_two_percent_and_rejections_are_last() -> None:
    found = outcome(10, 1.0, 2.0)
    assert found.percentile(50, ONES) == pytest.approx(0.1, rel=0.02)
    assert found.percentile(95, ONES) == pytest.approx(2.0, rel=0.02)
    assert found.share_under_1s(ONES) == pytest.approx(0.9)
    found.ttft[:, -1] = 1000
    assert found.percentile(50, ONES) == pytest.approx(_EDGES[-1])


def test_values_are_the_worse_bounds_of_the_worse_case() -> None:
    good = dict.fromkeys(policy.AIMS, (0.8, 0.7, 0.9))
    bad = dict.fromkeys(policy.AIMS, (0.6, 0.2, 1.4))
    judged = {"a": policy.Judged([], good), "b": policy.Judged([], bad)}
    values = policy.values_of(judged)
    assert values["idle_saving_vs_keepalive"]["value"] == 0.2
    assert not values["idle_saving_vs_keepalive"]["met"]
    assert values["cost_over_oracle"]["value"] == 1.4


def test_seeds_are_pooled_as_models() -> None:
    both = pooled([outcome(10, 1.0, 0.5), outcome(30, 3.0, 0.5)])
    assert both.cold_share(np.ones(4)) == pytest.approx(0.2)
    value, low, high = interval(both.cold_share, 4, 100)
    assert low <= value <= high


def test_without_a_dram_tier_a_start_takes_as_long_as_from_disk() -> None:
    speeds, changed = H100_NODE.speeds, without_dram_tier(H100_NODE).speeds
    size = 14e9
    from_disk = size / speeds.disk_bytes_per_s + size / speeds.dram_bytes_per_s
    assert size / changed.dram_bytes_per_s == pytest.approx(from_disk)
