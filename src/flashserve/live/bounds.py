"""What the bounds of deployed models mean at this moment, in the server's time zone."""

from __future__ import annotations

import asyncio
import datetime
import time
import zoneinfo
from collections.abc import Callable

from flashserve.config import LOCAL_TIME, ScalingSettings
from flashserve.policy.schedules import Bounds, scaling_at
from flashserve.types import Scaling

_MINUTE_S = 60.0
_MARGIN_S = 0.01
"""A sleep may end a little early, by the wall clock."""


class BoundsClock:
    """Knows the local time. A set clock or a change of zone counts from the next look."""

    def __init__(
        self, settings: ScalingSettings, unix_time: Callable[[], float] = time.time
    ) -> None:
        self._target = settings.target
        self._zone: datetime.tzinfo | None = None
        if settings.timezone != LOCAL_TIME:
            self._zone = zoneinfo.ZoneInfo(settings.timezone)
        self._unix_time = unix_time

    def scaling(self, bounds: Bounds) -> Scaling:
        """What holds now."""
        now = datetime.datetime.fromtimestamp(self._unix_time(), datetime.UTC)
        return scaling_at(bounds, now.astimezone(self._zone), self._target)

    @property
    def minute_left_s(self) -> float:
        """Until the next minute begins: schedules begin and end with one."""
        return _MINUTE_S - self._unix_time() % _MINUTE_S + _MARGIN_S


async def follow(clock: BoundsClock, review: Callable[[], None]) -> None:
    """Call `review` as each minute begins, until cancelled."""
    while True:
        await asyncio.sleep(clock.minute_left_s)
        review()
