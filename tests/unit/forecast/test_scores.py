from __future__ import annotations

import numpy as np
import pytest

from flashserve.forecast import scores


def test_log_loss_is_that_of_what_happened_and_bounded() -> None:
    losses = scores.log_loss(np.array([0.5, 0.9, 0.0, 0.3]), np.array([1.0, 0.0, 1.0, np.nan]))
    assert losses[:3] == pytest.approx([np.log(2), -np.log(0.1), -np.log(1e-4)])
    assert np.isnan(losses[3])


def test_the_true_chance_has_the_least_log_loss() -> None:
    happened = (np.arange(1000) < 300).astype(float)
    losses = [scores.log_loss(np.full(1000, p), happened).mean() for p in (0.2, 0.3, 0.4)]
    assert min(losses) == losses[1]


def test_arrivals_within_leads_by_hand() -> None:
    counts = np.array([[0, 1, 0, 0, 2, 0]], np.float32)
    within = scores.arrivals_within(counts, 1, [1, 3])
    assert within[0, :, 0].tolist() == [1, 0, 0, 1, 0]
    assert within[0, :3, 1].tolist() == [1, 1, 1]
    assert np.isnan(within[0, 3:, 1]).all()


def test_leads_into_unwatched_minutes_are_not_known() -> None:
    counts = np.array([[0, 1, np.nan, 0]], np.float32)
    within = scores.arrivals_within(counts, 0, [1, 2])
    assert within[0, [0, 1, 3], 0].tolist() == [0, 1, 0]
    assert np.isnan(within[0, 2, 0])
    assert within[0, 0, 1] == 1
    assert np.isnan(within[0, 1:, 1]).all()


def test_pinball_and_coverage() -> None:
    quantiles = np.array([[1.0, 3.0], [1.0, 3.0]])
    counts = np.array([2.0, 5.0])
    assert scores.pinball(quantiles, counts, [0.5, 0.9]).tolist() == [
        pytest.approx([0.5, 0.1]),
        pytest.approx([2.0, 1.8]),
    ]
    assert scores.coverage(quantiles, counts).tolist() == [0.0, 0.5]
    assert scores.coverage(quantiles, np.array([2.0, np.nan])).tolist() == [0.0, 1.0]


def test_calibrated_chances_lie_on_the_diagonal() -> None:
    rng = np.random.default_rng(1)
    p = rng.random((50, 1000))
    happened = (rng.random(p.shape) < p).astype(float)
    weights = np.ones(50)
    good = scores.calibration(p, happened, weights)
    assert len(good.said) == 20
    assert good.share.sum() == pytest.approx(1)
    assert good.error() < 0.02
    assert scores.calibration(p**3, happened, weights).error() > 0.2


def test_calibration_counts_heavy_series_more_and_leaves_out_the_unknown() -> None:
    p = np.full((2, 10), 0.5)
    happened = np.stack([np.ones(10), np.full(10, np.nan)])
    made = scores.calibration(p, happened, np.array([1.0, 9.0]), num_bins=1)
    assert made.came.tolist() == [1.0]
    happened[1] = 0
    heavier = scores.calibration(p, happened, np.array([1.0, 9.0]), num_bins=1)
    assert heavier.came == pytest.approx([0.1])


def test_the_interval_narrows_with_more_series_and_holds_the_value() -> None:
    widths = []
    for num_series in (20, 2000):
        values = np.random.default_rng(2).normal(5, 1, num_series)

        def mean(drawn: np.ndarray, values: np.ndarray = values) -> float:
            return float(drawn @ values / drawn.sum())

        interval = scores.bootstrap(mean, num_series, seed=3)
        assert interval.low < interval.value < interval.high
        assert interval == scores.bootstrap(mean, num_series, seed=3)
        widths.append(interval.high - interval.low)
    assert widths[1] < widths[0] / 5


def test_a_figure_that_is_missing_in_some_resamplings_is_bounded_unfavourably() -> None:
    interval = scores.bootstrap(lambda drawn: 1.0 if drawn[0] else float("nan"), 5, seed=1)
    assert (interval.value, interval.high) == (1.0, float("inf"))
