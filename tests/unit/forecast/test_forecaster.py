"""The facade keeps time, whatever the clock and the events do, and keeps series apart."""

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.forecast.workloads import workload

from flashserve.errors import InputError
from flashserve.forecast.baselines import Ewma, SeasonalNaive
from flashserve.forecast.core import FollowingModel, History
from flashserve.forecast.forecaster import MAX_TOLD_MINUTES, REFRESH_MINUTES, Forecaster
from flashserve.forecast.hazard import HazardModel
from flashserve.forecast.ski import SkiRental

START = 1_000_000
LEADS_S = (5.0, 60.0, 300.0, 1800.0)
MODELS = (Ewma(15), HazardModel(), SkiRental(), SeasonalNaive(60))


def at(minute: float) -> float:
    """The Unix time of a minute after START."""
    return (START + minute) * 60.0


def told(model: FollowingModel, history: History) -> Forecaster:
    forecaster = Forecaster(model, START)
    for name in history.names:
        forecaster.watch(name)
    for minute, column in enumerate(history.counts.T):
        for name, count in zip(history.names, column.tolist(), strict=True):
            if count != 0:
                forecaster.observe(name, at(minute + 0.5), count)
        forecaster.tick(at(minute + 1))
    return forecaster


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_says_what_the_model_says_of_the_same_minutes(model: FollowingModel) -> None:
    history = workload(130, start=START)
    said = told(model, history).predict_all((60.0, 300.0))
    expected = model.predict(history, (1, 5))
    assert said.names == history.names
    np.testing.assert_allclose(said.p_arrival, expected.p_arrival)
    np.testing.assert_allclose(said.mean, np.maximum(expected.mean, expected.p_arrival))


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_series_may_come_and_go_without_touching_others(model: FollowingModel) -> None:
    history = workload(80, start=START)
    alone = told(model, history)
    crowded = Forecaster(model, START)
    for name in history.names:
        crowded.watch(name)
    for minute, column in enumerate(history.counts.T):
        crowded.observe(f"guest-{minute % 7}-{minute // 10}", at(minute), 3)
        if minute % 3 == 0:
            crowded.forget(f"guest-{minute % 5}-{minute // 10}")
        for name, count in zip(history.names, column.tolist(), strict=True):
            if count != 0:
                crowded.observe(name, at(minute), count)
        crowded.tick(at(minute + 1))
    for name in history.names:
        assert crowded.predict(name, LEADS_S) == alone.predict(name, LEADS_S)


def test_a_forgotten_series_starts_anew() -> None:
    forecaster = Forecaster(HazardModel(), START)
    for minute in range(30):
        forecaster.observe("a", at(minute), 9)
        forecaster.tick(at(minute + 1))
    forecaster.forget("a")
    forecaster.forget("never-seen")
    assert "a" not in forecaster
    fresh = Forecaster(HazardModel(), START + 30)
    assert forecaster.predict("a", LEADS_S) == fresh.predict("a", LEADS_S)


def test_counts_of_an_open_minute_add_up_in_any_order() -> None:
    one, other = Forecaster(Ewma(5), START), Forecaster(Ewma(5), START)
    for second in (50, 3, 20):
        one.observe("a", at(0) + second, 2)
    one.observe("a", at(1), 1)
    other.observe("a", at(1), 1)
    other.observe_minute("a", START, 6)
    one.tick(at(2))
    other.tick(at(2))
    assert one.predict("a", LEADS_S) == other.predict("a", LEADS_S)


def test_a_late_count_goes_to_the_open_minute_and_a_later_one_is_dropped() -> None:
    late, prompt = Forecaster(Ewma(5), START), Forecaster(Ewma(5), START)
    for forecaster in (late, prompt):
        forecaster.watch("a")
        forecaster.tick(at(8))
    late.observe("a", at(4), 2)
    late.observe("a", at(1), 100)
    prompt.observe("a", at(8), 2)
    for forecaster in (late, prompt):
        forecaster.tick(at(9))
    assert late.predict("a", LEADS_S) == prompt.predict("a", LEADS_S)
    assert late.num_dropped == 1


def test_minutes_that_nobody_watched_are_unknown() -> None:
    forecaster = Forecaster(Ewma(15), START)
    for minute in range(60):
        forecaster.observe("a", at(minute))
        forecaster.tick(at(minute + 1))
    before = forecaster.predict("a", (60.0,)).p_arrival
    forecaster.tick(at(60 + 40))
    assert forecaster.predict("a", (60.0,)).p_arrival == pytest.approx(before)
    forecaster.tick(at(60 + 48))  # this was watched: nothing arrived
    assert forecaster.predict("a", (60.0,)).p_arrival[0] < before[0]


def test_a_jump_of_days_costs_an_hour_and_the_time_of_day_stays_right() -> None:
    forecaster = Forecaster(SeasonalNaive(60), START)
    forecaster.observe("a", at(0))
    assert forecaster.tick(at(1)) == 1
    assert forecaster.tick(at(3 * 1440)) == MAX_TOLD_MINUTES
    assert forecaster.made_at == at(3 * 1440)
    assert forecaster.tick(at(3 * 1440 + 1)) == 1


def test_a_clock_that_steps_back_a_little_waits_and_one_that_jumps_is_followed() -> None:
    forecaster = Forecaster(Ewma(15), START)
    forecaster.observe("a", at(0))
    forecaster.tick(at(100))
    assert forecaster.tick(at(97)) == 0
    assert forecaster.made_at == at(100)
    assert forecaster.tick(at(40)) == 0
    assert forecaster.made_at == at(40)
    forecaster.observe("a", at(40.5), 5)
    before = forecaster.predict("a", (60.0,))
    assert forecaster.tick(at(41)) == 1
    assert forecaster.predict("a", (60.0,)).mean > before.mean


def test_what_is_no_count_makes_one_minute_of_one_series_unknown() -> None:
    poisoned, clean = Forecaster(HazardModel(), START), Forecaster(HazardModel(), START)
    for minute in range(50):
        for forecaster in (poisoned, clean):
            forecaster.observe("a", at(minute), float(minute % 3 == 0))
        poisoned.observe("b", at(minute), (float("nan"), float("inf"), -1.0, 1e9)[minute % 4])
        for forecaster in (poisoned, clean):
            forecaster.tick(at(minute + 1))
    assert poisoned.predict("a", LEADS_S) == clean.predict("a", LEADS_S)
    assert np.isfinite(poisoned.predict("b", LEADS_S).mean).all()


def test_entries_of_minutes_not_closed_are_bounded() -> None:
    forecaster = Forecaster(Ewma(15), START)
    for number in range(200_010):
        forecaster.observe_minute("a", START + number, 1)
    assert forecaster.num_dropped == 10


def test_what_stays_is_told_again_when_something_arrived_and_in_its_turn() -> None:
    forecaster = Forecaster(Ewma(60), START)
    names = [f"s{number}" for number in range(25)]
    for name in names:
        forecaster.watch(name)
    turns = []
    for _ in range(REFRESH_MINUTES):
        forecaster.close_minute()
        turns.append(forecaster.told_again(()))
    assert set.union(*turns) == set(names)
    assert max(map(len, turns)) <= 3
    assert {"s7", "s8"} <= forecaster.told_again(["s7", "s8"])


def test_only_what_changed_is_told_again() -> None:
    forecaster = Forecaster(Ewma(60), START)
    for name in ("quiet", "busy"):
        forecaster.watch(name)
    for minute in range(200):
        forecaster.observe("busy", at(minute), 4)
        forecaster.tick(at(minute + 1))
    assert {said.series for said in forecaster.forecasts(LEADS_S)} == {"quiet", "busy"}
    assert forecaster.forecasts(LEADS_S) == []
    forecaster.observe("quiet", at(200), 1)
    forecaster.observe("busy", at(200), 4)
    forecaster.tick(at(201))
    [said] = forecaster.forecasts(LEADS_S)
    assert said.series == "quiet"
    assert said.made_at == at(201)
    assert said.source == "ewma-60: the only model"
    forecaster.forget("quiet")
    forecaster.watch("new")
    assert [said.series for said in forecaster.forecasts(LEADS_S)] == ["new"]
    assert len(forecaster.forecasts((60.0,))) == 2


@pytest.mark.parametrize("leads", [(), (0.0,), (60.0, 5.0), (5.0, 5.0), (float("nan"),), (1e9,)])
def test_leads_are_checked(leads: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="leads must"):
        Forecaster(Ewma(15), START).predict("a", leads)


@pytest.mark.parametrize("t", [float("nan"), float("inf"), 1e300])
def test_times_are_checked(t: float) -> None:
    with pytest.raises(ValueError, match="not a Unix time"):
        Forecaster(Ewma(15), START).observe("a", t)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["observe", "tick", "forget", "watch"]),
            st.sampled_from(["a", "b", "c"]),
            st.integers(-200, 400),
            st.sampled_from([0.0, 1.0, 7.0, 1e9, float("nan"), -3.0]),
        ),
        max_size=30,
    )
)
def test_any_order_of_events_leaves_forecasts_sound(
    events: list[tuple[str, str, int, float]],
) -> None:
    forecaster = Forecaster(HazardModel(), START)
    for what, series, minute, count in events:
        if what == "observe":
            forecaster.observe(series, at(minute), count)
        elif what == "tick":
            assert forecaster.tick(at(minute)) <= MAX_TOLD_MINUTES
        elif what == "forget":
            forecaster.forget(series)
        else:
            forecaster.watch(series)
    said = forecaster.predict_all(LEADS_S)
    for values in (said.p_arrival, said.mean, said.quantiles):
        assert np.isfinite(values).all()
        assert (np.diff(values, axis=1) >= 0).all()
    assert (said.mean >= said.p_arrival).all()
    assert ((said.quantiles[..., 2] > 0) == (0.9 - (1 - said.p_arrival) > 0)).all()
    if said.names:
        again = Forecaster.from_state(HazardModel(), forecaster.export_state())
        np.testing.assert_array_equal(again.predict_all(LEADS_S).p_arrival, said.p_arrival)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_goes_on_from_a_state_that_was_written_down(model: FollowingModel) -> None:
    history = workload(90, start=START)
    first = told(model, history)
    first.forget("busy")
    first.observe("timer", at(90), 2)
    file = io.BytesIO()
    np.savez(file, **first.export_state())
    file.seek(0)
    with np.load(file, allow_pickle=False) as saved:
        second = Forecaster.from_state(model, dict(saved))
    for forecaster in (first, second):
        forecaster.watch("new")
        for minute in range(90, 120):
            forecaster.observe("timer", at(minute), 1)
            forecaster.observe("other", at(minute), 1)
            forecaster.tick(at(minute + 1))
    ours, theirs = first.predict_all(LEADS_S), second.predict_all(LEADS_S)
    assert ours.names == theirs.names
    np.testing.assert_array_equal(ours.p_arrival, theirs.p_arrival)
    np.testing.assert_array_equal(ours.quantiles, theirs.quantiles)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("version", 2, "of version 2"),
        ("model", "other", "the model other"),
        ("rows", np.array([0, 0]), "damaged"),
        ("minute", "x", "damaged"),
        ("state._total", np.zeros(3), "has the shape"),
    ],
)
def test_a_state_that_does_not_fit_is_refused(key: str, value: object, message: str) -> None:
    forecaster = Forecaster(Ewma(15), START)
    forecaster.watch("a")
    with pytest.raises(InputError, match=message):
        Forecaster.from_state(Ewma(15), {**forecaster.export_state(), key: value})
    state = forecaster.export_state()
    del state["state._total"]
    with pytest.raises(InputError, match="no _total"):
        Forecaster.from_state(Ewma(15), state)


def test_a_model_fitted_anew_takes_over_what_is_known_of_each_series() -> None:
    history = workload(200, start=START)
    forecaster = told(HazardModel(), history)
    fitted = HazardModel()
    fitted.fit(history)
    forecaster.use(fitted)
    expected = fitted.predict(history, (1, 5)).p_arrival
    np.testing.assert_allclose(forecaster.predict_all((60.0, 300.0)).p_arrival, expected)
    with pytest.raises(InputError, match="has no"):
        forecaster.use(Ewma(15))
    np.testing.assert_allclose(forecaster.predict_all((60.0, 300.0)).p_arrival, expected)
