from __future__ import annotations

import datetime
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashserve.errors import InputError
from flashserve.policy.schedules import Bounds, check_bounds, parse_line, scaling_at
from flashserve.types import Scaling

BERLIN = ZoneInfo("Europe/Berlin")
MONDAY = datetime.datetime(2026, 11, 23, tzinfo=BERLIN)
NAMES = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
OFFICE = Bounds(schedule=("mon-fri 08:00-18:00 min=1",))


def at(day: int, hour: int, minute: int = 0) -> datetime.datetime:
    return MONDAY + datetime.timedelta(days=day, hours=hour, minutes=minute)


@pytest.mark.parametrize(
    ("day", "hour", "minute", "least"),
    [(0, 7, 59, 0), (0, 8, 0, 1), (4, 17, 59, 1), (4, 18, 0, 0), (5, 12, 0, 0), (6, 12, 0, 0)],
)
def test_a_window_holds_from_its_start_to_before_its_end(
    day: int, hour: int, minute: int, least: int
) -> None:
    assert scaling_at(OFFICE, at(day, hour, minute)) == Scaling(min_replicas=least)


def test_a_window_over_midnight_belongs_to_the_day_on_which_it_begins() -> None:
    night = Bounds(schedule=("sun 22:00-06:00 max=1",))
    assert scaling_at(night, at(6, 23)).max_replicas == 1
    assert scaling_at(night, at(7, 5, 59)).max_replicas == 1
    assert scaling_at(night, at(7, 6)).max_replicas is None
    assert scaling_at(night, at(1, 5)).max_replicas is None


def test_a_range_of_days_may_go_over_the_end_of_the_week() -> None:
    long_weekend = Bounds(schedule=("fri-mon 00:00-24:00 min=1",))
    held = [scaling_at(long_weekend, at(day, 12)).min_replicas for day in range(7)]
    assert held == [1, 0, 0, 0, 1, 1, 1]


def test_what_a_window_leaves_out_stays_as_it_was_deployed() -> None:
    bounds = Bounds(1, 4, 8, ("daily 12:00-13:00 min=2 target=4",))
    assert scaling_at(bounds, at(2, 11)) == Scaling(1, 4, 8)
    assert scaling_at(bounds, at(2, 12)) == Scaling(2, 4, 4)


def test_the_servers_target_counts_for_models_without_one() -> None:
    assert scaling_at(Bounds(), at(0, 0), 6).target == 6
    assert scaling_at(Bounds(target=2), at(0, 0), 6).target == 2


def test_an_hour_that_summer_time_leaves_out_does_not_hold() -> None:
    early = Bounds(schedule=("sun 02:00-03:00 min=1",))
    day = datetime.datetime(2026, 3, 29, tzinfo=datetime.UTC)
    minutes = [day + datetime.timedelta(minutes=i) for i in range(4 * 60)]
    held = [scaling_at(early, minute.astimezone(BERLIN)).min_replicas for minute in minutes]
    assert sum(held) == 0


def test_an_hour_that_comes_twice_holds_twice() -> None:
    early = Bounds(schedule=("sun 02:00-03:00 min=1",))
    day = datetime.datetime(2026, 10, 25, tzinfo=datetime.UTC)
    minutes = [day + datetime.timedelta(minutes=i) for i in range(4 * 60)]
    held = [scaling_at(early, minute.astimezone(BERLIN)).min_replicas for minute in minutes]
    assert sum(held) == 120
    assert held == [1] * 120 + [0] * 120


def test_office_hours_follow_the_wall_over_a_change_of_time() -> None:
    for date in ((2026, 3, 27), (2026, 3, 30), (2026, 10, 23), (2026, 10, 26)):
        eight = datetime.datetime(*date, 8, tzinfo=BERLIN)
        before = (eight.astimezone(datetime.UTC) - datetime.timedelta(minutes=1)).astimezone(BERLIN)
        assert scaling_at(OFFICE, eight).min_replicas == 1
        assert scaling_at(OFFICE, before).min_replicas == 0


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("", "needs days"),
        ("mon 08:00-18:00", "needs days"),
        ("fun 08:00-18:00 min=1", "'fun' is no day"),
        ("mon- 08:00-18:00 min=1", "'mon-' is no day"),
        ("mon,,tue 08:00-18:00 min=1", "'' is no day"),
        ("mon 8-18 min=1", "'8-18' is no span"),
        ("mon 08:00-25:00 min=1", "00:00 to 24:00"),
        ("mon 08:60-09:00 min=1", "00:00 to 24:00"),
        ("mon 24:00-08:00 min=1", "00:00 to 24:00"),
        ("mon 08:00-08:00 min=1", "is empty"),
        ("mon 08:00-18:00 min=-1", "'min=-1' is no bound"),
        ("mon 08:00-18:00 min=1e9", "'min=1e9' is no bound"),
        ("mon 08:00-18:00 least=1", "'least=1' is no bound"),
        ("mon 08:00-18:00 min=1 min=2", "min is given twice"),
        ("mon 08:00-18:00 min=\u0661", "is no bound"),
    ],
)
def test_a_line_that_is_none_is_refused_with_what_is_wrong(line: str, says: str) -> None:
    with pytest.raises(InputError, match="^schedule .*" + says) as refused:
        check_bounds(Bounds(schedule=(line,)), 8)
    assert refused.value.param == "schedule"


@pytest.mark.parametrize(
    ("bounds", "field", "says"),
    [
        (Bounds(2, 1), "min_replicas", "min_replicas is 2, above max_replicas, which is 1"),
        (Bounds(min_replicas=-1), "min_replicas", "min_replicas is -1"),
        (Bounds(max_replicas=0), "max_replicas", "max_replicas is 0"),
        (Bounds(target=0), "target", "target is 0"),
        (Bounds(min_replicas=9), "min_replicas", "min_replicas is 9, above the 8 workers"),
        (
            Bounds(max_replicas=2, schedule=("mon 08:00-18:00 min=3",)),
            "schedule",
            "schedule 'mon 08:00-18:00 min=3': min_replicas is 3, above max_replicas",
        ),
        (Bounds(schedule=("mon 08:00-18:00 min=9",)), "schedule", "min_replicas is 9, above the 8"),
        (
            Bounds(schedule=("daily 08:00-18:00 min=1", "sun 17:59-24:00 min=2")),
            "schedule",
            "overlap and contradict each other on min",
        ),
        (
            Bounds(schedule=("sun 22:00-06:00 min=1", "mon 05:00-08:00 min=2")),
            "schedule",
            "overlap and contradict each other on min",
        ),
        (
            Bounds(schedule=("daily 08:00-18:00 min=3", "mon 09:00-10:00 max=2")),
            "schedule",
            "'daily 08:00-18:00 min=3' with 'mon 09:00-10:00 max=2': min_replicas is 3",
        ),
        (Bounds(schedule=("mon 08:00-18:00 min=1",) * 65), "schedule", "at most 64"),
    ],
)
def test_contradictory_bounds_are_refused_with_the_fields_name(
    bounds: Bounds, field: str, says: str
) -> None:
    with pytest.raises(InputError) as refused:
        check_bounds(bounds, 8)
    assert says in refused.value.message
    assert refused.value.param == field


def test_windows_that_only_touch_or_agree_are_no_contradiction() -> None:
    check_bounds(Bounds(schedule=("mon 08:00-12:00 min=1", "mon 12:00-18:00 min=2")), 8)
    check_bounds(Bounds(schedule=("mon-fri 08:00-18:00 min=1", "mon 09:00-10:00 min=1 max=2")), 8)


_days = st.lists(st.sampled_from([*NAMES, "mon-fri", "fri-mon"]), min_size=1)
_minutes = st.integers(0, 1439)


@given(_days, _minutes, _minutes, st.integers(0, 8), st.integers(0, 7 * 1440 - 1))
def test_a_line_holds_in_just_the_minutes_that_it_says(
    days: list[str], start: int, end: int, least: int, minute: int
) -> None:
    times = f"{start // 60:02}:{start % 60:02}-{end // 60:02}:{end % 60:02}"
    line = f"{','.join(days)} {times} min={least}"
    if start == end:
        with pytest.raises(InputError):
            parse_line(line)
        return
    window = parse_line(line)
    length = (end - start) % 1440
    chosen = {
        i
        for day in days
        for i in {"mon-fri": range(5), "fri-mon": (4, 5, 6, 0)}.get(day, (NAMES.index(day[:3]),))
    }
    expected = any((minute - day * 1440 - start) % (7 * 1440) < length for day in chosen)
    assert window.holds(minute) == expected
