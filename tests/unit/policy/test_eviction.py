from __future__ import annotations

import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from flashserve.policy.eviction import (
    Candidate,
    choose_victims,
    evict_reason,
    least_worth,
    stop_reason,
)
from flashserve.types import ModelId


def candidate(name: str, idle_s: float, restart_s: float = 1.0, num_bytes: int = 100) -> Candidate:
    return Candidate(ModelId(name), idle_s, restart_s, num_bytes)


def test_with_equal_restart_costs_the_longest_idle_goes() -> None:
    assert least_worth([candidate("a", 5.0), candidate("b", 50.0)]) == candidate("b", 50.0)


def test_a_dear_restart_outweighs_some_idleness() -> None:
    cheap, dear = candidate("cheap", 20.0, restart_s=0.5), candidate("dear", 30.0, restart_s=9.0)
    assert least_worth([dear, cheap]) is cheap


def test_no_candidates_no_victim() -> None:
    assert least_worth([]) is None
    assert choose_victims([], 1) is None


def test_just_idle_is_not_a_division_by_zero() -> None:
    assert least_worth([candidate("a", 0.0), candidate("b", 1.0)]) == candidate("b", 1.0)


def test_the_least_worth_per_byte_are_evicted_until_it_is_enough() -> None:
    old, older, new = candidate("old", 50.0), candidate("older", 90.0), candidate("new", 1.0)
    assert choose_victims([new, old, older], 100) == (older,)
    assert choose_victims([new, old, older], 101) == (older, old)


def test_a_victim_that_a_larger_one_makes_needless_is_kept() -> None:
    small = candidate("small", 1000.0, num_bytes=10)
    large = candidate("large", 10.0, num_bytes=100)
    assert choose_victims([small, large], 100) == (large,)


def test_bytes_that_come_back_slowly_stay_although_they_are_idle_for_longer() -> None:
    """Ten times the bandwidth below makes up for a tenth of the idle time, byte for byte."""
    remote = candidate("remote", 500.0, restart_s=9.0)
    local = candidate("local", 100.0, restart_s=0.6)
    assert choose_victims([remote, local], 100) == (local,)


def test_a_large_one_that_is_cheap_per_byte_stays_where_a_small_one_is_enough() -> None:
    scrap = candidate("scrap", 1.0, restart_s=0.9, num_bytes=90)
    huge = candidate("huge", 1.0, restart_s=20.0, num_bytes=1000)
    fitting = candidate("fitting", 1.0, restart_s=3.0, num_bytes=100)
    assert choose_victims([huge, scrap, fitting], 100) == (fitting,)


def test_nothing_is_needed_nothing_goes() -> None:
    assert choose_victims([candidate("a", 1.0)], 0) == ()


ROWS = st.lists(
    st.tuples(st.floats(0, 1e6), st.floats(0.001, 100), st.integers(1, 1000)), max_size=9
)


@given(ROWS, st.integers(1, 4000))
def test_victims_are_worth_less_than_twice_the_best_choice(
    rows: list[tuple[float, float, int]], need: int
) -> None:
    candidates = [candidate(f"m{i}", *row) for i, row in enumerate(rows)]
    victims = choose_victims(candidates, need)
    enough = [
        sum(c.worth for c in chosen)
        for size in range(len(candidates) + 1)
        for chosen in itertools.combinations(candidates, size)
        if sum(c.num_bytes for c in chosen) >= need
    ]
    assert (victims is None) == (not enough)
    if victims is not None:
        assert sum(c.worth for c in victims) <= 2 * min(enough) * (1 + 1e-9)


@given(ROWS, st.integers(1, 4000), st.randoms(use_true_random=False))
def test_the_choice_does_not_depend_on_the_order_of_the_candidates(
    rows: list[tuple[float, float, int]], need: int, random: random.Random
) -> None:
    """Rows are rounded, so that many candidates are equal but for their names."""
    candidates = [
        candidate(f"m{i}", round(idle_s, -5) + 1.0, round(restart_s, -1) + 1.0, size // 100 + 1)
        for i, (idle_s, restart_s, size) in enumerate(rows)
    ]
    shuffled = random.sample(candidates, len(candidates))
    assert choose_victims(shuffled, need // 300) == choose_victims(candidates, need // 300)


@given(
    st.lists(
        st.tuples(st.floats(0, 1e6), st.floats(0.001, 100), st.integers(1, 1000)), max_size=12
    ),
    st.integers(1, 4000),
)
def test_victims_are_enough_and_none_is_needless(
    rows: list[tuple[float, float, int]], need: int
) -> None:
    candidates = [candidate(f"m{i}", *row) for i, row in enumerate(rows)]
    victims = choose_victims(candidates, need)
    if victims is None:
        assert sum(c.num_bytes for c in candidates) < need
        return
    freed = sum(c.num_bytes for c in victims)
    assert freed >= need
    assert all(freed - c.num_bytes < need for c in victims)


def test_reasons_name_the_model_and_the_numbers() -> None:
    victim = candidate("a", 40.0, 0.34, 1_200_000_000)
    assert evict_reason(victim, ModelId("llama")) == (
        "evicted for llama: idle 40 s, frees 1.2 GB, comes back from disk in 0.34 s"
    )
    assert stop_reason(victim, ModelId("llama")) == (
        "slot given to llama: idle 40 s, restart 0.34 s"
    )
