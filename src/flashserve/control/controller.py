"""The whole control plane: one event in, the commands that it causes out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import assert_never

from flashserve.config import PolicySettings
from flashserve.control import membership, memory, replicas, requests, scaling, slots
from flashserve.control.records import Model, Status
from flashserve.control.state import State
from flashserve.control.timers import Timer, TimerKind
from flashserve.errors import ModelNotFoundError
from flashserve.messages.commands import Command
from flashserve.messages.events import (
    BoundsChanged,
    DrainStarted,
    Event,
    Evicted,
    EvictRequested,
    ForecastReady,
    ModelDeleted,
    ModelDeployed,
    NodeJoined,
    NodeLost,
    ReplicaFailed,
    ReplicaLost,
    ReplicaReady,
    ReplicaStopped,
    RequestArrived,
    RequestFinished,
    Staged,
    StageFailed,
    StageRequested,
    Tick,
    WorkersChanged,
)
from flashserve.policy.baselines import FixedKeepAlive
from flashserve.policy.cost import UNMEASURED, Prices, Rates
from flashserve.policy.plans import Policy
from flashserve.types import ModelId, NodeId, ReplicaId, RequestId, Tier

_MAX_TIMERS = 8
"""Acted on in one Tick, so that none is long; the next one is due at once."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelView:
    """A model as `ps` shows it. state: cold, loading, ready, draining or failed."""

    model_id: ModelId
    state: str
    tier: Tier
    num_replicas: int
    in_flight: int
    waiting: int
    dram_bytes: int
    last_used_at: float | None
    reason: str
    """Of the last decision about it."""
    wanted_replicas: int = 0
    """By the policy's last plan."""
    plan: str = ""
    """The policy's reason for that."""


class Controller:
    """Reads no clock, opens no socket, draws no number; its drivers are `live` and `sim`.

    What is ignored, because it is repeated or out of date: a request id that is known; the end
    of one that is not; reports about replicas that are not known, or of another node; `Staged`
    between an Evict and its answer; a join with an epoch that is not new; a loss with another
    epoch than the node's; anything about models that are not deployed, save RequestArrived, which
    is always answered. Events of an earlier epoch that carry none are for the driver to drop.

    Args:
        rates: what the tiers were measured to give; predictions start from them.
        policy: how many replicas each model has, and until when; None: fixed keep-alives.
        prices: what bytes in DRAM are weighed with.
        weights: of tenants, for their shares; others have 1.
    """

    def __init__(
        self,
        settings: PolicySettings,
        rates: Rates = UNMEASURED,
        policy: Policy | None = None,
        prices: Prices | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self._state = State(
            settings, rates, policy or FixedKeepAlive(), prices or Prices(), weights or {}
        )

    def handle(self, event: Event, now: float) -> list[Command]:
        """Apply one event at time `now` (seconds) and return the commands it causes, in order."""
        state = self._state
        commands = self._apply(event, now)
        if state.unplanned:
            commands += scaling.settle(state, now, before_starts=True)
        if state.line.models or state.line.lapsed:
            commands += slots.fill(state, now)
        if state.unplanned:
            commands += scaling.settle(state, now)
        if state.short or state.reviewed or state.can_stage:
            commands += scaling.act_ahead(state, now)
        if state.unheld:
            commands += requests.hold_new(state, now)
        return commands

    def _apply(self, event: Event, now: float) -> list[Command]:  # noqa: C901, PLR0911, PLR0912 - one line per event
        state = self._state
        match event:  # the most frequent ones first
            case RequestArrived():
                return requests.arrive(state, event, now)
            case RequestFinished():
                return requests.finish(state, event, now)
            case ReplicaReady():
                return replicas.ready(state, event, now)
            case ReplicaStopped():
                return replicas.stopped(state, event, now)
            case Staged():
                return memory.staged(state, event, now)
            case ForecastReady():
                return scaling.forecast_ready(state, event)
            case Tick():
                return self._tick(now)
            case ReplicaFailed():
                return replicas.failed(state, event, now)
            case ReplicaLost():
                return replicas.lost(state, event, now)
            case StageFailed():
                return memory.stage_failed(state, event, now)
            case Evicted():
                return memory.evicted(state, event)
            case StageRequested():
                return memory.stage_requested(state, event, now)
            case EvictRequested():
                return memory.evict_requested(state, event, now)
            case ModelDeployed():
                return membership.deployed(state, event, now)
            case ModelDeleted():
                return membership.deleted(state, event, now)
            case NodeJoined():
                return membership.joined(state, event, now)
            case NodeLost():
                return membership.node_lost(state, event, now)
            case WorkersChanged():
                return membership.workers_changed(state, event)
            case BoundsChanged():
                return scaling.bounds_changed(state, event)
            case DrainStarted():
                return membership.drain_started(state)
            case _:
                assert_never(event)

    def _tick(self, now: float) -> list[Command]:
        commands: list[Command] = []
        for timer in self._state.timers.pop_due(now, _MAX_TIMERS):
            commands += self._act_on(timer, now)
        return commands

    def _act_on(self, timer: Timer, now: float) -> list[Command]:  # noqa: PLR0911 - one per kind
        state = self._state
        match timer.kind:
            case TimerKind.DEADLINE:
                return requests.deadline_passed(state, RequestId(timer.key), now)
            case TimerKind.KEEP_ALIVE:
                return replicas.keep_alive_over(state, ReplicaId(timer.key), now)
            case TimerKind.PATIENCE:
                return slots.lose_patience(state, state.models[ModelId(timer.key)], now)
            case TimerKind.RETRY:
                state.line.end_shunning(state.line.shunning[ModelId(timer.key)])
                return []
            case TimerKind.BACKOFF:
                model = state.models[ModelId(timer.key)]
                model.failure = None
                state.unplanned[model.model_id] = model
                return []
            case TimerKind.FILL:
                state.fill_at = None
                return []
            case TimerKind.REVIEW:
                scaling.review_due(state, state.models[ModelId(timer.key)], now)
                return []
            case _:
                assert_never(timer.kind)

    def next_wakeup(self, until: float = math.inf) -> float | None:
        """The earliest time at which a Tick would do something; None while nothing is due.

        After a Tick that time may have come already: what is due at once is done in several.

        Args:
            until: nobody asks about later times, which saves most of the work.
        """
        return self._state.timers.next_due(until)

    @property
    def num_in_flight(self) -> int:
        """Requests that are dispatched and not finished."""
        return self._state.num_running

    @property
    def num_waiting(self) -> int:
        return len(self._state.requests) - self._state.num_running

    def nodes_of(self, model_id: ModelId) -> frozenset[NodeId]:
        """The nodes that have a replica of a model, or its bytes in DRAM."""
        model = self._state.find(model_id)
        if model is None:
            return frozenset()
        return frozenset(memory.holders(model, Tier.DRAM))

    def model_view(self, model_id: ModelId) -> ModelView:
        """How a deployed model stands.

        Raises:
            ModelNotFoundError: it is not deployed.
        """
        model = self._state.find(model_id)
        if model is None:
            raise ModelNotFoundError(f"no model named {model_id} is deployed")
        held = [self._state.nodes[node_id].resident[model_id] for node_id in model.dram_nodes]
        return ModelView(
            model_id,
            _state_name(model),
            self._state.tier(model),
            len(model.replicas),
            model.num_running,
            len(model.waiting),
            sum(resident.num_bytes for resident in held if resident.is_loaded),
            model.last_used_at,
            model.reason,
            model.plan.replicas,
            model.plan.reason,
        )


def _state_name(model: Model) -> str:
    """The best of its replicas' states; without any, whether the last start failed."""
    found = {replica.status for replica in model.replicas.values()}
    for status in (Status.READY, Status.STARTING, Status.DRAINING):
        if status in found:
            return str(status.value)
    return "failed" if model.failure else "cold"
