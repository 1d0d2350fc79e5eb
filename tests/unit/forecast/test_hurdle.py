import math
from statistics import NormalDist

import numpy as np
import pytest

from flashserve.forecast.hurdle import (
    at_leads,
    hurdle_prediction,
    negative_binomial_quantile,
    normal_quantile,
    p_at_leads,
)


def test_normal_quantile_agrees_with_the_standard_library() -> None:
    levels = np.array([1e-6, 0.001, 0.02, 0.0243, 0.1, 0.5, 0.77, 0.976, 0.99, 0.999999])
    expected = [NormalDist().inv_cdf(level) for level in levels]
    np.testing.assert_allclose(normal_quantile(levels), expected, rtol=1e-6, atol=1e-9)


def enumerated_quantile(level: float, mean: float, shape: float) -> int:
    total, count = 0.0, 0
    while True:
        total += math.exp(
            math.lgamma(count + shape)
            - math.lgamma(shape)
            - math.lgamma(count + 1)
            + shape * math.log(shape / (shape + mean))
            + count * math.log(mean / (shape + mean))
        )
        if total >= level:
            return count
        count += 1


@pytest.mark.parametrize("mean", [0.05, 0.7, 3.0, 40.0, 900.0])
@pytest.mark.parametrize("shape", [0.8, 3.0, 50.0])
def test_negative_binomial_quantile_is_near_the_enumerated_one(mean: float, shape: float) -> None:
    for level in (0.1, 0.5, 0.9, 0.99):
        ours = negative_binomial_quantile(np.array(level), np.array(mean), np.array(shape))
        exact = enumerated_quantile(level, mean, shape)
        assert abs(float(ours) - exact) <= max(1, 0.15 * exact)


def test_the_median_is_zero_where_an_arrival_is_less_likely_than_not() -> None:
    p = np.array([[0.4, 0.6]])
    prediction = hurdle_prediction(p, np.full((1, 2), 5.0), np.full((1, 2), 2.0))
    assert prediction.quantiles[0, 0, 1] == 0
    assert prediction.quantiles[0, 1, 1] >= 1
    np.testing.assert_allclose(prediction.mean, p * 6)


def test_quantiles_hold_the_share_of_drawn_counts_that_they_name() -> None:
    draw = np.random.default_rng(3)
    p, extra, shape, num = 0.7, 4.0, 1.5, 40_000
    drawn = (draw.random(num) < p) * (
        1 + draw.negative_binomial(shape, shape / (shape + extra), num)
    )
    prediction = hurdle_prediction(np.array([[p]]), np.array([[extra]]), np.array([[shape]]))
    for level, quantile in zip((0.1, 0.5, 0.9, 0.99), prediction.quantiles[0, 0], strict=True):
        assert (drawn <= quantile).mean() >= level - 0.02
        assert (drawn < quantile).mean() <= level + 0.02


def test_what_is_not_a_number_becomes_no_arrival() -> None:
    bad = np.array([[np.nan, np.inf, -3.0]])
    prediction = hurdle_prediction(bad, bad, bad)
    assert np.isfinite(prediction.quantiles).all()
    assert prediction.p_arrival[0, 0] == 0


def test_probabilities_between_known_leads_follow_a_constant_hazard() -> None:
    p = 1 - np.exp(-0.1 * np.array([[1.0, 5.0, 10.0]]))
    ours = p_at_leads((1, 5, 10), p, (1, 3, 7, 10, 20))
    np.testing.assert_allclose(ours, 1 - np.exp(-0.1 * np.array([[1.0, 3, 7, 10, 20]])))
    np.testing.assert_allclose(at_leads((2,), np.array([[4.0]]), (1, 2, 6)), [[2.0, 4.0, 12.0]])
