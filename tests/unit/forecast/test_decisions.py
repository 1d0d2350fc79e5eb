"""Replaying decisions: conservation, monotony, no look ahead, and agreement of fast and plain."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashserve.forecast import decisions
from flashserve.forecast.decisions import Outcome

Counts = npt.NDArray[np.float32]
ONE = np.ones(1)

counts_of_series = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 4), st.integers(2, 30)),
    elements=st.sampled_from([0, 1, 5]),
)


def plain_keep_alive(counts: Counts, first: int, minutes: int) -> npt.NDArray[np.bool_]:
    return np.stack(
        [
            (counts[:, max(t - minutes, 0) : t] > 0).any(axis=1)
            for t in range(first, counts.shape[1])
        ],
        axis=1,
    )


def row(*counts: float) -> Counts:
    return np.array([counts], np.float32)


def test_a_keep_alive_of_two_minutes_by_hand() -> None:
    counts = row(1, 0, 0, 0, 1, 1, 0)
    warm = decisions.keep_alive(counts, 1, 2)
    assert warm.tolist() == [[True, True, False, False, True, True]]
    outcome = decisions.replay(warm, counts[:, 1:])
    assert (outcome.active[0], outcome.cold[0], outcome.idle[0]) == (2, 1, 3)
    assert outcome.cold_share(ONE) == 0.5
    assert outcome.cost(10, ONE) == 13


def test_minutes_that_nobody_watched_are_neither_cold_nor_idle() -> None:
    counts = row(np.nan, np.nan, 1, 0)
    outcome = decisions.replay(np.array([[True, False, True, True]]), counts)
    assert (outcome.active[0], outcome.cold[0], outcome.idle[0]) == (1, 0, 1)


@given(counts_of_series, st.integers(1, 12))
def test_keep_alive_agrees_with_its_definition(counts: Counts, minutes: int) -> None:
    first = counts.shape[1] // 2
    expected = plain_keep_alive(counts, first, minutes)
    assert np.array_equal(decisions.keep_alive(counts, first, minutes), expected)


@given(counts_of_series)
def test_sweeping_keep_alives_agrees_with_replaying_each(counts: Counts) -> None:
    lengths = [1, 2, 3, 7, 20]
    swept = decisions.sweep_keep_alives(counts, 1, lengths)
    for number, minutes in enumerate(lengths):
        alone = decisions.replay(decisions.keep_alive(counts, 1, minutes), counts[:, 1:])
        assert np.array_equal(swept.cold[number], alone.cold)
        assert np.array_equal(swept.idle[number], alone.idle)


@given(counts_of_series)
def test_longer_keep_alives_are_colder_never_and_idler_always(counts: Counts) -> None:
    swept = decisions.sweep_keep_alives(counts, 0, [1, 2, 4, 8, 16])
    assert (np.diff(swept.cold, axis=0) <= 0).all()
    assert (np.diff(swept.idle, axis=0) >= 0).all()


@given(counts_of_series, st.integers(0, 2**32 - 1))
def test_every_minute_is_cold_idle_both_right_or_rightly_off(counts: Counts, seed: int) -> None:
    warm = np.random.default_rng(seed).random(counts.shape) > 0.5
    outcome = decisions.replay(warm, counts)
    served = (warm & (counts > 0)).sum(axis=1)
    off = (~warm & (counts == 0)).sum(axis=1)
    assert np.array_equal(outcome.cold + served, outcome.active)
    assert np.array_equal(
        outcome.idle + outcome.active + off, np.full(len(counts), counts.shape[1])
    )


@given(counts_of_series, st.integers(0, 2**32 - 1))
def test_sweeping_thresholds_agrees_with_replaying_each(counts: Counts, seed: int) -> None:
    score = np.round(np.random.default_rng(seed).random(counts.shape), 1)
    thresholds = np.array([0.5, 0.1, 0.9, -1.0, 2.0])
    swept = decisions.sweep_thresholds(score, counts, thresholds)
    for number, threshold in enumerate(thresholds):
        alone = decisions.replay(score > threshold, counts)
        assert np.array_equal(swept.cold[number], alone.cold)
        assert np.array_equal(swept.idle[number], alone.idle)


@given(counts_of_series, st.integers(0, 2**32 - 1), st.sampled_from([0.0, 0.05, 0.3, 1.0]))
def test_the_threshold_of_a_share_keeps_it_and_is_the_highest(
    counts: Counts, seed: int, share: float
) -> None:
    score = np.round(np.random.default_rng(seed).random(counts.shape), 1)
    weights = np.arange(1.0, len(counts) + 1)
    threshold = decisions.threshold_at(score, counts, weights, share)
    cold = decisions.replay(score > threshold, counts).cold_share(weights)
    assert cold <= share + 1e-12
    higher = score[(counts > 0) & (score > threshold)]
    if higher.size:
        beyond = decisions.replay(score > higher.min(), counts).cold_share(weights)
        assert beyond > share


def test_no_decision_looks_at_its_own_minute_or_later() -> None:
    rng = np.random.default_rng(1)
    counts = rng.poisson(0.2, (5, 60)).astype(np.float32)
    changed = counts.copy()
    changed[:, 40:] = 7
    before = decisions.keep_alive(counts, 0, 9)[:, :41]
    assert np.array_equal(before, decisions.keep_alive(changed, 0, 9)[:, :41])


def test_the_frontier_is_the_lower_convex_hull() -> None:
    shares = np.array([0.0, 0.1, 0.2, 0.3, 0.2])
    minutes = np.array([100.0, 90.0, 20.0, 10.0, 50.0])
    corners = decisions.lower_hull(shares, minutes)
    assert corners[0].tolist() == [0.0, 0.2, 0.3]
    assert corners[1].tolist() == [100.0, 20.0, 10.0]
    assert decisions.idle_at(shares, minutes, 0.1) == pytest.approx(60.0)
    assert decisions.idle_at(shares, minutes, 0.9) == 10.0
    assert decisions.idle_at(shares + 0.05, minutes, 0.01) == float("inf")


@given(hnp.arrays(np.float64, st.tuples(st.integers(1, 20), st.just(2)), elements=st.floats(0, 1)))
def test_no_policy_lies_below_the_frontier(points: npt.NDArray[np.float64]) -> None:
    for share, minutes in points:
        assert decisions.idle_at(points[:, 0], points[:, 1], share) <= minutes + 1e-9


def test_weights_count_a_series_as_often_as_it_stands_for() -> None:
    outcome = Outcome(np.array([10.0, 10.0]), np.array([[1.0, 5.0]]), np.array([[3.0, 4.0]]))
    weights = np.array([3.0, 1.0])
    assert outcome.cold_share(weights) == pytest.approx(8 / 40)
    assert outcome.idle_minutes(weights) == pytest.approx(13)


def test_a_keep_alive_of_the_cold_cost_balances_the_fixed_threshold() -> None:
    assert decisions.fixed_threshold(9) == pytest.approx(0.1)
