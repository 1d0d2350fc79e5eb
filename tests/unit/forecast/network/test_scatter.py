import numpy as np

from flashserve.forecast.network.scatter import Scatter


def test_a_steady_series_has_a_large_shape_and_a_bursty_one_a_small() -> None:
    rng = np.random.default_rng(0)
    scatter = Scatter(3)
    expected = np.array([10_000.0, 10_000.0, 0.001])
    for _ in range(2000):
        steady, bursty = rng.normal(10_000, 200), 10_000 * rng.exponential()
        scatter.advance(np.array([steady, bursty, 0.0]), expected, np.ones(3))
    steady, bursty, rare = scatter.log_shape(expected)
    assert abs(steady - np.log(2500)) < 0.5
    assert abs(bursty) < 0.5
    assert abs(rare) < 0.1
