import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tests.unit.forecast.workloads import NAMES, check_model, workload

from flashserve.errors import InputError, UnavailableError
from flashserve.forecast.core import History, known_counts
from flashserve.forecast.hazard import Pool
from flashserve.forecast.network import weights as files
from flashserve.forecast.network.features import LEADS, NUM_FEATURES
from flashserve.forecast.network.model import NetworkModel
from flashserve.forecast.network.process import TrainSettings
from flashserve.forecast.network.weights import NUM_LEADS, NetworkWeights, p_within

SMALL = TrainSettings(num_epochs=12, num_hidden=8, num_head=8, learning_rate=1e-2)


def drawn_weights(num_hidden: int = 6, num_head: int = 5, seed: int = 0) -> NetworkWeights:
    draw = np.random.default_rng(seed)

    def normal(*shape: int) -> np.ndarray:
        return draw.normal(0, 0.3, shape).astype(np.float32)

    return NetworkWeights(
        mean=normal(NUM_FEATURES),
        scale=np.ones(NUM_FEATURES, dtype=np.float32),
        low=np.full(NUM_FEATURES, -3, dtype=np.float32),
        high=np.full(NUM_FEATURES, 3, dtype=np.float32),
        input_weights=normal(NUM_FEATURES, 4 * num_hidden),
        hidden_weights=normal(num_hidden, 4 * num_hidden),
        gate_bias=normal(4 * num_hidden),
        head_weights=normal(num_hidden + NUM_FEATURES, num_head),
        head_bias=normal(num_head),
        out_weights=normal(num_head, 3 * NUM_LEADS),
        out_bias=normal(3 * NUM_LEADS),
        due_scale=normal(NUM_LEADS),
        exposures=Pool().exposures,
        events=Pool().events,
    )


@pytest.fixture(scope="module")
def trained() -> NetworkModel:
    """Trained in a process of its own on a few of each kind, poisoned ones among them."""
    counts = np.concatenate([workload(360, seed=seed).counts for seed in range(6)])
    model = NetworkModel(settings=SMALL)
    model.fit(History(tuple(map(str, range(len(counts)))), 0, counts))
    return model


def test_keeps_the_rules_of_a_forecast(trained: NetworkModel) -> None:
    check_model(trained)


def test_keeps_the_rules_whatever_its_weights_are() -> None:
    check_model(NetworkModel(drawn_weights()))


def test_learns_when_a_timer_is_due_and_that_silence_stays(trained: NetworkModel) -> None:
    history = workload(seed=9)
    follower = trained.follow(NAMES, 0)
    in_time, off_time, silent = [], [], []
    for minute, column in enumerate(history.counts.T):
        p = follower.forecast((1,)).p_arrival[:, 0]
        if minute > 300:
            (in_time if minute % 7 == 3 else off_time).append(p[0])
            silent.append(p[NAMES.index("silent")])
        follower.advance(column)
    assert min(in_time) > 0.5
    assert max(off_time) < 0.2
    assert max(silent) < 0.05


def test_expects_about_as_many_as_a_busy_series_brings(trained: NetworkModel) -> None:
    prediction = trained.predict(workload(), (1, 10))
    busy = NAMES.index("busy")
    assert 150 < prediction.mean[busy, 0] < 600
    low, _, high, _ = prediction.quantiles[busy, 0]
    assert low < 300 < high * 1.2


def test_numpy_computes_what_torch_computes() -> None:
    torch = pytest.importorskip("torch")
    from flashserve.forecast.network.train import Network

    torch.set_num_threads(1)
    weights = drawn_weights()
    model = Network(6, 5)
    model.imported(weights)
    draw = np.random.default_rng(1)
    x = draw.normal(size=(3, 20, NUM_FEATURES)).astype(np.float32)
    rows = draw.normal(size=(3, 20, NUM_FEATURES)).astype(np.float32)
    due = np.stack([files.due_logits(rows[:, minute]) for minute in range(20)], axis=1)
    with torch.no_grad():
        theirs = model(torch.from_numpy(x), torch.from_numpy(due), None)[:3]
    hidden = cell = np.zeros((3, 6), dtype=np.float32)
    for minute in range(20):
        hidden, cell = weights.step(x[:, minute], hidden, cell)
        ours = weights.heads(x[:, minute], hidden, rows[:, minute])
        for mine, their in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, their[:, minute].numpy(), rtol=1e-4, atol=1e-5)


def test_exporting_what_was_imported_changes_nothing() -> None:
    pytest.importorskip("torch")
    from flashserve.forecast.network.dataset import make_dataset
    from flashserve.forecast.network.train import Network

    weights = drawn_weights()
    history = workload(90)
    counts = known_counts(history.counts)
    data = make_dataset(counts, 0, np.ones(7), 10_000, np.random.default_rng(0), weights)
    model = Network(6, 5)
    model.imported(weights)
    again = model.exported(data)
    for field in dataclasses.fields(NetworkWeights):
        np.testing.assert_array_equal(getattr(again, field.name), getattr(weights, field.name))


def test_the_same_seed_trains_the_same_weights_and_training_goes_on_from_the_last() -> None:
    torch = pytest.importorskip("torch")
    from flashserve.forecast.network.train import train

    torch.set_num_threads(1)
    counts, share = known_counts(workload(150).counts), np.ones(len(NAMES))
    brief = dataclasses.replace(SMALL, num_epochs=1)
    first, second = (train(counts, 0, share, brief) for _ in range(2))
    np.testing.assert_array_equal(first.input_weights, second.input_weights)
    later = train(counts, 0, share, brief, first)
    np.testing.assert_array_equal(first.mean, later.mean)
    assert np.abs(first.input_weights - later.input_weights).max() < 0.1


def test_training_that_fails_says_why() -> None:
    settings = dataclasses.replace(SMALL, memory_bytes=1 << 20)
    with pytest.raises(UnavailableError, match="training the forecaster failed"):
        NetworkModel(settings=settings).fit(workload(30))


def test_saved_weights_come_back_and_damaged_ones_are_refused(tmp_path: Path) -> None:
    weights, path = drawn_weights(), tmp_path / "weights.npz"
    files.save(weights, path)
    np.testing.assert_array_equal(files.load(path).out_weights, weights.out_weights)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="train the forecaster again"):
        files.load(path)
    files.save(dataclasses.replace(weights, head_bias=weights.head_bias[:2]), path)
    with pytest.raises(InputError, match="head_weights is damaged"):
        files.load(path)
    files.save(dataclasses.replace(weights, gate_bias=weights.gate_bias * np.nan), path)
    with pytest.raises(InputError, match="gate_bias is damaged"):
        files.load(path)
    with pytest.raises(InputError, match=r"absent\.npz"):
        files.load(tmp_path / "absent.npz")


def test_a_model_without_weights_says_so() -> None:
    with pytest.raises(InputError, match="no weights"):
        NetworkModel().predict(workload(10), (1,))


def test_intervals_multiply_up_to_the_probability_within_each_lead() -> None:
    logits = np.log(np.array([[0.2, 0.5, 0.1, 0.3, 0.4, 0.2, 0.1]]) / 0.5)
    hazards = 1 / (1 + np.exp(-logits))
    quiet = 1.0
    for index in range(len(LEADS)):
        quiet *= 1 - hazards[0, index]
        assert p_within(logits)[0, index] == pytest.approx(1 - quiet)
