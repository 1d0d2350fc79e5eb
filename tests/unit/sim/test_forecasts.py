from __future__ import annotations

import math

import numpy as np
import pytest

from flashserve.config import PolicySettings
from flashserve.control.controller import Controller
from flashserve.errors import InputError
from flashserve.forecast import synthetic
from flashserve.forecast.core import History
from flashserve.forecast.hazard import HazardModel
from flashserve.messages.events import FORECASTS_PER_EVENT, ForecastReady
from flashserve.policy.cost import Prices
from flashserve.policy.registry import make_policy
from flashserve.sim.forecasts import (
    Fault,
    broken_forecasts,
    forecast_events,
    forecasts_apart,
)
from flashserve.sim.profiles import H100_NODE
from flashserve.sim.results import Results
from flashserve.sim.run import Cluster, simulate
from flashserve.sim.workload import Workload, WorkloadSettings, make_workload

TRACE = synthetic.functions(20, 90, seed=8).trace


@pytest.fixture(scope="module")
def workload() -> Workload:
    return make_workload(TRACE, WorkloadSettings(num_models=30, num_requests=400))


@pytest.fixture(scope="module")
def model() -> HazardModel:
    model = HazardModel()
    model.fit(TRACE.history)
    return model


def test_each_minute_is_forecast_from_what_came_before_it(
    workload: Workload, model: HazardModel
) -> None:
    events = list(forecast_events(model, workload, chunk=7))
    times = [at for at, _ in events]
    assert times == sorted(times)
    assert times[0] == 60.5
    for at, event in events:
        assert isinstance(event, ForecastReady)
        assert 0 < len(event.forecasts) <= 7
        assert {forecast.made_at for forecast in event.forecasts} == {at - 0.5}
    said = {forecast.series for _, event in events for forecast in event.forecasts}
    assert said == {spec.model_id for spec in workload.models}


def test_another_process_says_the_same(workload: Workload, model: HazardModel) -> None:
    assert list(forecasts_apart(model, workload)) == list(forecast_events(model, workload))


def test_the_other_process_ends_when_nobody_listens_any_more(
    workload: Workload, model: HazardModel
) -> None:
    events = forecasts_apart(model, workload)
    next(events)
    events.close()


def test_a_past_is_known_from_the_first_minute_on(workload: Workload, model: HazardModel) -> None:
    history = workload.minute_counts()
    past = History(history.names, -90, history.counts)
    _, first = next(iter(forecast_events(model, workload, past=past)))
    _, without = next(iter(forecast_events(model, workload)))
    assert first != without
    with pytest.raises(InputError, match="other models"):
        next(iter(forecast_events(model, workload, past=History(("x",), 0, np.zeros((1, 5))))))


def run(workload: Workload, fault: Fault | None) -> Results:
    names = [spec.model_id for spec in workload.models]
    controller = Controller(PolicySettings(), H100_NODE.rates, make_policy("flashserve", Prices()))
    lies = () if fault is None else broken_forecasts(fault, names, workload.duration_s)
    return simulate(controller, workload, Cluster(H100_NODE), forecasts=lies, after_s=60.0)


@pytest.mark.parametrize("fault", list(Fault))
def test_a_forecaster_that_lies_or_dies_costs_little(workload: Workload, fault: Fault) -> None:
    """Every request is answered, budgets hold, and nobody waits much longer."""
    honest, done = run(workload, None), run(workload, fault)
    assert not done.requests.is_rejected.any()
    assert np.isfinite(done.requests.ttft_s).all()
    assert np.mean(done.requests.ttft_s) < np.mean(honest.requests.ttft_s) + 1.0
    used = done.timeline.busy + done.timeline.loading + done.timeline.idle
    assert (used <= done.num_workers).all()


def test_a_forecaster_that_dies_says_nothing_more(workload: Workload, model: HazardModel) -> None:
    healthy = forecast_events(model, workload)
    events = list(broken_forecasts(Fault.DEAD, [], 5400.0, healthy=healthy, from_s=600.0))
    assert 540.0 < events[-1][0] < 600.0


def test_a_liar_speaks_of_every_model_in_every_minute(workload: Workload) -> None:
    names = [spec.model_id for spec in workload.models]
    events = list(broken_forecasts(Fault.NAN, names, 600.0, from_s=120.0))
    assert len(events) == 8 * math.ceil(len(names) / FORECASTS_PER_EVENT)
    assert all(isinstance(event, ForecastReady) for _, event in events)
