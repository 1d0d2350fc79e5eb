"""The counter of arrivals: additive by minute, whatever the order and the clock."""

from __future__ import annotations

import pytest

from flashserve.forecast.arrivals import (
    ArrivalCount,
    ArrivalCounter,
    belongs_to,
    is_known,
    minute_of,
    series_of,
)
from flashserve.types import ModelId

A, B = ModelId("a"), ModelId("b")


def test_arrivals_of_one_minute_add_up_per_model() -> None:
    counter = ArrivalCounter()
    for at in (60.0, 61.5, 119.99):
        counter.record(A, at)
    counter.record(B, 60.0)
    counter.record(A, 120.0)
    assert counter.drain() == [
        ArrivalCount(A, 1, 3),
        ArrivalCount(B, 1, 1),
        ArrivalCount(A, 2, 1),
    ]


def test_drain_empties_the_counter() -> None:
    counter = ArrivalCounter()
    counter.record(A, 0.0)
    assert len(counter) == 1
    counter.drain()
    assert counter.drain() == []


def test_late_events_and_a_clock_that_steps_back_count_in_the_minute_they_name() -> None:
    counter = ArrivalCounter()
    for at in (600.0, 30.0, 601.0, 31.0):
        counter.record(A, at)
    assert counter.drain() == [ArrivalCount(A, 0, 2), ArrivalCount(A, 10, 2)]


def test_what_could_not_be_written_is_counted_again_together_with_what_came_since() -> None:
    counter = ArrivalCounter()
    counter.record(A, 0.0)
    failed = counter.drain()
    counter.record(A, 1.0)
    counter.restore(failed)
    assert counter.drain() == [ArrivalCount(A, 0, 2)]


def test_memory_is_bounded_and_the_oldest_minutes_go_first() -> None:
    counter = ArrivalCounter(max_entries=10)
    for minute in range(11):
        counter.record(A, minute * 60.0)
    kept = counter.drain()
    assert [entry.minute for entry in kept] == list(range(2, 11))
    assert counter.num_dropped == 2


def test_a_counter_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ArrivalCounter(max_entries=0)


def test_times_before_1970_and_at_boundaries_have_a_minute() -> None:
    assert [minute_of(at) for at in (-1.0, 0.0, 59.999, 60.0)] == [-1, 0, 0, 1]


def test_what_was_counted_of_series_that_are_gone_is_dropped() -> None:
    counter = ArrivalCounter()
    for series in (A, series_of(A, "x"), B):
        counter.record(series, 0.0)
    counter.forget(lambda series: belongs_to(series, A))
    assert counter.drain() == [ArrivalCount(B, 0, 1)]


def test_an_adapters_series_belongs_to_its_model_and_not_to_one_of_a_like_name() -> None:
    assert series_of(A, "x") == "a:x"
    assert belongs_to(series_of(A, "x"), A)
    assert not belongs_to(ModelId("ab"), A)
    assert not belongs_to(ModelId("ab:x"), A)


@pytest.mark.parametrize(
    ("series", "known"), [("a", True), ("a:x", True), ("a:y", False), ("b:x", False), ("", False)]
)
def test_a_series_is_known_when_its_model_and_adapter_are(series: str, known: bool) -> None:
    assert is_known(ModelId(series), {"a", "x"}.__contains__) == known
