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
    bound: float = 1.0,
    chosen: np.ndarray = CHOSEN,
) -> None:
    """The chances that each gave to minutes that all brought `count`, and the model's bound."""
    for _ in range(num_minutes):
        watch.learn(np.array([[plain], [model]]), np.array([bound]), np.array([count]), KNOWN)
        watch.judge(chosen, CHOSEN, PLAIN)


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


def test_counts_beyond_the_bound_are_a_sign_unless_the_chances_are_far_ahead() -> None:
    watch, ahead = DriftWatch(2, 1), DriftWatch(2, 1)
    for each in (watch, ahead):
        told(each, 60, plain=0.9, model=0.9)
        assert each.sign[0] == HOLDS
    told(watch, 60, plain=0.9, model=0.9, count=5)
    assert watch.sign[0] == COVERAGE
    told(ahead, 60, plain=0.6, model=0.95, count=5)
    assert ahead.sign[0] == HOLDS
    told(watch, 60, plain=0.9, model=0.9)
    assert watch.sign[0] == COVERAGE
    told(watch, 500, plain=0.9, model=0.9)
    assert watch.sign[0] == HOLDS


def test_the_bound_may_be_another_model_s_than_the_chances() -> None:
    watch = DriftWatch(2, 1)
    told(watch, 60, plain=0.9, model=0.1, count=5, chosen=PLAIN)
    assert watch.sign[0] == COVERAGE


def test_bounds_that_are_never_reached_are_a_sign_for_busy_series_alone() -> None:
    for bound, sign in ((1000.0, COVERAGE), (2.0, HOLDS)):
        watch = DriftWatch(2, 1)
        told(watch, 300, plain=0.9, model=0.9, bound=bound)
        assert watch.sign[0] == sign


def test_plain_forecasters_and_unknown_minutes_are_never_set_aside() -> None:
    watch = DriftWatch(2, 1)
    upper = np.zeros(1)
    for _ in range(100):
        watch.learn(np.array([[0.9], [0.01]]), upper, np.ones(1), np.array([False]))
        watch.judge(CHOSEN, CHOSEN, PLAIN)
    assert watch.sign[0] == HOLDS
    for _ in range(100):
        watch.learn(np.array([[0.01], [0.9]]), upper, np.ones(1), KNOWN)
        watch.judge(PLAIN, PLAIN, PLAIN)
    assert watch.sign[0] == HOLDS
