"""What a scaling policy is told of a model, and what it answers: the seam between both.

A policy is asked (`plan`) when something has changed that it may answer differently: a replica fell
idle, requests began to wait, a forecast came, the model was deployed or its bounds changed, or the
time that its last plan named has come. It keeps what it learns to itself, reads no clock and draws
no number, so one history gives one sequence of plans, live and simulated.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

from flashserve.types import ModelId, Scaling, SeriesForecast, Tier


@dataclasses.dataclass(frozen=True, slots=True)
class Facts:
    """A model at the moment of the question.

    restart_s: what a start would take now, from the tier where the bytes are; run_s: how long one
    request occupies its place; limit: requests that one replica takes at once; idle_since: since
    when none of its ready replicas has had work, None while one has or there is none.
    """

    model_id: ModelId
    size_bytes: int
    tier: Tier
    restart_s: float
    run_s: float
    limit: int
    num_replicas: int
    in_flight: int
    waiting: int
    idle_since: float | None
    last_arrival_at: float | None
    keep_alive_s: float
    """The model's own, or the server's."""
    scaling: Scaling
    forecast: SeriesForecast | None = None
    """None without one, and when the last one is too old to be trusted."""


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What the model deserves.

    replicas: wanted now. More than there are means a start ahead of requests where there is room;
    it never takes a worker from a model with requests. keep_until: when idle replicas beyond the
    wanted number stop. start_at: when to ask again because a start may be due, with no other
    event. tier: where the bytes should be at least (DISK lets them leave DRAM first).
    value: seconds of waiting that having the bytes in DRAM saves in the forecast's horizon, for
    ranking models under a byte budget; None leaves that to recency.
    """

    replicas: int
    keep_until: float
    start_at: float = math.inf
    tier: Tier = Tier.DRAM
    value: float | None = None
    reason: str = ""


class Policy(Protocol):
    """Decides how many replicas each model has, and until when. `name` is what reports call it."""

    name: str

    def arrived(self, model_id: ModelId, now: float) -> None:
        """A request for the model has arrived. Called for each, so it must cost next to nothing."""

    def plan(self, facts: Facts, now: float) -> Plan: ...

    def forget(self, model_id: ModelId) -> None:
        """The model was deleted."""
