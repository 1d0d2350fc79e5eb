"""Every aim of the forecast benchmark has a figure, and the worst bound is reported."""

from __future__ import annotations

import numpy as np
import pytest

import forecast
from flashserve.forecast import backtest, registry, scores, synthetic
from forecast import Judge, Measured, Peers


@pytest.fixture(scope="module")
def judged() -> dict[tuple[str, str], scores.Interval]:
    parts = backtest.split(synthetic.functions(30, 420, seed=2).trace, halves=True)
    [model] = registry.make_models(["hazard"], 0)
    judge = Judge(parts, Peers(parts), backtest.run_model(model, parts), resamples=50)
    return {(cohort, figure): interval for cohort, figure, interval in judge.figures()}


def test_every_aim_has_its_figure(judged: dict[tuple[str, str], scores.Interval]) -> None:
    wanted = {key.removeprefix("azure_") for key in forecast.AIMS} - {"servegen_cost"}
    assert {("all", figure) for figure in wanted} <= set(judged)


def test_intervals_hold_their_value(judged: dict[tuple[str, str], scores.Interval]) -> None:
    for (cohort, figure), interval in judged.items():
        if cohort == "all" and np.isfinite(interval.value):
            assert interval.low <= interval.value <= interval.high, figure


def test_the_value_is_the_worst_bound_of_the_candidate() -> None:
    figures = ["idle_at_5pct_cold", "idle_at_10pct_cold"]
    figures += [f"cost_{cost}" for cost in backtest.COLD_COSTS]
    figures += [f"logloss_ratio_{lead}" for lead in backtest.LEADS]
    measured = [
        Measured(trace, model, seed, cohort, figure, scores.Interval(0.0, 0.0, high))
        for trace, by in (("azure", 0.0), ("servegen", 0.3))
        for model, seed, high in (("ours", 0, 0.2 + by), ("ours", 1, 0.4 + by), ("other", 0, 9.0))
        for cohort in ("all", "rare")
        for figure in figures
    ]
    values = forecast.values_of(measured, "ours", tick=120.0)
    assert values["azure_idle_at_5pct_cold"]["value"] == 0.4
    assert values["azure_idle_at_5pct_cold"]["met"]
    assert values["servegen_cost"]["value"] == pytest.approx(0.7)
    assert not values["tick_10k_ms"]["met"]
    keys = {"azure_cost_5", "azure_cost_60", "logloss_ratio_1", "logloss_ratio_30"}
    assert keys <= set(values)
