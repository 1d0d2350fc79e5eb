from __future__ import annotations

import datetime

from flashserve.config import ScalingSettings
from flashserve.live.bounds import BoundsClock
from flashserve.policy.schedules import Bounds
from flashserve.types import Scaling

OFFICE = Bounds(schedule=("mon-fri 08:00-18:00 min=1",))
MONDAY = datetime.datetime(2026, 11, 23, tzinfo=datetime.UTC).timestamp()
HOUR_S = 3600.0


def test_schedules_are_in_the_time_zone_of_the_settings() -> None:
    seven = MONDAY + 7 * HOUR_S
    in_utc = BoundsClock(ScalingSettings(timezone="UTC"), lambda: seven)
    in_berlin = BoundsClock(ScalingSettings(timezone="Europe/Berlin"), lambda: seven)
    assert in_utc.scaling(OFFICE) == Scaling()
    assert in_berlin.scaling(OFFICE) == Scaling(min_replicas=1)


def test_a_set_clock_counts_from_the_next_look() -> None:
    times = [MONDAY + 9 * HOUR_S, MONDAY - 24 * HOUR_S, MONDAY + 10 * HOUR_S]
    clock = BoundsClock(ScalingSettings(timezone="UTC"), iter(times).__next__)
    held = [clock.scaling(OFFICE).min_replicas for _ in times]
    assert held == [1, 0, 1]


def test_the_next_look_is_just_after_the_minute_begins() -> None:
    clock = BoundsClock(ScalingSettings(timezone="UTC"), lambda: MONDAY + 12.5)
    assert 47.5 < clock.minute_left_s < 47.6
