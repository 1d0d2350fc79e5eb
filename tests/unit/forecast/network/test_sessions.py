import numpy as np

from flashserve.forecast.network.scatter import Scatter
from flashserve.forecast.network.sessions import REST_MINUTES, Sessions


def told(minutes: np.ndarray) -> dict[str, float]:
    """The columns of one series after these minutes, True where something arrived."""
    sessions = Sessions(1)
    age = 0
    for active in minutes:
        age = 0 if active else age + 1
        sessions.advance(np.array([active]), np.array([age]))
    names = ("is_on", "on", "off", "on_to_usual", "off_to_usual", "activity", "u_on", "u_off")
    return {
        name: float(np.asarray(column)[0])
        for name, column in zip(names, sessions.columns(), strict=True)
    }


def runs(*lengths: int) -> np.ndarray:
    """So many minutes on, off, on ... in turn."""
    return np.concatenate([np.full(n, index % 2 == 0) for index, n in enumerate(lengths)])


def test_nothing_is_usual_before_a_session_has_ended() -> None:
    assert set(told(np.zeros(40, dtype=bool)).values()) == {0.0}
    first = told(runs(10, REST_MINUTES - 1, 1))
    assert first["is_on"] == 1
    assert first["u_on"] == first["on_to_usual"] == 0


def test_a_session_is_measured_without_the_rest_that_ended_it() -> None:
    after = told(runs(32, 60))
    assert after["is_on"] == 0
    assert after["u_on"] == 5
    assert after["off"] == np.log2(61)


def test_the_age_of_a_session_is_told_against_the_usual_one() -> None:
    second = told(runs(8, 63, 31))
    assert second["is_on"] == second["activity"] == 1
    assert second["on_to_usual"] == np.log2(32) - 3
    assert abs(second["u_off"] - np.log2(63)) < 0.05


def test_a_short_rest_is_part_of_the_session() -> None:
    half = told(np.tile(runs(1, 1), 30))
    assert half["is_on"] == 1
    assert abs(half["activity"] - 0.5) < 0.02


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
