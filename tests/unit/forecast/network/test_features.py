import numpy as np
import pytest
from tests.unit.forecast.workloads import workload

from flashserve.errors import InputError
from flashserve.forecast.core import known_counts
from flashserve.forecast.hazard import Pool
from flashserve.forecast.network.dataset import make_dataset, targets
from flashserve.forecast.network.features import LAGS, LEADS, NAMES, OF_THE_DAY, Features
from flashserve.forecast.network.seasons import DailyDecomposition, DaySlots, HourPhase


def test_every_feature_has_a_name_and_a_finite_value_at_every_minute() -> None:
    history = workload(300)
    features = Features(len(history.names), 0, Pool())
    for column in history.counts.T:
        rows = features.rows()
        assert rows.shape == (len(history.names), len(NAMES))
        assert np.isfinite(rows).all()
        features.advance(known_counts(column))


def test_lags_and_clocks_tell_of_the_minute_to_come() -> None:
    features = Features(1, 0, Pool())
    for minute in range(120):
        features.advance(np.array([float(minute)]))
    row = dict(zip(NAMES, features.rows()[0], strict=True))
    for lag in LAGS:
        assert row[f"lag_{lag}"] == pytest.approx(np.log1p(120 - lag))
    assert row["clock_60"] == 1
    features.advance(np.array([0.0]))
    assert features.rows()[0][NAMES.index("clock_5")] == 0


def test_a_timer_is_due_as_last_time() -> None:
    features = Features(1, 0, Pool())
    for minute in range(100):
        row = dict(zip(NAMES, features.rows()[0], strict=True))
        if minute > 30:
            assert row["is_due_as_last"] == (minute % 10 == 0)
        features.advance(np.array([float(minute % 10 == 0)]))


def test_busy_counts_are_not_clamped() -> None:
    features = Features(2, 0, Pool())
    for _ in range(30):
        features.advance(np.array([2e5, 2e7]))
    offsets = features.log_offset()[:, 0]
    assert offsets[1] - offsets[0] == pytest.approx(np.log(100), abs=0.01)


def test_a_minute_of_the_hour_is_remembered() -> None:
    phase = HourPhase(1)
    for minute in range(600):
        phase.advance(minute, np.array([float(minute % 60 == 17)]))
    rate = np.array([1 / 60], dtype=np.float32)
    assert phase.expected(617, 1, rate)[0] > 0.7
    assert phase.expected(618, 1, rate)[0] < 0.05


def test_a_time_of_day_is_remembered_from_earlier_days_only() -> None:
    slots = DaySlots(1)
    rate = np.array([0.01], dtype=np.float32)
    for minute in range(3000):
        if minute == 620:
            assert slots.log_odds(620, rate)[0] == 0
        slots.advance(minute, np.array([float(600 <= minute % 1440 < 660)]))
    assert slots.log_odds(2880 + 620, rate)[0] > 3
    assert slots.log_odds(2880 + 720, rate)[0] < 0


def test_the_decomposition_of_a_day_is_fitted_on_earlier_days() -> None:
    parts = DailyDecomposition(1, 0)
    for minute in range(4 * 1440):
        level = 3 + 2 * np.sin(2 * np.pi * minute / 1440)
        if minute < 2 * 1440:
            assert (parts.at(minute) == 0).all()
        elif minute % 60 == 30:
            assert parts.at(minute).sum() == pytest.approx(level, abs=0.5)
        # Poison in the day to come cannot be part of its own forecast.
        parts.advance(minute, np.array([level if minute < 3 * 1440 else 1e9]))


def test_targets_agree_with_a_look_at_the_minutes_to_come() -> None:
    draw = np.random.default_rng(0)
    counts = (draw.random((4, 150)) < 0.1) * draw.integers(1, 9, (4, 150)).astype(float)
    counts[2, 70] = np.nan
    at_risk, arrived, more = targets(counts, 140)
    for series in range(4):
        for minute in range(140):
            before = 0
            for index, lead in enumerate(LEADS):
                window = counts[series, minute : minute + lead]
                is_known = len(window) == lead and not np.isnan(window).any()
                is_first = is_known and window[:before].sum() == 0
                assert at_risk[series, minute, index] == is_first
                assert arrived[series, minute, index] == (is_first and window.sum() > 0)
                if is_known and window.sum() > 0:
                    assert more[series, minute, index] == window.sum() - 1
                else:
                    assert np.isnan(more[series, minute, index])
                before = lead


def test_features_of_the_day_are_off_for_who_was_trained_on_one_day() -> None:
    counts = known_counts(workload(200).counts)
    draw = np.random.default_rng(0)
    data = make_dataset(counts, 0, np.ones(len(counts)), 100_000, draw)
    assert (data.scale[list(OF_THE_DAY)] == 0).all()
    assert (data.scale[: len(LAGS)] > 0).all()
    assert np.abs(data.rows.astype(np.float32)).max() <= 8.01


def test_without_a_known_minute_there_is_nothing_to_learn() -> None:
    for counts in (np.full((3, 20), np.nan), np.empty((3, 0))):
        with pytest.raises(InputError, match="nothing to learn from"):
            make_dataset(counts, 0, np.ones(3), 100, np.random.default_rng(0))


def test_rare_series_that_stand_for_many_do_not_drown_the_rest() -> None:
    counts = known_counts(workload(60).counts[:2])
    draw = np.random.default_rng(0)
    data = make_dataset(counts, 0, np.array([10_000.0, 1.0]), 100_000, draw)
    assert data.weights[0] / data.weights[1] == pytest.approx(100)


def test_no_more_cells_than_allowed_and_the_newest_are_kept() -> None:
    counts = known_counts(np.tile(workload(200).counts, (10, 1)))
    data = make_dataset(counts, 0, np.ones(len(counts)), 3200, np.random.default_rng(0))
    assert data.num_series * data.num_minutes <= 3200
    assert (data.num_series, data.num_minutes) == (32, 100)
    assert data.counts.shape == (32, 100)
