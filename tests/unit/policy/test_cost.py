from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashserve.config import PriceSettings
from flashserve.policy.cost import (
    EXTENT_BYTES,
    Costs,
    Prices,
    average,
    extent_bytes,
    predict_start,
    remaining,
    startup_s,
)
from flashserve.types import Phases, Tier

COSTS = Costs(
    remote_bytes_per_s=100.0,
    disk_bytes_per_s=500.0,
    dram_bytes_per_s=10_000.0,
    place_s=0.25,
    init_s=0.5,
)


@pytest.mark.parametrize(
    ("tier", "fetch_s", "dram_s"),
    [(Tier.REMOTE, 10.0, 0.0), (Tier.DISK, 0.0, 2.0), (Tier.DRAM, 0.0, 0.0)],
)
def test_a_start_pays_for_one_read_from_the_tier_that_holds_the_bytes(
    tier: Tier, fetch_s: float, dram_s: float
) -> None:
    expected = Phases(place_s=0.25, fetch_s=fetch_s, dram_s=dram_s, device_s=0.1, init_s=0.5)
    assert predict_start(1000, tier, COSTS) == expected
    assert startup_s(1000, tier, COSTS) == pytest.approx(expected.startup_s)


def test_a_start_under_way_has_its_first_phases_behind_it() -> None:
    start = Phases(place_s=1.0, fetch_s=4.0, dram_s=2.0, device_s=0.5, init_s=0.5)
    assert remaining(start, 0.0) == start
    assert remaining(start, 5.0) == Phases(place_s=1.0, dram_s=1.0, device_s=0.5, init_s=0.5)
    assert remaining(start, 100.0).startup_s == 0.0


@given(st.floats(0, 20))
def test_what_is_left_of_a_start_shrinks_by_the_time_that_passed(elapsed_s: float) -> None:
    start = Phases(place_s=1.0, fetch_s=4.0, dram_s=2.0, device_s=0.5, init_s=0.5)
    left = remaining(start, elapsed_s).startup_s
    assert left == pytest.approx(max(0.0, start.startup_s - elapsed_s))


def test_bytes_in_dram_are_whole_extents() -> None:
    assert extent_bytes(0) == 0
    assert extent_bytes(1) == EXTENT_BYTES
    assert extent_bytes(EXTENT_BYTES) == EXTENT_BYTES
    assert extent_bytes(EXTENT_BYTES + 1) == 2 * EXTENT_BYTES


@pytest.mark.parametrize("sample", [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e-9, 1e9])
@pytest.mark.parametrize("old", [None, 2.0])
def test_a_report_that_cannot_be_true_teaches_nothing(old: float | None, sample: float) -> None:
    assert average(old, sample, low=0.001, high=1000.0) == old


def test_the_first_report_is_the_average_and_later_ones_move_it() -> None:
    assert average(None, 4.0, 0.1, 100.0) == 4.0
    assert average(4.0, 8.0, 0.1, 100.0) == pytest.approx(5.2)


def test_an_outlier_counts_as_at_most_eight_times_the_average() -> None:
    assert average(1.0, 900.0, 0.001, 1000.0) == pytest.approx(1.0 + 0.3 * 7.0)
    assert average(8.0, 0.001, 0.001, 1000.0) == pytest.approx(8.0 - 0.3 * 7.0)


@given(
    st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=30),
    st.floats(1.0, 2.0),
)
def test_an_average_stays_within_its_bounds_and_recovers(junk: list[float], truth: float) -> None:
    value: float | None = None
    for sample in junk:
        value = average(value, sample, 0.01, 100.0)
        assert value is None or 0.01 <= value <= 100.0
    for _ in range(80):
        value = average(value, truth, 0.01, 100.0)
    assert value == pytest.approx(truth, rel=0.01)


def test_prices_per_hour_become_prices_per_second() -> None:
    price = PriceSettings(gpu_per_hour=7200.0, dram_gb_per_hour=36.0, disk_gb_per_hour=3.6)
    prices = Prices.of(price, None)
    assert (prices.gpu_per_s, prices.dram_gb_per_s, prices.disk_gb_per_s) == (2.0, 0.01, 0.001)
    assert prices.wait_per_s == price.wait_per_s
    assert Prices() == Prices.of(PriceSettings(), None)


def test_a_worker_costs_what_it_has_unless_somebody_says_otherwise() -> None:
    accelerator, cores = (Prices.of(PriceSettings(), cores) for cores in (None, 4.0))
    assert accelerator.gpu_per_s * 3600 == pytest.approx(3.0)
    assert cores.gpu_per_s * 3600 == pytest.approx(4 * 0.04048)
    said = [Prices.of(PriceSettings(gpu_per_hour=1.0), cores) for cores in (None, 4.0)]
    assert {one.gpu_per_s for one in said} == {1 / 3600}
    assert [one.worker_text for one in said] == ["an accelerator", "4 cores"]
    assert [Prices(worker_cores=cores).worker_text for cores in (1.0, 2 / 3)] == [
        "1 core",
        "0.667 cores",
    ]


def test_cheap_cores_are_kept_longer_than_a_dear_accelerator_for_the_same_wait() -> None:
    accelerator, cores = (Prices.of(PriceSettings(), cores) for cores in (None, 1.0))
    assert accelerator.cold_start(0.5) == cores.cold_start(0.5)
    worth_s = [prices.cold_start(0.5) / prices.gpu_per_s for prices in (accelerator, cores)]
    assert worth_s == [pytest.approx(30.0), pytest.approx(2223.0, rel=0.001)]


def test_a_cold_start_costs_its_wait_and_a_miss_once_it_is_too_late() -> None:
    prices = Prices(wait_per_s=0.01, slo_miss=5.0, slo_s=1.0)
    assert prices.cold_start(1.0) == 0.01
    assert prices.cold_start(2.0) == 5.02
