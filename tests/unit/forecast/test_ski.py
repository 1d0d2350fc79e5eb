import numpy as np
import pytest
from tests.unit.forecast.workloads import check_model

from flashserve.forecast.core import History
from flashserve.forecast.ski import SkiRental


@pytest.mark.parametrize("price", [1, 5, 10, 30, 60])
def test_stays_warm_for_as_many_quiet_minutes_as_a_cold_start_costs(price: int) -> None:
    for num_quiet in range(80):
        counts = np.zeros((1, num_quiet + 1), dtype=np.float32)
        counts[0, 0] = 1
        p = SkiRental().predict(History(("a",), 0, counts), (1,)).p_arrival[0, 0]
        assert (p > 1 / (1 + price)) == (num_quiet < price)


def test_a_model_that_was_never_asked_for_is_not_kept_warm() -> None:
    counts = np.zeros((1, 3), dtype=np.float32)
    assert SkiRental().predict(History(("a",), 0, counts), (1,)).p_arrival[0, 0] < 1e-3


def test_keeps_the_rules_of_a_forecast() -> None:
    check_model(SkiRental())
