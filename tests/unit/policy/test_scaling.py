from __future__ import annotations

import dataclasses
import math

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.policy.facts import LEADS, facts, forecast

from flashserve.policy.cost import Prices
from flashserve.policy.hazards import Hazards, at_lead
from flashserve.policy.scaling import Predictive
from flashserve.types import ModelId, Scaling, SeriesForecast

# A second of waiting costs as much as a minute of idling: a start of a second balances one window.
PRICES = Prices(gpu_per_s=1 / 60, wait_per_s=1.0, slo_miss=0.0)


def policy() -> Predictive:
    return Predictive(PRICES)


def test_a_model_is_warm_when_a_cold_start_is_expected_to_cost_more_than_idling() -> None:
    likely = policy().plan(facts(forecast=forecast(0.6)), now=0.0)
    assert likely.replicas == 1
    assert likely.review_at == 60.0
    assert "P(request in 61 s) 0.61: start 0.61 > idle 0.4" in likely.reason
    unlikely = policy().plan(facts(forecast=forecast(0.4)), now=0.0)
    assert unlikely.replicas == 0
    assert unlikely.keep_idle_s == 0.0
    assert "≤ idle" in unlikely.reason


def test_a_start_ahead_must_also_pay_for_its_own_loading() -> None:
    slow = facts(restart_s=30.0, forecast=forecast(0.024))
    prices = Prices(gpu_per_s=1 / 60, wait_per_s=1.0, slo_miss=0.0)
    assert Predictive(prices).plan(msgspec.structs.replace(slow, num_replicas=1), 0.0).replicas == 1
    assert Predictive(prices).plan(slow, 0.0).replicas == 0


def test_the_nearer_the_bytes_the_sooner_a_model_may_sleep() -> None:
    said = forecast(0.1)
    near = policy().plan(facts(num_replicas=1, restart_s=0.3, forecast=said), 0.0)
    far = policy().plan(facts(num_replicas=1, restart_s=20.0, forecast=said), 0.0)
    assert (near.replicas, far.replicas) == (0, 1)


def test_a_start_that_misses_the_slo_is_dearer() -> None:
    prices = Prices(gpu_per_s=1 / 60, wait_per_s=0.01, slo_miss=10.0, slo_s=1.0)
    said = forecast(0.2)
    assert Predictive(prices).plan(facts(restart_s=0.5, forecast=said), 0.0).replicas == 0
    assert Predictive(prices).plan(facts(restart_s=1.5, forecast=said), 0.0).replicas == 1


def test_without_a_forecast_the_keep_alive_decides() -> None:
    plan = policy().plan(facts(num_replicas=1), now=0.0)
    assert (plan.replicas, plan.keep_idle_s) == (0, 300.0)
    assert plan.reason == "no forecast: keep-alive 300 s"


@pytest.mark.parametrize(
    "said",
    [
        forecast(0.9, made_at=-2000.0),  # over half of its longest lead ago
        forecast(0.9, made_at=500.0),  # from the future: the clock was set back
        dataclasses.replace(forecast(0.9), p_arrival=(math.nan,) * len(LEADS)),
        dataclasses.replace(forecast(0.9), p_arrival=(1.5,) * len(LEADS)),
        dataclasses.replace(forecast(0.9), upper=(math.inf,) * len(LEADS)),
        dataclasses.replace(forecast(0.9), leads_s=LEADS[::-1]),
        dataclasses.replace(forecast(0.9), mean=()),
    ],
)
def test_a_forecast_that_is_old_or_no_distribution_counts_as_none(said: SeriesForecast) -> None:
    assert policy().plan(facts(forecast=said), 0.0).reason.startswith("no forecast")


def test_after_new_requests_the_gaps_between_them_decide_until_the_next_forecast() -> None:
    chatty, lonely = policy(), policy()
    for number in range(20):
        chatty.arrived(ModelId("m"), 3.0 * number - 30.0)
        lonely.arrived(ModelId("m"), 500.0 * number - 9470.0)
    known = facts(
        num_replicas=1,
        idle_since=32.0,
        last_arrival_at=30.0,
        unseen_since=30.0,
        forecast=forecast(0.001),
    )
    kept, stopped = (each.plan(known, now=32.0) for each in (chatty, lonely))
    assert kept.keep_idle_s > 1.0
    assert kept.review_at == 80.0  # the next one is due at 60 s, and 20 s late at the latest
    assert stopped.keep_idle_s == 0.0
    assert "a start costs as much as 60 s idle" in stopped.reason
    without = msgspec.structs.replace(known, num_replicas=0, idle_since=None)
    again = lonely.plan(without, now=32.0)
    assert stopped.outlives_replicas
    decided = ("replicas", "review_at", "rate_per_s", "heed_first", "heed_last")
    assert [getattr(again, name) for name in decided] == [
        getattr(stopped, name) for name in decided
    ]


def test_while_a_forecast_is_late_nobody_asks_again_before_it_is_trusted_no_more() -> None:
    known = facts(
        num_replicas=1, last_arrival_at=30.0, unseen_since=30.0, forecast=forecast(0.0001)
    )
    assert policy().plan(known, now=79.0).review_at == 80.0
    assert policy().plan(known, now=80.0).review_at == 140.0


def test_a_forecast_that_stayed_as_it_was_is_late_only_once_it_has_missed_a_request() -> None:
    known = facts(
        num_replicas=1,
        idle_since=1505.0,
        last_arrival_at=1501.0,
        unseen_since=1501.0,
        forecast=forecast(0.0001),
    )
    plan = policy().plan(known, now=1505.0)
    assert "after a request 4.0 s ago" in plan.reason
    assert plan.review_at == 1580.0
    assert policy().plan(known, now=1641.0).reason == "no forecast: keep-alive 300 s"


def test_when_forecasts_stop_coming_the_keep_alive_takes_over() -> None:
    known = facts(
        num_replicas=1, last_arrival_at=30.0, unseen_since=30.0, forecast=forecast(0.0001)
    )
    assert policy().plan(known, now=150.0).reason == "no forecast: keep-alive 300 s"


def test_a_model_s_own_keep_alive_is_kept_and_starts_ahead_come_on_top() -> None:
    own = facts(num_replicas=1, keep_alive_s=900.0, has_own_keep_alive=True)
    unlikely = policy().plan(msgspec.structs.replace(own, forecast=Hazards(forecast(0.001))), 0.0)
    assert (unlikely.replicas, unlikely.keep_idle_s) == (0, 900.0)
    likely = policy().plan(
        msgspec.structs.replace(own, num_replicas=0, forecast=Hazards(forecast(0.9))), 0.0
    )
    assert likely.replicas == 1


def test_replicas_are_the_larger_of_what_runs_and_what_is_forecast() -> None:
    quiet = facts(num_replicas=1, forecast=forecast(0.99, mean=300.0))  # 20 at once, 8 in each
    assert policy().plan(quiet, 0.0).replicas == 3
    busy = msgspec.structs.replace(quiet, in_flight=20, waiting=9)
    assert policy().plan(busy, 0.0).replicas == 4
    aimed = msgspec.structs.replace(quiet, scaling=Scaling(0, 9, target=4))
    assert policy().plan(aimed, 0.0).replicas == 5


def test_a_forecast_that_lies_is_bounded_by_the_model_s_bounds() -> None:
    lie = forecast(1.0, mean=1e9, upper=1e9)
    assert policy().plan(facts(forecast=lie), 0.0).replicas == 4
    nothing = forecast(0.0)
    plan = policy().plan(facts(forecast=nothing, waiting=3, scaling=Scaling(2, 4)), 0.0)
    assert plan.replicas == 2


def test_the_quantile_lies_where_one_too_few_costs_as_much_as_one_too_many() -> None:
    said = Hazards(forecast(0.9, mean=100.0, upper=150.0))
    assert said.count(60.0, 0.5) == pytest.approx(100.0)
    assert said.count(60.0, 0.9) == pytest.approx(150.0)
    assert said.count(60.0, 0.01) < 100.0
    assert said.count(60.0, 0.0) >= 0.0


def test_chances_are_read_between_the_leads_and_given_that_nothing_came_so_far() -> None:
    said = Hazards(forecast(0.1))
    assert said.chance(0.0, 60.0) == pytest.approx(0.1)
    assert said.chance(0.0, 90.0) == pytest.approx(1 - 0.9**1.5)
    assert said.chance(600.0, 60.0) == pytest.approx(0.1)
    assert said.rate(0.0) == pytest.approx(-math.log(0.9) / 60)


def test_what_was_certain_to_come_is_still_expected_when_it_is_late() -> None:
    for chances in ((1.0,) * 6, (0.9, 1.0, 1.0, 1.0, 1.0, 1.0), (0.9, 0.99, *(1.0,) * 4)):
        counts = (0.0,) * 6
        said = Hazards(SeriesForecast(ModelId("m"), 0.0, LEADS, chances, counts, counts))
        assert said.chance(0.0, 60.0) == pytest.approx(chances[0])
        assert said.chance(60.5, 60.0) > 0.5
        assert said.chance(300.0, 60.0) > 0.9
        assert said.rate(60.5) > 0.0


def test_bytes_are_ranked_by_what_comes_soon_and_by_the_rest_among_equals() -> None:
    def said(*chances: float) -> float:
        series = ModelId("m")
        counts = (0.0,) * 6
        return Hazards(SeriesForecast(series, 0.0, LEADS, chances, counts, counts)).rate(0.0)

    soon = said(0.5, 0.9, 0.9, 0.9, 0.9, 0.9)
    later = said(0.0, 0.0, 0.5, 0.99, 0.999, 0.999)
    never = said(0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
    assert soon > 5 * later
    assert later > never == 0.0


@given(
    p=st.lists(st.floats(0, 1), min_size=6, max_size=6).map(sorted),
    age=st.floats(0, 4000),
    lead=st.floats(0.1, 4000),
)
def test_a_chance_is_one_whatever_was_forecast(p: list[float], age: float, lead: float) -> None:
    said = Hazards(SeriesForecast(ModelId("m"), 0.0, LEADS, tuple(p), (0.0,) * 6, (0.0,) * 6))
    assert said.is_sound
    assert 0 <= said.chance(age, lead) <= 1
    assert not f"{said.chance(age, lead)}".startswith("-")
    assert 0 <= said.chance(age, lead) <= said.chance(age, lead * 2) + 1e-12
    assert said.rate(age) >= 0


def test_values_are_read_from_zero_at_lead_zero_and_beyond_the_last_at_its_slope() -> None:
    assert at_lead((10.0, 20.0), (1.0, 3.0), 5.0) == 0.5
    assert at_lead((10.0, 20.0), (1.0, 3.0), 15.0) == 2.0
    assert at_lead((10.0, 20.0), (1.0, 3.0), 30.0) == 5.0
