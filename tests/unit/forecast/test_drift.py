"""A model that stopped being right is set aside within hours, and comes back when it is right."""

import numpy as np

from flashserve.forecast.drift import COVERAGE, HOLDS, SCORE, DriftWatch

CHOSEN = np.array([1])
PLAIN = np.array([0])
KNOWN = np.array([True])


def told(
    watch: DriftWatch,
    num_minutes: int,
    plain: float,
    model: float,
    count: float = 1,
    bounds: tuple[float, float] = (1.0, 1.0),
) -> None:
    """The chance of an arrival that each gave to minutes that all brought `count`, and bounds."""
    uppers = np.array(bounds)[:, None]
    for _ in range(num_minutes):
        watch.learn(np.array([[plain], [model]]), uppers, np.array([count]), KNOWN)
        watch.judge(CHOSEN, PLAIN)


def test_falls_back_when_the_log_score_is_worse_and_returns_when_it_caught_up() -> None:
    watch = DriftWatch(2, 1)
    told(watch, 100, plain=0.5, model=0.9)
    assert watch.sign[0] == HOLDS
    told(watch, 60, plain=0.5, model=0.01)
    assert watch.sign[0] == SCORE
    assert watch.fallback(PLAIN).tolist() == [0]
    told(watch, 20, plain=0.5, model=0.9)
    assert watch.sign[0] == SCORE  # better again, and not yet by what it had lost
    told(watch, 400, plain=0.5, model=0.99)
    assert watch.sign[0] == HOLDS


def test_a_little_bad_luck_is_no_drift() -> None:
    watch = DriftWatch(2, 1)
    told(watch, 1, plain=0.5, model=0.02)
    assert watch.sign[0] == HOLDS


def test_a_small_lag_is_no_drift_however_long_it_lasts() -> None:
    watch = DriftWatch(2, 1)
    told(watch, 2000, plain=0.5, model=0.48)
    assert watch.sign[0] == HOLDS


def test_counts_beyond_the_bound_are_a_sign_where_the_ewma_bounds_them() -> None:
    watch, hopeless, ahead = DriftWatch(2, 1), DriftWatch(2, 1), DriftWatch(2, 1)
    for each in (watch, hopeless, ahead):
        told(each, 60, plain=0.9, model=0.9, bounds=(1, 9))
        assert each.sign[0] == HOLDS
    told(watch, 60, plain=0.9, model=0.9, count=5, bounds=(1, 9))
    assert watch.sign[0] == COVERAGE
    told(hopeless, 60, plain=0.9, model=0.9, count=5, bounds=(1, 2))
    assert hopeless.sign[0] == HOLDS
    told(ahead, 60, plain=0.6, model=0.95, count=5, bounds=(1, 9))
    assert ahead.sign[0] == HOLDS
    told(watch, 60, plain=0.9, model=0.9, bounds=(1, 9))
    assert watch.sign[0] == COVERAGE
    told(watch, 500, plain=0.9, model=0.9, bounds=(1, 9))
    assert watch.sign[0] == HOLDS


def test_bounds_that_are_never_reached_are_a_sign_for_busy_series_alone() -> None:
    for bounds, sign in (((1000.0, 30.0), COVERAGE), ((2.0, 1.0), HOLDS)):
        watch = DriftWatch(2, 1)
        for minute in range(300):
            count = np.array([40.0 if minute % 8 == 0 else 1.0])
            uppers = np.array(bounds)[:, None]
            watch.learn(np.full((2, 1), 0.9), uppers, count if bounds[0] > 9 else np.ones(1), KNOWN)
            watch.judge(CHOSEN, PLAIN)
        assert watch.sign[0] == sign


def test_plain_forecasters_and_unknown_minutes_are_never_set_aside() -> None:
    watch = DriftWatch(2, 1)
    uppers = np.zeros((2, 1))
    for _ in range(100):
        watch.learn(np.array([[0.9], [0.01]]), uppers, np.ones(1), np.array([False]))
        watch.judge(CHOSEN, PLAIN)
    assert watch.sign[0] == HOLDS
    for _ in range(100):
        watch.learn(np.array([[0.01], [0.9]]), uppers, np.ones(1), KNOWN)
        watch.judge(PLAIN, PLAIN)
    assert watch.sign[0] == HOLDS
