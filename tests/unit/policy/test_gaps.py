from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashserve.policy.gaps import EDGES_S, RecentGaps
from flashserve.types import ModelId

M, OTHER = ModelId("m"), ModelId("other")


def gaps(lengths: list[float]) -> RecentGaps:
    recent, now = RecentGaps(), 0.0
    recent.arrived(M, now)
    for length in lengths:
        now += length
        recent.arrived(M, now)
    return recent


def test_a_model_whose_requests_follow_each_other_is_kept_for_a_gap_of_theirs() -> None:
    kept = gaps([3.0] * 50).keep_s(M, age_s=0.0, limit_s=60.0, cold_s=100.0)
    assert 4.0 <= kept <= 60.0


def test_a_model_whose_requests_come_alone_is_let_go_at_once() -> None:
    assert gaps([3600.0] * 50).keep_s(M, age_s=1.0, limit_s=60.0, cold_s=10.0) == 0.0


def test_the_dearer_a_start_the_longer_it_is_kept() -> None:
    recent = gaps([50.0, 3600.0] * 30)
    assert recent.keep_s(M, 0.0, 60.0, cold_s=30.0) == 0.0
    assert recent.keep_s(M, 0.0, 60.0, cold_s=1000.0) == 60.0


def test_once_a_gap_is_longer_than_its_kind_nothing_is_left_to_wait_for() -> None:
    recent = gaps([3.0] * 50 + [3600.0] * 5)
    assert recent.keep_s(M, 0.0, 60.0, cold_s=60.0) > 0
    assert recent.keep_s(M, 20.0, 60.0, cold_s=10.0) == 0.0


def test_a_model_without_gaps_of_its_own_is_taken_for_one_of_all() -> None:
    recent = gaps([3.0] * 500)
    assert recent.keep_s(OTHER, 0.0, 60.0, cold_s=100.0) > 0
    recent.forget(M)
    assert recent.keep_s(M, 0.0, 60.0, cold_s=100.0) > 0


def test_gaps_fade_however_many_came_since() -> None:
    recent = gaps([3.0] * 20_000 + [3600.0] * 500)
    assert recent.keep_s(M, 0.0, 60.0, cold_s=20.0) == 0.0
    recent = gaps([3600.0] * 20_000 + [3.0] * 500)
    assert recent.keep_s(M, 0.0, 60.0, cold_s=20.0) > 0


def test_a_clock_that_steps_back_ends_no_gap() -> None:
    recent = gaps([3600.0] * 20)
    recent.arrived(M, 5.0)
    assert recent.keep_s(M, 1.0, 60.0, cold_s=10.0) == 0.0


@given(
    lengths=st.lists(st.floats(0, 1e5), max_size=30),
    age=st.floats(0, 500),
    limit=st.floats(0, 200),
    cold=st.floats(0, 1e6),
)
def test_it_is_never_kept_beyond_the_limit(
    lengths: list[float], age: float, limit: float, cold: float
) -> None:
    kept = gaps(lengths).keep_s(M, age, limit, cold)
    assert 0 <= kept <= limit + 1e-9
    assert kept == 0 or age + kept <= EDGES_S[-1] + 1e-9
    if cold == 0:
        assert kept == pytest.approx(0)
