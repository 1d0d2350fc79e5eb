from __future__ import annotations

from flashserve.control.demand import Demand
from flashserve.types import ModelId, SeriesForecast


def said(made_at: float) -> SeriesForecast:
    return SeriesForecast(ModelId("m"), made_at, (60.0,), (0.5,), (1.0,), (2.0,))


def test_what_a_forecast_does_not_know_of_begins_with_the_first_request_after_it() -> None:
    demand = Demand()
    demand.hear(said(0.0))
    assert demand.unseen_since is None
    demand.request_came(10.0)
    demand.request_came(50.0)
    assert (demand.unseen_since, demand.last_arrival_at) == (10.0, 50.0)


def test_a_forecast_knows_what_came_before_it_was_made_and_no_more() -> None:
    demand = Demand()
    demand.request_came(10.0)
    demand.request_came(60.2)
    demand.hear(said(60.0))  # made at the end of the minute, told a moment later
    assert demand.unseen_since == 60.0
    demand.hear(said(120.0))
    assert demand.unseen_since is None


def test_without_any_forecast_all_requests_are_unseen() -> None:
    demand = Demand()
    demand.request_came(10.0)
    assert demand.forecast is None
    assert demand.unseen_since == 10.0
