"""A forecast as decisions read it: checked once, as hazards, which add up over time."""

from __future__ import annotations

import bisect
import math
import operator
import statistics
from collections.abc import Sequence

from flashserve.types import SeriesForecast

_MAX_P = 1 - 1e-9
_MAX_HAZARD = -math.log1p(-_MAX_P)
_MIN_LEFT_S = 60.0
_NEAR_S = 120.0
"""Two forecasts' time: what moves on the first of them is there by the second."""
_FAR_SHARE = 0.1
"""Of the rate, from the mean over all leads."""
_NORMAL = statistics.NormalDist()
_UPPER_SCORE = _NORMAL.inv_cdf(0.9)
"""Of the level of SeriesForecast.upper."""


class Hazards:
    """Made of a forecast for next to nothing; checked and computed when it is first read.

    Only `is_sound` may be asked of one that is not sound.
    """

    __slots__ = ("_by_lead", "_is_sound", "leads_s", "made_at", "said")

    def __init__(self, said: SeriesForecast) -> None:
        self.said = said
        self.made_at = said.made_at
        self.leads_s = said.leads_s
        self._is_sound: bool | None = None
        self._by_lead: list[float] = []

    @property
    def is_sound(self) -> bool:
        """Leads that ascend, and numbers that a distribution can have."""
        if self._is_sound is None:
            self._is_sound = _is_sound(self.said)
            if self._is_sound:
                self._by_lead = _hazards(self.said.p_arrival)
                if self._by_lead[-1] >= _MAX_HAZARD:
                    self._by_lead = _gone_on(self.leads_s, self._by_lead)
        return self._is_sound

    def chance(self, now: float, lead_s: float) -> float:
        """P(arrival in [now, now + lead_s]), given that nothing came since it was made."""
        assert self._is_sound or self.is_sound
        leads_s, by_lead = self.leads_s, self._by_lead
        age_s = max(now - self.made_at, 0.0)
        until_then = at_lead(leads_s, by_lead, age_s + lead_s)
        return 0.0 - math.expm1(at_lead(leads_s, by_lead, age_s) - until_then)  # never "-0"

    def rate(self, now: float) -> float:
        """Starts to expect per second: the mean hazard of the near future, mostly.

        What is not needed soon can come back before it is, so the next minutes rank it; a small
        part of the mean over all leads ranks what they say nothing of. That is not the rate of
        requests: a burst needs one start.
        """
        assert self._is_sound or self.is_sound
        leads_s, by_lead = self.leads_s, self._by_lead
        age_s = now - self.made_at if now > self.made_at else 0.0
        left_s = leads_s[-1] - age_s
        left_s = max(left_s, _MIN_LEFT_S)
        near_s = min(left_s, _NEAR_S)
        until_now = at_lead(leads_s, by_lead, age_s)
        near = at_lead(leads_s, by_lead, age_s + near_s) - until_now
        far = at_lead(leads_s, by_lead, age_s + left_s) - until_now
        near = min(_MAX_HAZARD, near) / near_s
        far = min(_MAX_HAZARD, far) / left_s
        return near + _FAR_SHARE * (far - near)

    def count(self, lead_s: float, level: float) -> float:
        """The number within a lead that is not exceeded with probability `level`.

        From the mean and the 90 % quantile as those of a normal distribution; levels are taken as
        within [0.01, 0.99], beyond which two numbers say nothing of a distribution.
        """
        score = _NORMAL.inv_cdf(min(max(level, 0.01), 0.99))
        mean = at_lead(self.leads_s, self.said.mean, lead_s)
        upper = max(at_lead(self.leads_s, self.said.upper, lead_s), mean)
        return max(mean + score / _UPPER_SCORE * (upper - mean), 0.0)


def _gone_on(leads_s: Sequence[float], by_lead: Sequence[float]) -> list[float]:
    """What was certain says nothing of the time after it: the hazard goes on as until then."""
    gone_on = [by_lead[0]]
    for index in range(1, len(leads_s)):
        same = gone_on[-1] * leads_s[index] / leads_s[index - 1]
        said = by_lead[index]
        gone_on.append(max(same, said) if said >= _MAX_HAZARD else said)
    return gone_on


def hazard(p: float) -> float:
    """Of which something comes with the chance p; finite even where that is 1."""
    return -math.log1p(-min(p, _MAX_P))


def _hazards(chances: Sequence[float]) -> list[float]:
    """`hazard` of each, without a call."""
    if max(chances) > _MAX_P:
        chances = [min(p, _MAX_P) for p in chances]
    return [-math.log1p(-p) for p in chances]


def at_lead(leads_s: Sequence[float], values: Sequence[float], at: float) -> float:
    """Linear between the leads and from zero at lead 0; at the last slope beyond them."""
    if at <= leads_s[0]:
        return values[0] * at / leads_s[0]
    right = bisect.bisect_left(leads_s, at, 0, len(leads_s) - 1)
    if not right:
        return values[0] * at / leads_s[0]
    left_s, left = leads_s[right - 1], values[right - 1]
    return left + (values[right] - left) * (at - left_s) / (leads_s[right] - left_s)


def _is_sound(said: SeriesForecast) -> bool:
    num = len(said.leads_s)
    if not num or not len(said.p_arrival) == len(said.mean) == len(said.upper) == num:
        return False
    leads = said.leads_s
    if not (leads[0] > 0 and all(map(operator.lt, leads, leads[1:]))):
        return False
    chances, mean, upper = said.p_arrival, said.mean, said.upper
    return (
        math.isfinite(leads[-1])
        and math.isfinite(said.made_at)
        and (
            math.isfinite(sum(chances) + sum(mean) + sum(upper))  # then each of them is
            or all(map(math.isfinite, (*chances, *mean, *upper)))
        )
        and min(chances) >= 0
        and max(chances) <= 1
        and min(mean) >= 0
        and min(upper) >= 0
    )
