"""Counts of a day: additive, small when packed, and refused when damaged."""

from __future__ import annotations

import random
import zlib

import pytest

from flashserve.forecast.core import MAX_COUNT
from flashserve.forecast.days import DAY_MINUTES, DayCounts, day_of


def made(*entries: tuple[int, int]) -> DayCounts:
    day = DayCounts()
    for minute, count in entries:
        day.add(minute, count)
    return day


def test_counts_of_one_minute_add_up_whatever_the_order() -> None:
    entries = [(5, 1), (5, 2), (1439, 7), (0, 1), (5, 1), (3, 9)]
    shuffled = random.Random(1).sample(entries, len(entries))
    assert list(made(*entries)) == list(made(*shuffled)) == [(0, 1), (3, 9), (5, 4), (1439, 7)]


def test_no_minute_holds_more_than_any_minute_can_bring() -> None:
    day = made((1, int(MAX_COUNT)), (1, 5), (2, 1 << 62))
    assert list(day) == [(1, int(MAX_COUNT)), (2, int(MAX_COUNT))]


def test_two_records_of_a_day_are_merged() -> None:
    day = made((1, 1), (3, 1))
    day.merge(made((2, 5), (3, 1)))
    assert list(day) == [(1, 1), (2, 5), (3, 2)]


@pytest.mark.parametrize("size", [0, 1, 35, DAY_MINUTES])
def test_a_packed_day_is_unpacked_as_it_was_and_is_small(size: int) -> None:
    draw = random.Random(size)
    minutes = sorted(draw.sample(range(DAY_MINUTES), size))
    day = made(*((minute, draw.choice([1, 1, 1, 2, 3, 40])) for minute in minutes))
    blob = day.pack()
    assert list(DayCounts.unpack(blob)) == list(day)
    assert len(blob) < 40 + 3 * size
    arrays = day.arrays()
    assert arrays[0].tolist() == minutes
    assert arrays[1].tolist() == [count for _, count in day]


GOOD = made((5, 1), (9, 2)).pack()
UNSORTED = b"\x09\x00\x05\x00" + b"\x01" + 7 * b"\x00" + b"\x01" + 7 * b"\x00"


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\x02" + GOOD[1:],
        GOOD[:-3],
        GOOD[:-3] + b"abc",
        b"\x01" + zlib.compress(b"123"),
        b"\x01" + zlib.compress(UNSORTED),
        b"\x01" + zlib.compress(b"\xff\xff" + b"\x01" + 7 * b"\x00"),
        b"\x01" + zlib.compress(b"\x01\x00" + 8 * b"\xff"),
        b"\x01" + zlib.compress(bytes(1 << 20)),
    ],
)
def test_what_is_damaged_is_refused(blob: bytes) -> None:
    with pytest.raises(ValueError, match=r"damaged|not known"):
        DayCounts.unpack(blob)


def test_days_are_those_of_utc() -> None:
    assert [day_of(minute) for minute in (-1, 0, 1439, 1440)] == [-1, 0, 0, 1]
