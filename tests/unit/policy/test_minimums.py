from __future__ import annotations

import datetime
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashserve.errors import InputError
from flashserve.policy.minimums import check_minimums
from flashserve.policy.schedules import Bounds, scaling_at
from flashserve.types import ModelId

A, B, C = ModelId("a"), ModelId("b"), ModelId("c")
OFFICE = Bounds(schedule=("mon-fri 08:00-18:00 min=2",))
NIGHT = Bounds(schedule=("mon-fri 18:00-08:00 min=2",))


def refused(bounds: Bounds, others: dict[ModelId, Bounds], num_workers: int) -> InputError:
    with pytest.raises(InputError) as error:
        check_minimums(A, bounds, others, num_workers)
    return error.value


def test_minimums_may_take_every_worker_and_no_more() -> None:
    others = {B: Bounds(min_replicas=1), C: Bounds(min_replicas=1)}
    check_minimums(A, Bounds(min_replicas=1), others, 3)
    error = refused(Bounds(min_replicas=1), others, 2)
    assert error.param == "min_replicas"
    assert error.message == (
        "min_replicas is 1 for a, and b 1, c 1 for others: together above the 2 workers that "
        "there are (node.num_workers)"
    )


def test_schedules_that_never_hold_together_may_share_workers() -> None:
    check_minimums(A, OFFICE, {B: NIGHT}, 2)
    error = refused(OFFICE, {B: Bounds(min_replicas=1)}, 2)
    assert error.param == "schedule"
    assert "min_replicas is 2 for a on Monday at 08:00, and b 1 for others" in error.message
    error = refused(Bounds(min_replicas=1), {B: NIGHT}, 2)
    assert error.param == "min_replicas"
    assert "on Monday at 18:00" in error.message


def test_a_model_without_a_minimum_is_not_blamed_for_others() -> None:
    crowd = {B: Bounds(min_replicas=2), C: Bounds(min_replicas=2)}
    check_minimums(A, Bounds(max_replicas=1), crowd, 2)
    check_minimums(A, Bounds(schedule=("daily 00:00-24:00 min=0",)), crowd, 2)


def test_many_others_are_named_in_part() -> None:
    others = {ModelId(f"m{i}"): Bounds(min_replicas=1) for i in range(9)}
    assert "m4 1 and 4 more for others" in refused(Bounds(min_replicas=1), others, 9).message


LINES = [
    f"{days} {times} min={least}"
    for days, times, least in itertools.product(
        ("mon", "sat-tue", "daily"), ("00:00-24:00", "22:00-06:00", "12:00-13:30"), (0, 1, 2)
    )
]
BOUNDS = st.builds(
    Bounds,
    min_replicas=st.sampled_from([None, 0, 1]),
    schedule=st.lists(st.sampled_from(LINES), max_size=1).map(tuple),
)
WEEK = [
    datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC) + datetime.timedelta(minutes=30 * i)
    for i in range(336)
]


@given(mine=BOUNDS, first=BOUNDS, second=BOUNDS, num_workers=st.integers(1, 5))
def test_it_agrees_with_a_look_at_every_half_hour(
    mine: Bounds, first: Bounds, second: Bounds, num_workers: int
) -> None:
    def least(bounds: Bounds, at: datetime.datetime) -> int:
        return scaling_at(bounds, at).min_replicas

    too_many = any(
        least(mine, at) and sum(least(one, at) for one in (mine, first, second)) > num_workers
        for at in WEEK
    )
    if not too_many:
        check_minimums(A, mine, {B: first, C: second}, num_workers)
    elif least_alone(mine) <= num_workers:
        refused(mine, {B: first, C: second}, num_workers)


def least_alone(bounds: Bounds) -> int:
    return max(scaling_at(bounds, at).min_replicas for at in WEEK)
