"""What was said comes true as often as it was said, where decisions are made."""

import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashserve.forecast.calibrate import KNOTS, Curves, isotonic, log_odds

TAIL = np.array([0.005, 0.01, 0.02, 0.05, 0.1, 0.2])


def learnt(odds: np.ndarray, came: np.ndarray) -> Curves:
    curves = Curves(1)
    curves.learn(curves.cells(np.zeros(len(odds), np.int64), odds), came)
    curves.refit_all()
    return curves


def applied(curves: Curves, p: np.ndarray) -> np.ndarray:
    return curves.apply(np.zeros(len(p), np.int64), log_odds(p))


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0.1, 100)), min_size=1, max_size=40))
def test_the_isotonic_sequence_ascends_keeps_the_mean_and_is_nearest(
    pairs: list[tuple[float, float]],
) -> None:
    values, weights = np.array(pairs).T
    fitted = isotonic(values, weights)
    assert (np.diff(fitted) >= -1e-12).all()
    assert weights @ fitted == pytest.approx(weights @ values)
    far = weights @ (fitted - values) ** 2
    for other in (np.maximum.accumulate(values), np.full(len(values), np.average(values))):
        assert far <= weights @ (other - values) ** 2 + 1e-9


def test_nothing_changes_before_anything_was_learnt() -> None:
    np.testing.assert_allclose(applied(Curves(1), TAIL), TAIL, rtol=1e-9)


def test_a_little_evidence_changes_little_and_much_changes_all() -> None:
    p = np.full(20_000, 0.05)
    came = np.random.default_rng(0).random(len(p)) < 0.15
    few = applied(learnt(log_odds(p[:20]), came[:20]), p[:1])[0]
    many = applied(learnt(log_odds(p), came), p[:1])[0]
    assert few < 0.08
    assert many == pytest.approx(0.15, rel=0.15)


@pytest.mark.parametrize("skew", [-1.0, -0.5, 0.5, 1.0])
@pytest.mark.parametrize("slope", [0.7, 1.3])
def test_chances_that_decide_are_right_after_a_few_days_of_a_cohort(
    skew: float, slope: float
) -> None:
    draw = np.random.default_rng(3)
    true = 1 / (1 + np.exp(-draw.normal(-3.0, 1.5, 1_000_000)))
    said = 1 / (1 + np.exp(-(slope * np.log(true / (1 - true)) + skew)))
    came = draw.random(len(true)) < true
    curves = learnt(log_odds(said), came)
    expected = TAIL
    told = 1 / (1 + np.exp(-(slope * np.log(TAIL / (1 - TAIL)) + skew)))
    np.testing.assert_allclose(applied(curves, told), expected, rtol=0.25)


@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1))
def test_order_is_kept_and_nothing_is_made_equal(seed: int) -> None:
    draw = np.random.default_rng(seed)
    p = draw.random(500)
    curves = learnt(log_odds(p), draw.random(500) < draw.random(500))
    grid = 1 / (1 + np.exp(-np.linspace(KNOTS[0], KNOTS[-1], 1000)))
    assert (np.diff(applied(curves, grid)) > 0).all()
    assert ((applied(curves, np.array([0.0, 1.0])) > 0) & (applied(curves, grid)[-1:] < 1)).all()


def test_groups_learn_apart() -> None:
    curves = Curves(2)
    odds = np.full(10_000, log_odds(np.array(0.1)))
    curves.learn(curves.cells(np.ones(10_000, np.int64), odds), np.zeros(10_000, np.bool_))
    curves.refit_all()
    first, second = curves.apply(np.array([0, 1]), odds[:2])
    assert first == pytest.approx(0.1)
    assert second < 0.02


def test_old_evidence_fades() -> None:
    curves = Curves(1)
    curves.learn(np.array([5]), np.array([True]))
    for _ in range(3 * 1440):
        curves.fade()
    assert curves.seen[0, 5] == pytest.approx(0.5)
    assert curves.came[0, 5] == pytest.approx(0.5)


def traces() -> Path | None:
    """Where the real traces are, if they are here."""
    named = os.environ.get("FLASHSERVE_TRACES")
    beside = Path(__file__).resolve().parents[4] / "shared" / "traces"
    found = Path(named) if named else beside
    return found if (found / "azure2019_functions_1day.parquet").is_file() else None


@pytest.mark.skipif(traces() is None, reason="needs the traces that FLASHSERVE_TRACES names")
def test_chances_that_decide_are_right_on_real_functions() -> None:
    pytest.importorskip("pyarrow")
    from flashserve.forecast import backtest, scores
    from flashserve.forecast.auto import AutoModel
    from flashserve.forecast.traces import read_trace

    folder = traces()
    assert folder is not None
    trace = backtest.below(read_trace(folder / "azure2019_functions_1day.parquet"), 1.0)
    parts = backtest.split(trace, halves=True)
    model = AutoModel()  # plain candidates: nothing was trained
    model.fit(parts.past.history.before(parts.fit_until), parts.past.weights)
    said = backtest.sweep(model, parts.future, parts.report_from, (1, 5)).astype(np.float64)
    came = scores.arrivals_within(parts.future.history.counts, parts.report_from, (1, 5))
    for lead in range(2):
        # One day is too short to learn that its evening is quieter: all that is said of it is high.
        for low, high, near in ((0.005, 0.02, 0.5), (0.02, 0.06, 0.4), (0.06, 0.2, 0.3)):
            inside = (said[..., lead] > low) & (said[..., lead] < high)
            known = inside & ~np.isnan(came[..., lead])
            told, true = said[..., lead][known].mean(), came[..., lead][known].mean()
            assert true == pytest.approx(told, rel=near), (lead, low, told, true)
