"""What a scaling policy is told of a model, and what it answers: the seam between both.

A policy is asked (`plan`) when something has changed that it may answer differently: a replica fell
idle or left, requests began to wait, a forecast came, the model was deployed or its bounds changed,
or the time that its last plan named has come. What it learns it keeps to itself; it reads no clock
and draws no number, so one history gives one sequence of plans, live and simulated.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Protocol

import msgspec

from flashserve.policy.hazards import Hazards
from flashserve.types import ModelId, Scaling, Tier


class Facts(msgspec.Struct, frozen=True):
    """A model at the moment of the question.

    tier: where its bytes are nearest, replicas apart; restart_s: what a start from there would
    take; prefill_s: from dispatch to first token; run_s: how long a request occupies its place;
    limit: requests that one replica takes at once; num_replicas: starting and ready ones;
    idle_since: since when none of them has had work, None while one has or there is none;
    unseen_since: when the first request came that the forecast does not know of, None when it
    knows all.
    """

    model_id: ModelId
    size_bytes: int
    tier: Tier
    restart_s: float
    prefill_s: float
    run_s: float
    limit: int
    num_replicas: int
    in_flight: int
    waiting: int
    idle_since: float | None
    last_arrival_at: float | None
    unseen_since: float | None
    keep_alive_s: float
    """The model's own, or the server's."""
    has_own_keep_alive: bool
    scaling: Scaling
    """max_replicas is never None here, and at least min_replicas."""
    forecast: Hazards | None = None
    """The newest that came, however old."""

    @property
    def max_replicas(self) -> int:
        assert self.scaling.max_replicas is not None
        return self.scaling.max_replicas


class Plan(msgspec.Struct, frozen=True):
    """What the model deserves.

    replicas: wanted now. More than there are means a start ahead of requests, where there is room
    or where it is worth more than what would give way; requests that wait get their replica in any
    case. keep_idle_s: replicas beyond the wanted number stop when they have been idle for so long.
    review_at: when to ask again at the latest. rate_per_s: starts that are to be expected per
    second, which ranks the model's bytes and idle replicas among others'; None leaves that to how
    recently it was used. heed_first, heed_last: while the model has no replica, a forecast whose
    chance within its first lead is below the one changes no replicas, and one whose chance within
    its last lead is below the other no tier, so that nobody need be asked. outlives_replicas: asked
    again once the last of them has stopped, the policy would decide the same.
    """

    replicas: int
    keep_idle_s: float
    review_at: float = math.inf
    rate_per_s: float | None = None
    heed_first: float = 0.0
    heed_last: float = 0.0
    outlives_replicas: bool = False
    why: object = ""
    """What `str` puts into words: few plans are ever read about."""

    @property
    def reason(self) -> str:
        """For people."""
        return str(self.why)


class Policy(Protocol):
    """Decides how many replicas each model has, and until when.

    name: what reports call it. shares_slots: whether an idle replica gives way to a request of
    another model before its time is over.
    """

    name: str
    shares_slots: bool

    def arrived(self, model_id: ModelId, now: float) -> None:
        """A request for the model has arrived. Called for each, so it must cost next to nothing."""

    def plan(self, facts: Facts, now: float) -> Plan: ...

    def forget(self, model_id: ModelId) -> None:
        """The model was deleted."""


@functools.lru_cache(maxsize=1024)
def bounded(scaling: Scaling, max_replicas: int) -> Scaling:
    """A model's bounds, with the server's max_replicas where it has none of its own."""
    most = scaling.max_replicas or max_replicas
    return dataclasses.replace(scaling, max_replicas=max(most, scaling.min_replicas))


_SOONEST_S = 1e-3
_MIN_REVIEW_S = 1.0
"""A plan that names a time which is over, or all but, is asked for again after so long."""


def trusted(plan: Plan, facts: Facts, now: float) -> Plan:
    """The plan, with what cannot be meant put right, so that no policy does more than its share.

    Replicas come within the model's bounds, an idle time that is no number from 0 becomes the
    model's keep-alive, a review that is due already (or is no time) comes in a moment, and a rate
    that is none is left out.
    """
    replicas, keep_idle_s = plan.replicas, plan.keep_idle_s
    review_at, rate_per_s = plan.review_at, plan.rate_per_s
    is_kept_for_long = keep_idle_s >= 0  # NaN is not
    is_ahead = review_at >= now + _SOONEST_S  # NaN is not
    is_rate = rate_per_s is None or 0 <= rate_per_s < math.inf
    within = clamp(replicas, facts)
    if within == replicas and is_kept_for_long and is_ahead and is_rate:
        return plan
    return msgspec.structs.replace(
        plan,
        replicas=within,
        keep_idle_s=keep_idle_s if is_kept_for_long else facts.keep_alive_s,
        review_at=review_at if is_ahead else now + _MIN_REVIEW_S,
        rate_per_s=rate_per_s if is_rate else None,
    )


def clamp(replicas: float, facts: Facts) -> int:
    """Within the model's bounds; what is no number is their least."""
    scaling = facts.scaling
    most = scaling.max_replicas
    assert most is not None
    if replicas > scaling.min_replicas:
        return int(replicas) if replicas < most else most
    return scaling.min_replicas


def replicas_for_load(facts: Facts) -> int:
    """Replicas that the requests which run and wait now need, each taking its target at once."""
    num_requests = facts.in_flight + facts.waiting
    if not num_requests:
        return 0
    each = facts.scaling.target or facts.limit
    return -(-num_requests // max(each, 1))
