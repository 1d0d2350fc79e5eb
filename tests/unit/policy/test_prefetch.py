"""Adapters that are worth bringing near: likely ones, most worth per byte, within a budget."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from flashserve.policy.prefetch import Candidate, choose


def test_the_most_worth_per_byte_comes_first() -> None:
    large, small = Candidate("large", 100, 0.9), Candidate("small", 10, 0.5)
    slow = Candidate("slow", 100, 0.9, saved_s=20.0)
    assert choose([large, small, slow], 1000, 0.3) == ["slow", "small", "large"]


def test_what_is_unlikely_stays_away_whatever_room_there_is() -> None:
    assert choose([Candidate("a", 1, 0.29), Candidate("b", 1, 0.3)], 1000, 0.3) == ["b"]


def test_what_does_not_fit_is_passed_over_for_smaller_ones() -> None:
    sizes = [Candidate("a", 60, 1.0), Candidate("b", 50, 0.8), Candidate("c", 40, 0.5)]
    assert choose(sizes, 100, 0.3) == ["a", "c"]
    assert choose(sizes, 39, 0.3) == []


def test_equal_worth_goes_by_name() -> None:
    assert choose([Candidate(name, 10, 0.5) for name in "cab"], 25, 0.3) == ["a", "b"]


def test_an_adapter_without_bytes_and_a_chance_that_is_no_number_harm_nobody() -> None:
    assert choose([Candidate("a", 0, 0.5), Candidate("b", 1, math.nan)], 10, 0.3) == ["a"]


@given(
    st.lists(st.tuples(st.integers(0, 100), st.floats(0, 1)), max_size=20),
    st.integers(0, 300),
    st.floats(0, 1),
)
def test_the_budget_holds(sizes: list[tuple[int, float]], budget: int, least_p: float) -> None:
    candidates = [Candidate(str(i), size, p) for i, (size, p) in enumerate(sizes)]
    chosen = choose(candidates, budget, least_p)
    assert len(set(chosen)) == len(chosen)
    assert sum(candidates[int(name)].size_bytes for name in chosen) <= budget
    assert all(candidates[int(name)].p_arrival >= least_p for name in chosen)
