"""Each series is spoken for by the candidate whose decisions would have cost least."""

import numpy as np
import pytest

from flashserve.forecast.cohorts import GROUPS
from flashserve.forecast.decisions import fixed_threshold
from flashserve.forecast.select import PRICES, Selector, decision_costs
from flashserve.forecast.traces import BURSTY, RARE

NAMES = ("ski-rental", "wise", "foolish")
EVERY = np.arange(1, dtype=np.intp)


def code(cohort: str, num: int = 1) -> np.ndarray:
    return np.full(num, GROUPS.index(cohort), np.int8)


def taught(
    selector: Selector, num_minutes: int, good: int, cohort: str = BURSTY, every: int = 4
) -> int:
    """Candidate `good` knows when arrivals come; returns how many came."""
    for minute in range(num_minutes):
        active = np.array([minute % every == 0])
        p = np.full((3, 1), 0.1)
        p[good] = 0.95 if active[0] else 0.001
        selector.learn(p, active, np.array([True]), code(cohort))
    return num_minutes // every


@pytest.mark.parametrize("p", [0.0, 0.01, 0.03, 0.06, 0.12, 0.5, 1.0])
def test_costs_are_those_of_warming_above_each_threshold(p: float) -> None:
    cold = np.mean([not p > fixed_threshold(price) for price in PRICES])
    idle = np.mean([(p > fixed_threshold(price)) / price for price in PRICES])
    told = decision_costs(np.array([p, p]), np.array([True, False]))
    np.testing.assert_allclose(told, [cold, idle])


def test_who_decides_best_takes_over_and_keeps_it() -> None:
    selector = Selector(NAMES, 1, first=0)
    arrivals = taught(selector, 400, good=1)
    selector.choose(EVERY, np.array([arrivals]), code(BURSTY))
    assert selector.chosen.tolist() == [1]
    assert selector.is_own.tolist() == [True]


def test_a_small_advantage_does_not_change_the_choice() -> None:
    selector = Selector(NAMES, 1, first=0)
    for minute in range(1000):
        active = np.array([minute % 4 == 0])
        p = np.array([[0.1], [0.1], [0.3]])
        p[1] = 0.101  # the same decisions, and hardly better odds
        selector.learn(p, active, np.array([True]), code(BURSTY))
    selector.choose(EVERY, np.array([2]), code(BURSTY))
    before = selector.chosen.copy()
    selector.choose(EVERY, np.array([300]), code(BURSTY))
    assert selector.chosen.tolist() == before.tolist()


def test_under_twenty_arrivals_the_cohort_decides() -> None:
    selector = Selector(NAMES, 2, first=0)
    for minute in range(400):
        active = np.array([minute % 4 == 0, minute % 40 == 0])
        p = np.full((3, 2), 0.1)
        p[1, 0] = 0.95 if active[0] else 0.001  # wise about the first of the series alone
        p[2, 1] = 0.95 if active[1] else 0.001
        selector.learn(p, active, np.array([True, True]), code(RARE, 2))
    rows = np.arange(2, dtype=np.intp)
    selector.choose(rows, np.array([100, 10]), code(RARE, 2))
    assert selector.chosen.tolist() == [1, 1]
    assert selector.is_own.tolist() == [True, False]
    for _ in range(3):
        taught_more = np.array([False, True])
        for _ in range(30):
            p = np.full((3, 2), 0.001)
            p[2, 1] = 0.95
            selector.learn(p, taught_more, np.array([False, True]), code(RARE, 2))
    selector.choose(rows, np.array([100, 100]), code(RARE, 2))
    assert selector.chosen.tolist() == [1, 2]


def test_what_is_not_known_costs_nobody() -> None:
    one, other = Selector(NAMES, 1, first=0), Selector(NAMES, 1, first=0)
    for selector in (one, other):
        taught(selector, 100, good=1)
    one.learn(np.full((3, 1), 0.9), np.array([False]), np.array([False]), code(BURSTY))
    assert one._costs.tolist() == other._costs.tolist()


def test_a_series_without_any_arrival_follows_the_first_candidate() -> None:
    selector = Selector(NAMES, 1, first=0)
    selector.choose(EVERY, np.array([0]), code("new"))
    assert selector.chosen.tolist() == [0]
