"""Baselines against cases computed by hand, and what holds for each of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from flashserve.forecast.arima import Arima, next_gap
from flashserve.forecast.baselines import Ewma, Fourier, Kalman, Naive, SeasonalNaive
from flashserve.forecast.core import ArrivalModel, History
from flashserve.forecast.counts import poisson_quantiles
from flashserve.forecast.decisions import Policy
from flashserve.forecast.keeping import FixedKeepAlive, HistogramSettings, HybridHistogram

MODELS: list[ArrivalModel] = [Naive(), Ewma(5), Kalman(), SeasonalNaive(20), Fourier(40), Arima()]
POLICIES: list[Policy] = [FixedKeepAlive(7), HybridHistogram(HistogramSettings(range_minutes=20))]


def history(*rows: Sequence[float], start: int = 0) -> History:
    names = tuple(f"s{number}" for number in range(len(rows)))
    return History(names, start, np.array(rows, np.float32))


def some_history(seed: int = 1) -> History:
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.3, (4, 80)).astype(np.float32)
    counts[0] = 0
    counts[1, :30] = np.nan
    return history(*counts, start=500)


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_forecasts_are_distributions_that_widen_with_the_lead(model: ArrivalModel) -> None:
    known = some_history()
    model.fit(known.before(540))
    said = model.predict(known, [1, 5, 30])
    assert said.p_arrival.shape == said.mean.shape == (4, 3)
    assert said.quantiles.shape == (4, 3, 4)
    assert ((said.p_arrival >= 0) & (said.p_arrival <= 1)).all()
    assert (np.diff(said.p_arrival, axis=1) >= 0).all()
    assert (np.diff(said.mean, axis=1) >= 0).all()
    assert (np.diff(said.quantiles, axis=2) >= 0).all()


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.name)
def test_no_history_at_all_is_a_forecast_too(model: ArrivalModel) -> None:
    said = model.predict(some_history().before(500), [1, 5])
    assert np.isfinite(said.mean).all()
    assert np.isfinite(said.p_arrival).all()


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_policies_do_not_look_ahead(policy: Policy) -> None:
    known = some_history()
    counts = known.counts.copy()
    counts[:, 60:] = np.where(np.arange(20) % 3, 0, 9)
    changed = History(known.names, known.start, counts)
    until = slice(None, 60 - 20 + 1)  # the decision about minute 60 is made before it
    assert np.array_equal(policy.warm(known, 520)[:, until], policy.warm(changed, 520)[:, until])
    assert policy.warm(known, 520).shape == (4, 60)
    assert np.array_equal(policy.warm(known, 540), policy.warm(known, 520)[:, 20:])


def test_naive_repeats_the_last_minute() -> None:
    said = Naive().predict(history([0, 5, 2], [1, 1, 0]), [1, 3])
    assert said.mean.tolist() == [[2, 6], [0, 0]]
    assert said.p_arrival[0, 0] == pytest.approx(1 - np.exp(-2))


def test_ewma_by_hand() -> None:
    """Half-life one minute: weights 1, 1/2, 1/4, and the prior's (0.01 without a fit) 1/8."""
    said = Ewma(1).predict(history([0, 4, 1]), [1, 2])
    total = 1 + 1 / 2 + 1 / 4 + 1 / 8
    chance = (1 + 1 / 2 + 0.01 / 8) / total
    assert said.mean[0, 0] == pytest.approx((1 + 4 / 2 + 0.01 / 8) / total)
    assert said.p_arrival[0] == pytest.approx([chance, 1 - (1 - chance) ** 2])


def test_ewma_begins_with_the_mean_of_the_fitted_series_and_skips_unwatched_minutes() -> None:
    model = Ewma(10)
    model.fit(history([1, 0, 0, 0], [0, 0, np.nan, np.nan]))
    assert model.predict(history([np.nan, np.nan]), [1]).p_arrival[0, 0] == pytest.approx(1 / 6)


def test_seasonal_naive_looks_one_season_back() -> None:
    said = SeasonalNaive(3).predict(history([9, 9, 1, 2, 4]), [1, 2, 3, 4])
    assert said.mean.tolist() == [[1, 3, 7, 8]]
    young = SeasonalNaive(60).predict(history([1, 3]), [1])
    assert young.mean.tolist() == [[2]]


def test_kalman_gives_the_last_count_until_it_has_five() -> None:
    assert Kalman().predict(history([0, 0, 4, 8, 2]), [1]).mean[0, 0] == 2


def test_kalman_follows_a_line() -> None:
    said = Kalman().predict(history(list(range(1, 200))), [1])
    assert said.mean[0, 0] == pytest.approx(200, abs=0.5)


def test_kalman_of_two_steps_by_hand() -> None:
    """With the first count as level and a spread of 1000: the textbook recursion, written out."""
    model = Kalman(min_points=1)
    p = np.eye(2) * 1000.0
    f = np.array([[1.0, 1.0], [0.0, 1.0]])
    x = np.array([3.0, 0.0])
    for z in (5.0, 4.0):
        x, p = f @ x, f @ p @ f.T + np.diag([1.0, 0.1])
        gain = p[:, 0] / (p[0, 0] + 10.0)
        x, p = x + gain * (z - x[0]), p - np.outer(gain, p[0])
    assert model.predict(history([3, 5, 4]), [1]).mean[0, 0] == pytest.approx((f @ x)[0])


def test_fourier_continues_a_wave() -> None:
    at = np.arange(260)
    wave = 5 + 3 * np.sin(2 * np.pi * at / 24)
    said = Fourier(window=240).predict(history(wave[:240].tolist()), [1, 12])
    assert said.mean[0] == pytest.approx([wave[240], wave[240:252].sum()], rel=0.1)


def test_arima_continues_what_repeats() -> None:
    row = [4.0, 0.0] * 60
    said = Arima().predict(history(row, [3.0] * 120), [1])
    assert said.mean[0, 0] == pytest.approx(4, abs=0.5)
    assert said.mean[1, 0] == 3


def test_the_next_gap_is_the_mean_until_there_are_four() -> None:
    assert next_gap([300, 400]) == 350
    assert next_gap([300] * 9) == 300
    assert 280 < next_gap([300, 310, 290, 305, 295, 300]) < 320


def hybrid(*rows: Sequence[float], **settings: float) -> list[list[bool]]:
    known = history(*rows)
    made = HistogramSettings(range_minutes=20, **settings)
    return HybridHistogram(made).warm(known, 0).tolist()


def test_the_histogram_warms_before_the_next_arrival_and_lets_go_between() -> None:
    row = [1, *[0] * 9] * 4  # every ten minutes
    warm = hybrid(row)[0]
    assert warm[0] is False  # nothing is known
    assert warm[1:11] == [True] * 10  # one arrival: kept for the whole range
    # Head and tail are 10: warm at ages from floor(9) to ceil(11).
    assert [minute for minute in range(21, 40) if warm[minute]] == [29, 30, 39]


def test_gaps_without_a_head_keep_the_range() -> None:
    """Gaps of every length equally often vary too little to be a histogram to go by."""
    row: list[float] = [1.0]
    for gap in range(1, 21):
        row += [0.0] * (gap - 1) + [1.0]
    warm = hybrid([*row, *[0.0] * 19])[0]
    assert all(warm[-19:])


def test_gaps_beyond_the_range_are_forecast() -> None:
    row = ([1.0] + [0.0] * 39) * 4
    known = history(row)
    settings = HistogramSettings(range_minutes=20)
    without = HybridHistogram(settings).warm(known, 120)[0]
    assert np.flatnonzero(without).tolist() == list(range(1, 21))
    seen: list[list[int]] = []

    def forecast(gaps: Sequence[int]) -> float:
        seen.append(list(gaps))
        return 30.0

    warm = HybridHistogram(settings, forecast).warm(known, 120)[0]
    assert seen == [[40], [40, 40], [40, 40, 40]]
    assert np.flatnonzero(warm).tolist() == list(range(25, 36))  # 30 minutes, and 15 % each side


def test_poisson_quantiles_reach_their_levels() -> None:
    means = np.array([0.0, 0.01, 0.7, 5.0, 59.0, 61.0, 1e9])
    quantiles = poisson_quantiles(means, [0.1, 0.5, 0.99])
    assert quantiles[0].tolist() == [0, 0, 0]
    assert quantiles[2].tolist() == [0, 1, 3]  # e^-0.7 = 0.497
    assert quantiles[3].tolist() == [2, 5, 11]
    assert np.abs(quantiles[4] - quantiles[5]).max() <= 4
    assert quantiles[6, 1] == 1e9
