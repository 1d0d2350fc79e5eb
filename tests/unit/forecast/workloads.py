"""Named synthetic series that every forecaster meets, and what must hold for each forecast."""

import numpy as np

from flashserve.forecast.core import ArrivalModel, History, Prediction

NAMES = ("timer", "diurnal", "bursty", "silent", "poisoned", "young", "busy")
LEADS = (1, 5, 10, 30)


def workload(num_minutes: int = 600, seed: int = 0, start: int = 0) -> History:
    """A timer, a day's wave, an on/off client, silence, poison, a young and a hot series."""
    draw = np.random.default_rng(seed)
    minutes = start + np.arange(num_minutes)
    counts = np.zeros((len(NAMES), num_minutes))
    counts[0] = minutes % 7 == 3
    counts[1] = draw.poisson(2 + 1.9 * np.sin(2 * np.pi * minutes / 1440))
    is_on = np.repeat(draw.random(num_minutes // 50 + 1) < 0.3, 50)[:num_minutes]
    counts[2] = draw.poisson(np.where(is_on, 3.0, 0.0))
    counts[4] = draw.poisson(0.2, num_minutes)
    counts[4, num_minutes // 3] = 1e9
    counts[4, num_minutes // 2] = np.nan
    counts[4, num_minutes // 2 + 1] = np.inf
    counts[4, num_minutes // 2 + 2] = -5
    counts[4, -1] = 1e9
    born = max(num_minutes - 40, 0)
    counts[5, :born] = np.nan
    counts[5, born:] = draw.random(num_minutes - born) < 0.2
    counts[6] = draw.poisson(300, num_minutes)
    return History(NAMES, start, counts.astype(np.float32))


def without_poison(history: History) -> History:
    """The same with silence in place of the poisoned series."""
    counts = history.counts.copy()
    counts[NAMES.index("poisoned")] = 0
    return History(history.names, history.start, counts)


def check_prediction(prediction: Prediction, num_series: int, num_leads: int) -> None:
    """What must hold for whatever a model was given."""
    assert prediction.p_arrival.shape == prediction.mean.shape == (num_series, num_leads)
    assert prediction.quantiles.shape == (num_series, num_leads, 4)
    for values in (prediction.p_arrival, prediction.mean, prediction.quantiles):
        assert np.isfinite(values).all()
        assert (values >= 0).all()
        assert (np.diff(values, axis=1) >= 0).all()
    assert (prediction.p_arrival <= 1).all()
    assert (np.diff(prediction.quantiles, axis=2) >= 0).all()
    for component in prediction.components.values():
        assert component.shape == (num_series,)
        assert np.isfinite(component).all()


def check_model(model: ArrivalModel, ends: tuple[int, ...] = (0, 1, 134, 400)) -> None:
    """A fitted model keeps the rules at every stage of a history, and poison stays where it is."""
    history = workload(400, seed=1)
    harmless = without_poison(history)
    others = [i for i, name in enumerate(NAMES) if name != "poisoned"]
    for end in ends:
        seen = history.before(end)
        prediction = model.predict(seen, LEADS)
        check_prediction(prediction, len(NAMES), len(LEADS))
        clean = model.predict(harmless.before(end), LEADS)
        for ours, theirs in (
            (prediction.p_arrival, clean.p_arrival),
            (prediction.mean, clean.mean),
            (prediction.quantiles, clean.quantiles),
        ):
            np.testing.assert_allclose(ours[others], theirs[others], rtol=1e-4, atol=1e-6)
