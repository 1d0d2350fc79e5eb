"""Candidates side by side: the chosen one speaks, calibrated, and a foolish one harms nobody."""

import subprocess
import sys
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pytest
from tests.unit.forecast.workloads import LEADS, NAMES, check_prediction, workload

from flashserve.errors import InputError
from flashserve.forecast import backtest, decisions, synthetic
from flashserve.forecast.auto import AutoModel, default_candidates
from flashserve.forecast.baselines import Ewma
from flashserve.forecast.core import Floats, History, Prediction
from flashserve.forecast.counts import poisson_prediction
from flashserve.forecast.forecaster import Forecaster
from flashserve.forecast.hazard import HazardModel
from flashserve.forecast.hurdle import hurdle_prediction
from flashserve.forecast.outlook import GRID
from flashserve.forecast.ski import SkiRental


class Oracle:
    """Knows that arrivals come every fifth minute; from `wrong_from` on it says the opposite."""

    name = "oracle"

    def __init__(self, wrong_from: int = 1 << 30) -> None:
        self.wrong_from = wrong_from

    def fit(self, history: History, weights: Floats | None = None) -> None:
        pass

    def follow(self, names: Sequence[str], start: int) -> "OracleFollower":
        return OracleFollower(self, len(names), start)

    def predict(self, history: History, leads: Sequence[int]) -> Prediction:
        raise NotImplementedError


class OracleFollower:
    def __init__(self, model: Oracle, num_series: int, start: int) -> None:
        self.minute = start
        self._model = model
        self._some = np.zeros(num_series)

    def advance(self, counts: npt.ArrayLike) -> None:
        self.minute += 1

    def forecast(self, leads: Sequence[int]) -> Prediction:
        wait = -self.minute % 5
        is_right = self.minute < self._model.wrong_from
        p = [0.99 if (wait < lead) == is_right or lead >= 5 else 0.001 for lead in leads]
        chances = np.maximum.accumulate(np.tile(p, (len(self._some), 1)), axis=1)
        return poisson_prediction(-np.log1p(-chances), chances)


def following(model: AutoModel, counts: np.ndarray, start: int = 0):
    follower = model.follow([f"s{row}" for row in range(len(counts))], start)
    for column in counts.T:
        follower.advance(column)
    return follower


def test_every_stage_of_every_workload_is_forecast_soundly() -> None:
    history = workload(400, seed=1)
    follower = AutoModel().follow(history.names, 0)
    for minute, column in enumerate(history.counts.T):
        if minute in (0, 1, 30, 134, 399):
            check_prediction(follower.forecast(LEADS), len(NAMES), len(LEADS))
            check_prediction(follower.forecast((3, 45, 120)), len(NAMES), 3)
        follower.advance(column)
    check_prediction(follower.forecast(GRID), len(NAMES), len(GRID))


def test_poison_reaches_others_no_farther_than_that_somebody_was_active() -> None:
    history = workload(400, seed=1)
    poisoned = NAMES.index("poisoned")
    tamed = history.counts.copy()
    row = tamed[poisoned]
    tamed[poisoned] = np.where(np.isfinite(row) & (row >= 0), np.minimum(row, 5), np.nan)
    ours = AutoModel().predict(history, LEADS)
    theirs = AutoModel().predict(History(NAMES, 0, tamed), LEADS)
    others = np.arange(len(NAMES)) != poisoned
    np.testing.assert_array_equal(ours.p_arrival[others], theirs.p_arrival[others])
    np.testing.assert_array_equal(ours.quantiles[others], theirs.quantiles[others])


def test_a_series_that_is_never_known_changes_no_other() -> None:
    counts = synthetic.functions(30, 300, seed=2).trace.history.counts
    unknown = np.full((1, counts.shape[1]), np.nan, np.float32)
    ours = following(AutoModel(), np.concatenate([counts, unknown])).forecast(LEADS)
    theirs = following(AutoModel(), counts).forecast(LEADS)
    np.testing.assert_array_equal(ours.p_arrival[:30], theirs.p_arrival)


def test_the_candidate_that_knows_speaks_and_says_why() -> None:
    counts = np.tile(np.arange(600) % 5 == 0, (3, 1)).astype(np.float32)
    counts[2] = 0
    follower = following(AutoModel([SkiRental(), Ewma(15), Oracle()]), counts)
    models, whys = follower.sources(np.arange(3))
    assert models == ["oracle", "oracle", "ski-rental"]
    assert whys == ["cheapest for this series"] * 2 + ["no arrivals yet"]
    p = follower.forecast((1,)).p_arrival[:, 0]
    assert (p[:2] > 0.95).all()  # minute 600 brings an arrival
    assert p[2] < 0.01


class Counting(Oracle):
    """Is called as the network is; knows how many come, and not whether any does."""

    name = "hybrid"

    def follow(self, names: Sequence[str], start: int) -> "CountingFollower":
        return CountingFollower(self, len(names), start)


class CountingFollower(OracleFollower):
    def forecast(self, leads: Sequence[int]) -> Prediction:
        shape = (len(self._some), len(leads))
        return hurdle_prediction(np.full(shape, 0.3), np.full(shape, 40.0), np.full(shape, 1e6))


def test_the_network_counts_where_another_speaks_until_its_bound_fails() -> None:
    model = AutoModel([SkiRental(), Ewma(15), Counting()])
    follower = following(model, np.full((2, 300), 40, np.float32))
    models, _ = follower.sources(np.arange(2))
    assert set(models) == {"ewma-15"}
    said = follower.forecast((1,))
    assert (said.p_arrival > 0.95).all()
    assert (said.quantiles[:, 0, 2] == said.quantiles[0, 0, 2]).all()
    assert 40 <= said.quantiles[0, 0, 2] < 60
    for _ in range(200):
        follower.advance(np.array([40, 400]))
    _, whys = follower.sources(np.arange(2))
    assert whys[1] == "hybrid's counts left its bound"
    assert follower.forecast((1,)).quantiles[1, 0, 2] > 300


def test_a_model_that_turns_wrong_is_set_aside_within_hours() -> None:
    counts = np.tile(np.arange(900) % 5 == 0, (3, 1)).astype(np.float32)
    model = AutoModel([SkiRental(), Ewma(15), Oracle(wrong_from=700)])
    follower = following(model, counts[:, :700])
    assert follower.sources(np.arange(3))[0] == ["oracle"] * 3
    for column in counts[:, 700:].T:
        follower.advance(column)
    models, whys = follower.sources(np.arange(3))
    assert set(models) <= {"ewma-15", "ski-rental"}
    assert set(whys) <= {"oracle's log score fell behind", "cheapest for this series"}


def test_is_about_as_good_as_the_best_candidate_and_never_as_bad_as_the_worst() -> None:
    trace = synthetic.functions(120, 1440, seed=4).trace
    parts = backtest.split(trace, halves=True)
    costs = {}
    for model in (SkiRental(), Ewma(15), Ewma(240), HazardModel(), AutoModel()):
        model.fit(parts.past.history.before(parts.fit_until), parts.past.weights)
        p = backtest.sweep(model, parts.future, parts.report_from, (1,))[..., 0]
        costs[model.name] = sum(
            decisions.replay(p > decisions.fixed_threshold(price), parts.counts).cost(
                price, parts.future.weights
            )
            / price
            for price in backtest.COLD_COSTS
        )
    ours = costs.pop("auto")
    assert ours <= 1.03 * min(costs.values())


def test_fitted_minutes_are_in_sample_and_teach_nothing() -> None:
    history = workload(200)
    model = AutoModel([SkiRental(), Ewma(15), HazardModel()])
    model.fit(history)
    fitted = model.follow(history.names, 0)
    others = model.follow([f"other-{name}" for name in history.names], 0)
    for column in history.counts.T:
        fitted.advance(column)
        others.advance(column)
    assert fitted._curves.seen.sum() == 0
    assert others._curves.seen.sum() > 0
    fitted.advance(history.counts[:, 0])
    assert fitted._curves.seen.sum() > 0


def test_state_goes_with_series_and_through_a_file() -> None:
    history = workload(150, start=7200)
    forecaster = Forecaster(AutoModel(), 7200)
    for minute, column in enumerate(history.counts.T, start=7200):
        for name, count in zip(history.names, column.tolist(), strict=True):
            forecaster.observe_minute(name, minute, count)
        if minute == 7230:
            forecaster.observe_minute("guest", minute, 2)
        if minute == 7300:
            forecaster.forget("guest")
        forecaster.tick(60.0 * (minute + 1))
    leads = (5.0, 60.0, 600.0)
    again = Forecaster.from_state(AutoModel(), forecaster.export_state())
    for minute in range(7350, 7400):
        for each in (forecaster, again):
            each.observe_minute("timer", minute, minute % 7 == 3)
            each.tick(60.0 * (minute + 1))
            assert len(each.predict_all(leads).names) == len(NAMES)
    ours, theirs = forecaster.predict_all(leads), again.predict_all(leads)
    np.testing.assert_array_equal(ours.p_arrival, theirs.p_arrival)
    np.testing.assert_array_equal(ours.quantiles, theirs.quantiles)
    assert list(ours.whys) == list(theirs.whys)
    with pytest.raises(InputError, match=r"the model auto \(ski-rental, ewma-5"):
        Forecaster.from_state(AutoModel([SkiRental(), Ewma(5)]), forecaster.export_state())
    said = forecaster.predict("timer", leads)
    assert said.model in {candidate.name for candidate in default_candidates()}
    assert said.components.keys() >= {"hazard"}


def test_llm_clients_may_be_a_cohort_of_their_own() -> None:
    counts = synthetic.clients(10, 200, seed=0).trace.history.counts
    follower = following(AutoModel(cohort="llm"), counts)
    _, whys = follower.sources(np.arange(10))
    assert set(whys) <= {"no arrivals yet", "cheapest for llm series", "cheapest for this series"}


def test_there_must_be_something_to_fall_back_to() -> None:
    with pytest.raises(InputError, match="needs ski-rental or an ewma"):
        AutoModel([HazardModel()])


def test_the_server_needs_no_tensor_library_to_forecast() -> None:
    code = (
        "import sys, flashserve.forecast.forecaster, flashserve.forecast.auto; "
        "assert not {'torch', 'scipy', 'pyarrow', 'lightgbm'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("leads", [(1,), (1, 5, 10, 30), (2, 60)])
def test_longer_leads_are_never_less_likely_after_calibration(leads: tuple[int, ...]) -> None:
    counts = synthetic.functions(60, 400, seed=6).trace.history.counts
    follower = AutoModel().follow([f"s{row}" for row in range(60)], 0)
    for minute, column in enumerate(counts.T):
        follower.advance(column)
        if minute % 50 == 0:
            p = follower.forecast(leads).p_arrival
            assert (np.diff(p, axis=1) >= 0).all()
