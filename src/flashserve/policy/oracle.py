"""The bound that no policy can pass: one that knows every arrival."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence

from flashserve.policy import text
from flashserve.policy.plans import Facts, Plan, clamp, replicas_for_load
from flashserve.types import ModelId


class Oracle:
    """Starts each model just in time, and keeps it where the next request comes before that pays.

    A start that was due stays wanted until its request has come: predictions that get shorter
    meanwhile change nothing.

    Args:
        arrivals: of every model, ascending, in the controller's time.
        margin: starts so much earlier than predicted, as a share of the start.
    """

    name = "oracle"
    shares_slots = True

    def __init__(
        self,
        arrivals: Mapping[ModelId, Sequence[float]],
        margin: float = 0.25,
    ) -> None:
        self._arrivals = arrivals
        self._margin = margin
        self._start_at: dict[ModelId, tuple[float, float]] = {}
        """Of each model: a request, and when the start for it is due."""

    def arrived(self, model_id: ModelId, now: float) -> None:
        pass

    def forget(self, model_id: ModelId) -> None:
        self._start_at.pop(model_id, None)

    def plan(self, facts: Facts, now: float) -> Plan:
        wanted = replicas_for_load(facts)
        times = self._arrivals.get(facts.model_id, ())
        at = bisect.bisect_right(times, now)
        if at == len(times):
            return Plan(clamp(wanted, facts), 0.0, why="no further request")
        gap_s = times[at] - now
        lead_s = facts.restart_s * (1 + self._margin)
        # A start ahead costs the accelerator's time while it loads; keeping costs the whole gap.
        request_at, due_at = self._start_at.get(facts.model_id, (math.nan, math.inf))
        is_due = request_at == times[at] and now >= due_at
        if is_due or gap_s <= lead_s or (facts.num_replicas and gap_s <= facts.restart_s):
            reason = f"the next request comes in {text.seconds(gap_s)}"
            return Plan(clamp(max(wanted, 1), facts), 0.0, times[at] + 1e-3, 1 / gap_s, why=reason)
        start_at = times[at] - lead_s
        self._start_at[facts.model_id] = (times[at], start_at)
        reason = f"the next request comes in {text.seconds(gap_s)}, the start in time for it"
        return Plan(clamp(wanted, facts), 0.0, start_at, 1 / gap_s, why=reason)
