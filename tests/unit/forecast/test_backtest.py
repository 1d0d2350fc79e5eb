"""Backtests fit on the past, fix thresholds before the report, and let nothing leak."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from flashserve.errors import InputError
from flashserve.forecast import backtest, decisions, registry, synthetic
from flashserve.forecast.baselines import Ewma
from flashserve.forecast.core import Floats, History, Prediction
from flashserve.forecast.counts import poisson_prediction
from flashserve.forecast.decisions import Outcome
from flashserve.forecast.keeping import FixedKeepAlive
from flashserve.forecast.traces import Trace

TRACE = synthetic.functions(40, 600, seed=3).trace


class Recorder:
    """Remembers what it was shown, and follows nobody."""

    name = "recorder"

    def __init__(self) -> None:
        self.fitted: list[History] = []
        self.asked: list[History] = []

    def fit(self, history: History, weights: Floats | None = None) -> None:
        assert weights is not None
        assert len(weights) == len(history.names)
        self.fitted.append(history)

    def predict(self, history: History, leads: Sequence[int]) -> Prediction:
        self.asked.append(history)
        return poisson_prediction(np.full((len(history.names), len(leads)), 0.1))


def test_models_see_only_the_past_of_other_series() -> None:
    parts = backtest.split(TRACE, halves=True)
    model = Recorder()
    backtest.run_model(model, parts, [1])
    assert [history.end for history in model.fitted] == [300]
    assert not set(parts.past.history.names) & set(parts.future.history.names)
    assert set(model.fitted[0].names) == set(parts.past.history.names)
    past = [history.end for history in model.asked if history.names == parts.past.history.names]
    future = [h.end for h in model.asked if h.names == parts.future.history.names]
    assert past == list(range(300, 400))
    assert future == list(range(400, 600))


def test_both_halves_have_their_share() -> None:
    parts = backtest.split(synthetic.functions(400, 100, seed=3).trace, halves=True)
    assert 160 < len(parts.past.history.names) < 240


def test_one_trace_can_be_fitted_and_another_be_reported() -> None:
    other = synthetic.functions(5, 300, seed=4).trace
    parts = backtest.split(TRACE, other)
    assert (parts.fit_until, parts.tune_until, parts.report_from) == (300, 400, 200)
    assert parts.counts.shape == (5, 100)


def test_following_gives_what_predicting_each_minute_gives() -> None:
    model = Ewma(9)
    swept = backtest.sweep(model, TRACE, 590, [1, 5])
    for number, minute in enumerate(range(590, 600)):
        alone = model.predict(TRACE.history.before(minute), [1, 5]).p_arrival
        assert swept[:, number] == pytest.approx(alone.astype(np.float32))


def test_thresholds_leave_as_many_cold_as_wanted_where_they_are_fixed() -> None:
    parts = backtest.split(TRACE)
    model = Ewma(15)
    thresholds = backtest.run_model(model, parts, [1]).thresholds
    tuned = TRACE.before(parts.tune_until)
    said = backtest.sweep(model, tuned, parts.fit_until, [1])[..., 0]
    counts = tuned.history.counts[:, parts.fit_until :]
    for wanted, threshold in thresholds.items():
        cold = decisions.replay(said > threshold, counts).cold_share(TRACE.weights)
        assert 0.9 * wanted <= cold <= wanted


def test_thresholds_do_not_depend_on_what_is_reported() -> None:
    parts = backtest.split(TRACE)
    counts = TRACE.history.counts.copy()
    counts[:, parts.report_from :] = 3
    changed = Trace("changed", History(TRACE.history.names, 0, counts), TRACE.weights)
    same = backtest.run_model(Ewma(15), backtest.split(changed), [1]).thresholds
    assert same == backtest.run_model(Ewma(15), parts, [1]).thresholds


def test_a_keep_alive_is_as_idle_as_the_keep_alives() -> None:
    parts = backtest.split(TRACE)
    ours = backtest.run_policy(FixedKeepAlive(10), parts)
    weights = parts.future.weights
    assert backtest.idle_ratio(ours, backtest.keep_alives(parts), weights) >= 1.0


def test_half_the_idle_minutes_at_one_share_is_a_ratio_of_a_half() -> None:
    active = np.array([10.0])
    theirs = Outcome(active, np.array([[0.0], [2.0]]), np.array([[100.0], [20.0]]))
    ours = Outcome(active, np.array([1.0]), np.array([30.0]))
    assert backtest.idle_ratio(ours, theirs, np.ones(1)) == pytest.approx(0.5)


def test_where_no_keep_alive_is_as_seldom_cold_there_is_no_ratio() -> None:
    active = np.array([10.0])
    theirs = Outcome(active, np.array([[1.0], [2.0]]), np.array([[100.0], [20.0]]))
    ours = Outcome(active, np.array([0.5]), np.array([5000.0]))
    assert math.isnan(backtest.idle_ratio(ours, theirs, np.ones(1)))


def test_log_losses_leave_out_what_is_not_known() -> None:
    counts = np.zeros((2, 300), np.float32)
    counts[1, 201:] = np.nan
    trace = Trace("t", History(("a", "b"), 0, counts), np.ones(2))
    parts = backtest.split(trace)
    forecasts = backtest.run_model(Recorder(), parts, [1, 30])
    losses = backtest.losses(forecasts, parts, [1, 30])
    assert losses[0] == pytest.approx([0.1, 0.1], rel=1e-5)  # -log of exp(-0.1)
    assert losses[1, 0] == pytest.approx(0.1, rel=1e-5)  # of the one minute that was watched
    assert np.isnan(losses[1, 1])


def test_busy_series_and_those_without_weight_are_no_question() -> None:
    counts = np.zeros((3, 90), np.float32)
    counts[0] = 2
    counts[0, 60:] = 0
    trace = Trace("t", History(("busy", "idle", "unseen"), 0, counts), np.array([1.0, 1.0, 0.0]))
    assert backtest.below(trace, 1.0).history.names == ("idle",)


def test_a_trace_that_is_too_short_is_refused() -> None:
    with pytest.raises(InputError, match="21 minutes, under 90"):
        backtest.split(TRACE.before(21))


def test_unknown_names_are_refused_with_those_that_are_known() -> None:
    with pytest.raises(InputError, match="no forecaster is named oracle; there are naive, "):
        registry.make_models(["naive", "oracle"], seed=1)
    assert [m.name for m in registry.make_models(["ewma-2", "ewma-60"], 1)] == ["ewma-2", "ewma-60"]


def test_series_that_end_before_the_report_are_fitted_and_not_reported() -> None:
    counts = np.zeros((2, 90), np.float32)
    counts[1, 60:] = np.nan
    parts = backtest.split(Trace("t", History(("goes-on", "ends"), 0, counts), np.ones(2)))
    assert parts.past.history.names == ("goes-on", "ends")
    assert parts.future.history.names == ("goes-on",)
