import sys

import numpy as np
import pytest
from tests.unit.forecast.workloads import NAMES, check_model, workload

from flashserve.errors import InputError
from flashserve.forecast.boosted import BoostedModel
from flashserve.forecast.core import History


@pytest.fixture(scope="module")
def fitted() -> BoostedModel:
    pytest.importorskip("lightgbm")
    counts = np.concatenate([workload(360, seed=seed).counts for seed in range(4)])
    model = BoostedModel(num_rounds=15)
    model.fit(History(tuple(map(str, range(len(counts)))), 0, counts))
    return model


def test_keeps_the_rules_of_a_forecast(fitted: BoostedModel) -> None:
    check_model(fitted)


def test_learns_when_a_timer_is_due(fitted: BoostedModel) -> None:
    history = workload(500, seed=9)
    due = fitted.predict(history.before(493), (1,)).p_arrival[NAMES.index("timer"), 0]
    early = fitted.predict(history.before(490), (1,)).p_arrival[NAMES.index("timer"), 0]
    assert 493 % 7 == 3
    assert due > 0.5 > 0.2 > early


def test_without_a_fit_or_the_library_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="call fit first"):
        BoostedModel().predict(workload(10), (1,))
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(InputError, match=r"pip install 'flashserve\[forecast\]'"):
        BoostedModel().fit(workload(10))
