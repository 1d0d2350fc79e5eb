from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from tests.unit.sim import made

from flashserve.policy.cost import Prices
from flashserve.sim.figures import Figures, answers, figures

PRICES = Prices(gpu_per_s=1 / 3600, dram_gb_per_s=0.1 / 3600, disk_gb_per_s=0.01 / 3600)


@pytest.fixture
def found() -> Figures:
    return figures(made.results(), PRICES)


def test_a_rejected_request_is_later_than_any_time(found: Figures) -> None:
    assert found.answers.rejected == 1
    assert found.answers.ttft_p99_s is None
    assert found.answers.ttft_p50_s == pytest.approx(1.4)


def test_a_request_that_the_end_cut_off_has_no_time(found: Figures) -> None:
    assert found.answers.requests == 6
    assert found.answers.under_1s == pytest.approx(2 / 5)


def test_everybody_who_waits_for_a_start_is_cold_and_counted_where_the_bytes_were(
    found: Figures,
) -> None:
    assert found.answers.cold_share == pytest.approx(2 / 6)
    assert found.cold_by_tier == {"remote": 0, "disk": 1, "dram": 0, "device": 1}
    assert found.cold_parts_s["dram_s"] == pytest.approx(1.5)


def test_idle_cost_is_of_workers_without_requests_and_cost_is_of_all(found: Figures) -> None:
    assert found.costs.idle_h == pytest.approx(0.6)
    assert found.costs.idle_cost == pytest.approx(0.6 + 0.01)
    # Busy, loading and idle hours, ten GB-hours of DRAM and twenty on disk.
    assert found.costs.cost == pytest.approx(1.01 + 0.01 + 0.6 + 1.0 + 0.2)


def test_cohorts_add_up(found: Figures) -> None:
    assert set(found.cohorts) == {"bursty", "rare"}
    cohorts = found.cohorts.values()
    assert sum(of.answers.requests for of in cohorts) == found.answers.requests
    assert sum(of.costs.cost for of in cohorts) == pytest.approx(found.costs.cost)
    assert found.cohorts["rare"].answers.cold_share == 1


def test_no_requests_are_no_cold_starts() -> None:
    found = answers(made.results().requests, np.zeros(6, np.bool_))
    assert (found.requests, found.cold_share, found.under_1s) == (0, 0.0, 1.0)
    assert found.ttft_p99_s is None


def test_a_first_token_after_exactly_one_second_is_not_under_it() -> None:
    exact = made.results(ttft_s=(1.0, 0.5, 0.5, 0.5, made.NAN, made.NAN)).requests
    kept = dataclasses.replace(exact, is_rejected=np.zeros(6, np.bool_))
    assert answers(kept, np.ones(6, np.bool_)).under_1s == pytest.approx(3 / 4)
