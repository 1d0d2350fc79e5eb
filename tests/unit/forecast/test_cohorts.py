"""A series is given the cohort that judging its whole past would give it."""

from collections.abc import Container

import numpy as np

from flashserve.forecast import synthetic
from flashserve.forecast.cohorts import GROUPS, NEW, YOUNG, CohortWatch
from flashserve.forecast.traces import BURSTY, RARE, TIMER, cohort_of


def watched(counts: np.ndarray) -> list[str]:
    watch = CohortWatch(len(counts))
    for minute, column in enumerate(counts.T):
        watch.advance(minute, column)
    return [GROUPS[code] for code in watch.code]


def test_agrees_with_the_judgement_of_whole_series() -> None:
    counts = synthetic.functions(200, 2880, seed=5).trace.history.counts
    ours = watched(counts)
    theirs = [cohort_of(row) if (row > 0).any() else NEW for row in counts]
    agree = [one == other for one, other in zip(ours, theirs, strict=True)]
    assert np.mean(agree) > 0.9
    for cohort in (RARE, TIMER, BURSTY):
        assert cohort in ours


def told(active: Container[int], num_minutes: int) -> list[str]:
    """The cohort of one series before each minute."""
    watch = CohortWatch(1)
    codes = []
    for minute in range(num_minutes):
        codes.append(GROUPS[watch.code[0]])
        watch.advance(minute, np.array([float(minute in active)]))
    return codes


def test_a_series_is_new_until_its_first_arrival_and_young_until_its_twentieth() -> None:
    codes = told(range(10, 100, 3), 100)
    assert set(codes[:11]) == {NEW}
    assert set(codes[11:67]) == {YOUNG}
    assert codes[90] == TIMER


def test_at_a_pace_of_under_twenty_a_day_it_is_rare_and_no_longer_young() -> None:
    codes = told({30}, 100)
    assert codes[31] == codes[70] == YOUNG
    assert codes[99] == RARE


def test_every_minute_alike_is_a_timer_and_every_minute_different_is_not() -> None:
    draw = np.random.default_rng(0)
    steady, mixed = np.full(200, 3.0), draw.integers(1, 9, 200).astype(float)
    assert watched(np.stack([steady, mixed])) == [TIMER, BURSTY]


def test_what_is_not_known_is_no_evidence() -> None:
    counts = np.full((1, 300), np.nan)
    assert watched(counts) == [NEW]
