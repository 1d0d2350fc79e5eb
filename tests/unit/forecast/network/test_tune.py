"""Scores on minutes that were held out, by hand."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest

from flashserve.forecast.core import Prediction
from flashserve.forecast.network.tune import held_out_loss

NAN = math.nan


class Says:
    """Gives every series the same chance, and remembers what it was told."""

    name = "says"

    def __init__(self, p: float) -> None:
        self.p = p
        self.told: list[list[float]] = []

    def fit(self, *_: object) -> None:
        raise NotImplementedError

    predict = fit

    def follow(self, names: Sequence[str], start: int) -> Says:
        self.num_series = len(names)
        return self

    def advance(self, counts: np.ndarray) -> None:
        self.told.append(list(counts))

    def forecast(self, leads: Sequence[int]) -> Prediction:
        p = np.full((self.num_series, len(leads)), self.p)
        return Prediction(p, p, np.zeros((*p.shape, 4)))


def test_chances_are_scored_on_the_last_minutes_only() -> None:
    model = Says(0.8)
    counts = np.array([[0.0, 0.0, 3.0, 0.0]])
    expected = (-math.log(0.8) - math.log(0.2)) / 2
    assert held_out_loss(model, counts, 100, 2, leads=[1]) == pytest.approx(expected)
    assert len(model.told) == 4


def test_minutes_that_are_not_known_or_run_past_the_end_do_not_count() -> None:
    counts = np.array([[0.0, 0.0, NAN, 1.0], [0.0, 0.0, 0.0, 1.0]])
    # The first series: minute 3 by lead 1. The second: 2 and 3 by lead 1, and 2 by lead 2.
    first, second = -math.log(0.8), -(math.log(0.2) + 2 * math.log(0.8)) / 3
    found = held_out_loss(Says(0.8), counts, 0, 2, leads=[1, 2])
    assert found == pytest.approx((first + second) / 2)


def test_nothing_known_is_no_score() -> None:
    assert math.isnan(held_out_loss(Says(0.8), np.array([[0.0, NAN]]), 0, 1, leads=[1]))
