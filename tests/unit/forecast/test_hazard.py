import numpy as np
import pytest
from tests.unit.forecast.workloads import LEADS, NAMES, check_model, workload

from flashserve.forecast.core import History, replay
from flashserve.forecast.hazard import Gaps, HazardModel, Pool


def after(row: list[float]) -> Gaps:
    gaps = Gaps(1)
    for count in row:
        gaps.advance(np.array([count]))
    return gaps


def test_counts_gaps_between_active_minutes_and_the_age_since() -> None:
    gaps = after([0, 2, 0, 0, 1, 1, 0, 0, 0])
    assert gaps.recent[0].tolist() == [1, 3, 0, 0]
    assert gaps.age[0] == 3
    assert gaps.num_gaps[0] == pytest.approx(1.99)
    assert gaps.ended_by(np.array([2]))[0] == pytest.approx(1)
    assert gaps.ended_by(np.array([3]))[0] == pytest.approx(1.99)


def test_a_minute_that_is_not_known_ages_but_is_no_evidence() -> None:
    gaps = after([1, 0, np.nan, np.nan])
    assert (gaps.age[0], gaps.num_known[0]) == (3, 2)


def test_shares_of_gaps_that_outlived_the_age_match_a_count_over_the_gaps() -> None:
    draw = np.random.default_rng(0)
    row = (draw.random(400) < 0.15).astype(float)
    gaps = after(row.tolist())
    (active,) = np.nonzero(row)
    own = np.diff(active)
    for minutes in range(1, 31):
        share = gaps.ended_by(np.array([minutes]))[0] / gaps.num_gaps[0]
        assert share == pytest.approx((own <= minutes).mean(), abs=0.08)
    assert gaps.age[0] == len(row) - 1 - active[-1]


def test_a_timer_is_due_in_its_minute_and_not_before() -> None:
    model = HazardModel()
    model.fit(workload())
    follower = model.follow(("timer",), 0)
    for minute in range(210):
        p = follower.forecast((1,)).p_arrival[0, 0]
        if minute > 150:
            assert p > 0.7 if minute % 7 == 3 else p < 0.1
        follower.advance([float(minute % 7 == 3)])


def test_one_arrival_does_not_make_a_series_active_every_minute() -> None:
    follower = HazardModel().follow(("new",), 0)
    said = []
    for count in (1, 0, 0, 0):
        follower.advance([count])
        said.append(follower.forecast((1,)).p_arrival[0, 0])
    assert 0.1 < said[0] < 0.4
    assert said == sorted(said, reverse=True)
    for _ in range(9):
        follower.advance([1])
    assert follower.forecast((1,)).p_arrival[0, 0] > 0.6


def test_a_series_without_gaps_follows_those_of_its_rate() -> None:
    draw = np.random.default_rng(1)
    counts = (draw.random((50, 600)) < 0.5).astype(np.float32)
    model = HazardModel()
    model.fit(History(tuple(map(str, range(50))), 0, counts))
    fresh = History(("new",), 0, np.array([[1, 0, 1, 0]], dtype=np.float32))
    assert 0.3 < model.predict(fresh, (1,)).p_arrival[0, 0] < 0.7


def test_the_pool_weighs_series_by_what_they_stand_for() -> None:
    counts = np.zeros((2, 300))
    counts[0, ::2] = 1
    rates = []
    for weights in ([1.0, 0.0], [0.0, 1.0]):
        pool, gaps = Pool(), Gaps(2)
        for column in counts.T:
            pool.count(gaps, column, np.array(weights))
            gaps.advance(column)
        rates.append(pool.events.sum() / pool.exposures.sum())
    assert rates[0] == pytest.approx(0.5, abs=0.01)
    assert rates[1] == 0


def test_following_and_predicting_agree() -> None:
    model, history = HazardModel(), workload()
    model.fit(history)
    np.testing.assert_array_equal(
        replay(model, history, LEADS).p_arrival, model.predict(history, LEADS).p_arrival
    )
    assert len(model.predict(history, LEADS).components["hazard"]) == len(NAMES)


def test_keeps_the_rules_of_a_forecast() -> None:
    model = HazardModel()
    check_model(model)
    model.fit(workload())
    check_model(model)
