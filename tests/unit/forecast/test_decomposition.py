import logging

import numpy as np
import pytest

from flashserve.forecast.decomposition import (
    DAY_MINUTES,
    Shape,
    binned,
    decompose,
    design_matrix,
)

HOURS = np.arange(21 * 24)


def waves(draw: np.random.Generator, num_series: int = 6) -> np.ndarray:
    """A trend that bends, a day and a week, and noise: [series, hours of three weeks]."""
    day = np.sin(2 * np.pi * (HOURS[None, :] / 24 + draw.random((num_series, 1))))
    week = np.cos(2 * np.pi * HOURS[None, :] / 168)
    trend = 20 + 0.02 * HOURS + 0.05 * np.maximum(HOURS - 150, 0)
    return trend + 6 * day + 3 * week + draw.normal(0, 1, (num_series, len(HOURS)))


def test_solves_the_same_ridge_regression_as_a_dense_solver_of_each_series() -> None:
    values = waves(np.random.default_rng(0))
    shape = Shape(season_ridge=0.3, changepoint_ridges=(2.0,))
    fitted = decompose(values, 0, shape)
    minutes = HOURS * 60
    design = design_matrix(shape, 0, len(HOURS) * 60, minutes)
    ridge = np.full(design.shape[1], 0.3)
    ridge[:2], ridge[2:27] = 1e-3, 2.0
    for row, ours in zip(values, fitted.coefficients, strict=True):
        stacked = np.vstack([design, np.diag(np.sqrt(ridge))])
        target = np.concatenate([row / np.abs(row).max(), np.zeros(len(ridge))])
        dense, *_ = np.linalg.lstsq(stacked, target, rcond=None)
        np.testing.assert_allclose(ours, dense, atol=2e-4)


def test_components_add_up_to_the_forecast_and_continue_the_seasons() -> None:
    values = waves(np.random.default_rng(1))
    fitted = decompose(values[:, :408], 0)
    ahead = HOURS[408:] * 60
    parts = fitted.components(ahead)
    np.testing.assert_allclose(sum(parts.values()), fitted.values(ahead), rtol=1e-9)
    error = np.abs(fitted.values(ahead) - values[:, 408:]).mean()
    assert error < np.abs(values[:, 408:] - values[:, :408].mean(axis=1, keepdims=True)).mean() / 3
    assert np.ptp(parts["daily"][0]) > 9
    assert np.ptp(parts["holidays"]) == 0


def test_seasons_wait_for_two_of_their_periods() -> None:
    values = waves(np.random.default_rng(2))
    three_days = decompose(values[:, :72], 0).components(HOURS[:72] * 60)
    assert np.ptp(three_days["daily"]) > 0
    assert np.ptp(three_days["weekly"]) == 0
    assert np.ptp(decompose(values[:, :30], 0).components(HOURS[:30] * 60)["daily"]) == 0


def test_gaps_are_filled_with_what_the_fit_says_of_them() -> None:
    values = waves(np.random.default_rng(3))
    holes = values.copy()
    holes[:, 100:130] = np.nan
    whole, holed = decompose(values, 0), decompose(holes, 0)
    minutes = HOURS[100:130] * 60
    assert np.abs(whole.values(minutes) - holed.values(minutes)).mean() < 1.0


def test_a_holiday_has_its_own_level() -> None:
    values = np.full((1, len(HOURS)), 10.0)
    values[0, 72:96] = 2.0
    shape = Shape(holidays=(3 * DAY_MINUTES, 13 * DAY_MINUTES))
    fitted = decompose(values[:, :240], 0, shape)
    at_holiday, after = fitted.values([13 * DAY_MINUTES, 12 * DAY_MINUTES])[0]
    assert at_holiday < 5 < after


def test_empty_and_poisoned_series_leave_the_others_as_they_are() -> None:
    values = waves(np.random.default_rng(4), 3)
    alone = decompose(values[:1], 0).values(HOURS * 60)
    values[1] = np.nan
    values[2, 5], values[2, 6] = 1e9, np.nan
    together = decompose(values, 0).values(HOURS * 60)
    np.testing.assert_allclose(together[0], alone[0], rtol=1e-4)
    assert (together[1] == 0).all()
    assert np.isfinite(together).all()


def test_bins_are_means_of_the_minutes_that_are_known() -> None:
    counts = np.array([[1, 3, np.nan, 5, np.nan, np.nan, 9]], dtype=np.float32)
    np.testing.assert_array_equal(binned(counts, 2), [[2, 5, np.nan]])
    with pytest.raises(ValueError, match="at least one bin"):
        decompose(binned(counts, 60), 0)


@pytest.mark.filterwarnings("ignore")
def test_forecasts_about_as_well_as_prophet() -> None:
    prophet = pytest.importorskip("prophet")
    logging.getLogger("cmdstanpy").disabled = True
    import pandas as pd

    values = waves(np.random.default_rng(5), 3)
    stamps = pd.date_range("2024-01-01", periods=len(HOURS), freq="h")
    ours = decompose(values[:, :408], 0).values(HOURS[408:] * 60)
    theirs = []
    for row in values:
        model = prophet.Prophet(uncertainty_samples=0)
        model.fit(pd.DataFrame({"ds": stamps[:408], "y": row[:408]}))
        theirs.append(model.predict(pd.DataFrame({"ds": stamps[408:]}))["yhat"].to_numpy())
    error = np.abs(ours - values[:, 408:]).mean()
    assert error <= 1.2 * np.abs(np.array(theirs) - values[:, 408:]).mean()
