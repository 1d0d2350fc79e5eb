import sys

import numpy as np
import pytest
from tests.unit.forecast.workloads import check_model, workload

from flashserve.errors import InputError
from flashserve.forecast.core import History
from flashserve.forecast.prophet import BIN_MINUTES, ProphetLstm, fit_prophet
from flashserve.forecast.residual import HORIZON_BINS, WINDOW_BINS, windows_of
from flashserve.forecast.residual_train import train


@pytest.fixture(scope="module")
def fitted() -> ProphetLstm:
    pytest.importorskip("prophet")
    model = ProphetLstm(num_epochs=2)
    model.fit(workload(300))
    return model


def test_keeps_the_rules_of_a_forecast(fitted: ProphetLstm) -> None:
    check_model(fitted, ends=(0, 7, 200))


def test_forecasts_the_level_of_a_steady_series(fitted: ProphetLstm) -> None:
    counts = np.random.default_rng(0).poisson(6, (1, 200)).astype(np.float32)
    prediction = fitted.predict(History(("steady",), 0, counts), (1, 10))
    assert 3 < prediction.mean[0, 0] < 9
    assert 30 < prediction.mean[0, 1] < 90
    assert prediction.components["trend"][0] == pytest.approx(6, abs=2.5)


def test_prophet_is_fitted_when_a_forecast_needs_it_and_not_before() -> None:
    pytest.importorskip("torch")
    asked: list[tuple[int, int]] = []

    def fit_one(values: np.ndarray, start: int, num_ahead: int) -> tuple[np.ndarray, np.ndarray]:
        asked.append((start, len(values)))
        return np.full(len(values), 2.0), np.full(num_ahead, 2.0)

    model = ProphetLstm(num_epochs=0, fit_one=fit_one)
    model.fit(workload(60))
    asked.clear()
    follower = model.follow(("a", "b"), 100)
    for _ in range(24 * BIN_MINUTES - 1):
        follower.advance([2.0, 2.0])
    assert follower.forecast((1,)).mean.max() < 0.01
    assert not asked
    for _ in range(60 * BIN_MINUTES):
        follower.advance([2.0, 2.0])
    for _ in range(3):
        prediction = follower.forecast((1, 10))
    assert asked == [(100, 72)] * 2
    np.testing.assert_allclose(prediction.mean, [[2, 20]] * 2)


def test_prophet_continues_a_slope() -> None:
    pytest.importorskip("prophet")
    values = 2 + 0.1 * np.arange(60)
    inside, ahead = fit_prophet(values, 0, 5)
    np.testing.assert_allclose(inside, values, atol=0.2)
    np.testing.assert_allclose(ahead, 2 + 0.1 * np.arange(60, 65), atol=0.5)
    silent = fit_prophet(np.zeros(30), 0, 3)
    assert (silent[1] == 0).all()


def test_the_residual_network_continues_a_wave_and_numpy_agrees_with_torch() -> None:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    wave = np.sin(2 * np.pi * np.arange(1200) / 12)
    inputs, outputs = windows_of(wave)
    assert inputs.shape[1:] == (WINDOW_BINS,)
    assert outputs.shape[1:] == (HORIZON_BINS,)
    weights = train(inputs, outputs, seed=0, num_epochs=25)
    miss = np.abs(weights.ahead(inputs) - outputs).mean()
    assert miss < 0.25 * np.abs(outputs).mean()
    lstm = torch.nn.LSTM(1, len(weights.hidden_weights), batch_first=True)
    with torch.no_grad():
        lstm.weight_ih_l0.copy_(torch.from_numpy(weights.input_weights.T))
        lstm.weight_hh_l0.copy_(torch.from_numpy(weights.hidden_weights.T))
        lstm.bias_ih_l0.copy_(torch.from_numpy(weights.bias))
        lstm.bias_hh_l0.zero_()
        hidden = lstm(torch.from_numpy(inputs.copy())[..., None])[0][:, -1].numpy()
    theirs = hidden @ weights.out_weights + weights.out_bias
    np.testing.assert_allclose(weights.ahead(inputs), theirs, rtol=1e-3, atol=1e-4)


def test_without_a_window_to_learn_from_the_residual_adds_nothing() -> None:
    pytest.importorskip("torch")
    inputs, outputs = windows_of(np.empty(0))
    weights = train(inputs, outputs, seed=0, num_epochs=3)
    assert (weights.ahead(np.ones((2, WINDOW_BINS), dtype=np.float32)) == 0).all()


def test_without_a_fit_or_the_library_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="call fit first"):
        ProphetLstm().predict(workload(10), (1,))
    monkeypatch.setitem(sys.modules, "prophet", None)
    with pytest.raises(InputError, match=r"pip install 'flashserve\[forecast\]'"):
        fit_prophet(np.arange(1.0, 9 * BIN_MINUTES), 0, 1)
