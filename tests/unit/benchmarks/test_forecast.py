"""Every aim of the forecast benchmark has a figure, and the worst bound is reported."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import forecast
import forecast_paper as paper
from flashserve.forecast import backtest, registry, scores, synthetic
from flashserve.forecast.core import History
from flashserve.forecast.traces import Trace
from forecast_counts import Reactive, came_within
from forecast_judge import Judge, Measured, Peers
from forecast_traces import SPARSE, Folders, Traces, watched


@pytest.fixture(scope="module")
def judged() -> dict[tuple[str, str], scores.Interval]:
    parts = backtest.split(synthetic.functions(30, 420, seed=2).trace, halves=True)
    [model] = registry.make_models(["hazard"], 0)
    judge = Judge(parts, Peers(parts), backtest.run_model(model, parts), resamples=50)
    return {(cohort, figure): interval for cohort, _, figure, interval in judge.figures()}


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
        Measured(trace, model, seed, cohort, 9, figure, scores.Interval(0.0, 0.0, high))
        for trace, by in (("azure", 0.0), ("servegen", 0.3))
        for model, seed, high in (("ours", 0, 0.2 + by), ("ours", 1, 0.4 + by), ("other", 0, 9.0))
        for cohort in ("all", "rare", "llm")
        for figure in figures
    ]
    values = forecast.values_of(measured, "ours")
    assert values["azure_idle_at_5pct_cold"]["value"] == 0.4
    assert values["azure_idle_at_5pct_cold"]["met"]
    assert values["servegen_cost"]["value"] == pytest.approx(0.7)
    keys = {"azure_cost_5", "azure_cost_60", "logloss_ratio_1", "logloss_ratio_30"}
    assert keys <= set(values)
    assert values["logloss_ratio_1_rare"]["value"] == 0.4
    assert values["logloss_ratio_1_llm"]["value"] == pytest.approx(0.7)


def test_what_was_not_run_or_has_nothing_to_compare_with_has_no_number() -> None:
    only = [Measured("azure", "ours", 0, "all", 9, "cost_5", scores.Interval(1.0, 1.0, np.inf))]
    values = forecast.values_of(only, "ours")
    assert set(values) == {"azure_cost_5"}
    assert values["azure_cost_5"]["value"] is None
    assert not values["azure_cost_5"]["met"]
    assert only[0].row()["high"] is None


def test_the_costs_of_many_series_are_the_slowest_of_each() -> None:
    costs = {
        "tick_ms": [40.0, 120.0],
        "refit_s": [0.5, 0.7],
        "finetune_cpu_s": 90.0,
        "tick_peak_gb": 0.2,
        "finetune_peak_gb": 0.6,
        "prophet_s": 0.14,
    }
    values = forecast.scale_values(costs)
    assert not values["tick_10k_ms"]["met"]
    assert values["refit_10k_s"]["value"] == 0.7
    assert values["memory_10k_gb"]["value"] == 0.6
    assert values["decomposition_time_ratio"]["value"] == pytest.approx(0.0005)


def folder_with(tmp_path: Path, counts: np.ndarray) -> Path:
    """A folder with an Azure day of these counts, [functions, minutes], and nothing else."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table(
        {
            "func_id": [f"f{number}" for number in range(len(counts))],
            "sample_weight": [1] * len(counts),
            "counts": counts.astype(int).tolist(),
        }
    )
    parquet.write_table(table, tmp_path / "azure2019_functions_1day.parquet")
    return tmp_path


def test_files_that_are_missing_or_too_short_are_left_out_with_a_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    azure, servegen = SPARSE[:2]
    found = Traces(Folders(tmp_path, tmp_path), quick=False)
    assert found.sparse(azure, 0) is None
    assert found.sparse(servegen, 0) is None
    folder = folder_with(tmp_path, np.eye(20)[:, :60])
    assert Traces(Folders(folder, folder), quick=False).sparse(azure, 0) is None
    lines = capsys.readouterr().out.splitlines()
    assert "left out: azure: cannot read" in lines[0]
    assert "too few" in lines[-1]


def test_one_folder_is_fitted_and_another_reported(tmp_path: Path) -> None:
    counts = synthetic.functions(12, 300, seed=1).trace.history.counts
    (tmp_path / "fit").mkdir()
    (tmp_path / "test").mkdir()
    folders = Folders(
        folder_with(tmp_path / "fit", counts), folder_with(tmp_path / "test", counts[:, :240])
    )
    parts = Traces(folders, quick=False).sparse(SPARSE[0], 0)
    assert parts is not None
    assert (parts.fit_until, parts.tune_until, parts.report_from) == (150, 200, 160)
    assert parts.past.history.counts.shape[1] == 300


def test_a_trace_is_cut_to_the_time_in_which_most_of_it_was_watched() -> None:
    counts = np.full((4, 100), np.nan, np.float32)
    counts[0, :] = 1
    counts[1:, 40:90] = 1
    cut = watched(Trace("t", History(("a", "b", "c", "d"), 7, counts), np.ones(4)))
    assert (cut.history.start, cut.history.counts.shape) == (47, (4, 50))


def test_the_reactive_maximum_looks_back_and_never_ahead() -> None:
    rng = np.random.default_rng(0)
    counts = rng.poisson(20, (3, 400)).astype(np.float32)
    reactive = Reactive(counts, 200, 300)
    minutes = np.arange(300, 360, 5)
    said = reactive.said(counts, minutes)
    changed = counts.copy()
    changed[:, 360:] = 1000
    np.testing.assert_array_equal(said, reactive.said(changed, minutes))
    assert 20 < said[:, :, 0, 0].mean() < 40
    came = came_within(counts, np.array([0, 399]))
    assert came[0, 0, 1] == counts[0, :5].sum()
    assert np.isnan(came[0, 1, 1])


def test_the_decomposition_is_judged_on_the_same_day_as_prophet() -> None:
    pytest.importorskip("prophet")
    minutes = np.arange(5 * 1440)
    wave = 3 + 2 * np.sin(2 * np.pi * minutes / 1440)
    trace = Trace("t", History(("a",), 0, wave[None].astype(np.float32)), np.ones(1))
    ours, theirs = paper.daily_errors(trace, at_most=1)
    assert ours.shape == theirs.shape == (1,)
    assert (np.concatenate([ours, theirs]) < 0.3).all()


def test_busy_series_and_those_that_come_and_go_have_lines_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    pytest.importorskip("prophet")
    counts = np.zeros((24, 4 * 1440))
    counts[:12, ::5] = 1
    counts[12:] = 2
    folder = folder_with(tmp_path, counts)
    found = Traces(Folders(folder, folder), quick=False)
    names = {each.trace for each in paper.decompositions(found, 1, 2)}
    assert names == {"azure", "azure, busy", paper.ALL}


def test_the_drawn_series_are_fitted_on_their_own_past() -> None:
    parts = backtest.split(synthetic.clients(30, 600, seed=1).trace)
    few = paper.drawn(parts, at_most=4)
    assert len(few.future.history.names) == 4
    assert few.past.history.names == few.future.history.names
    halves = backtest.split(synthetic.clients(30, 600, seed=1).trace, halves=True)
    others = paper.drawn(halves, at_most=4)
    assert len(others.past.history.names) == 4
    assert not set(others.past.history.names) & set(others.future.history.names)
