"""What another policy would have done with the same traffic, in a world without limits of room.

The shadow sees the events of the real world: arrivals, ends, forecasts, bounds. In its own world
each model has as many workers as its policy wants within its bounds, starts take what the estimates
say, and a request occupies a place for as long as it really ran. A request of which the real world
never ran anything, because it was refused for want of room, runs for the model's average.

It reads no clock and needs no timer: what became due is caught up with at the next event, each
thing at its own time.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from flashserve.config import PolicySettings
from flashserve.control.estimates import Estimates
from flashserve.control.shadowmodel import Ran, ShadowModel
from flashserve.control.usage import WorkerUsage
from flashserve.messages.commands import Command, Dispatch, Reject
from flashserve.messages.events import (
    BoundsChanged,
    Event,
    ForecastReady,
    ModelDeleted,
    ModelDeployed,
    NodeJoined,
    ReplicaReady,
    RequestArrived,
    RequestFinished,
    Staged,
)
from flashserve.policy import keepalive
from flashserve.policy.cost import UNMEASURED, Rates, WorkerState, startup_s
from flashserve.policy.plans import Facts, Policy, bounded, trusted
from flashserve.types import ModelId, ModelSpec, NodeId, RequestId, Tier

_MIN_REVIEW_S = 1.0
_DRAINED_AT_ONCE = 500
_NO_ROOM = frozenset({"queue_full", "deadline_exceeded"})
"""Refusals that a world without limits would not know."""


class Shadow:
    """Give `observe` every event with the commands that it caused, in order.

    Each costs logarithmic time, besides what has become due; memory follows the models and the
    requests under way.
    """

    def __init__(
        self, policy: Policy, settings: PolicySettings, slo_s: float, rates: Rates = UNMEASURED
    ) -> None:
        self.policy = policy
        self._settings = settings
        self._slo_s = slo_s
        self._estimates = Estimates(rates)
        self._models: dict[ModelId, ShadowModel] = {}
        self._requests: dict[RequestId, Ran] = {}
        self._active: dict[ModelId, ShadowModel] = {}
        """Those whose usage may have changed since the last drain."""
        self._gone: dict[ModelId, WorkerUsage] = {}
        self._ends: list[tuple[float, RequestId]] = []
        self._reviews: list[tuple[float, ModelId]] = []
        self._limit = 1
        self._node_id = NodeId("")

    def observe(self, event: Event, commands: Sequence[Command], now: float) -> None:
        self._catch_up(now)
        self._note_event(event, now)
        for command in commands:
            match command:
                case Dispatch():
                    if ran := self._requests.get(command.request_id):
                        ran.dispatched_at = now if ran.dispatched_at is None else ran.dispatched_at
                case Reject():
                    self._rejected(command, now)
                case _:
                    pass

    def drain(self, now: float) -> dict[ModelId, WorkerUsage]:
        """What each model took since the last time."""
        drained: dict[ModelId, WorkerUsage] = {}
        for part in self.drain_parts(lambda: now):
            for model_id, taken in part.items():
                if before := drained.get(model_id):
                    before.add(taken)
                else:
                    drained[model_id] = taken
        return drained

    def drain_parts(self, now: Callable[[], float]) -> Iterator[dict[ModelId, WorkerUsage]]:
        """The same, of some models at a time; events may be observed between two parts.

        now: the time that is to be counted up to, asked for each part.
        """
        self._catch_up(now())
        drained, self._gone = self._gone, {}
        yield drained
        active = list(self._active.values())
        for first in range(0, len(active), _DRAINED_AT_ONCE):
            at = now()
            self._catch_up(at)
            yield dict(self._taken(active[first : first + _DRAINED_AT_ONCE], at))

    def _taken(
        self, models: Iterable[ShadowModel], now: float
    ) -> Iterator[tuple[ModelId, WorkerUsage]]:
        for model in models:
            if self._active.get(model.model_id) is not model:
                continue  # deleted meanwhile
            model.settle(now)
            yield model.model_id, model.take_usage()
            if not model.is_active:
                del self._active[model.model_id]

    def _note_event(self, event: Event, now: float) -> None:
        match event:
            case RequestArrived():
                self._arrived(event, now)
            case RequestFinished():
                self._finished(event, now)
            case ModelDeployed():
                self._deployed(event.model, now)
            case ModelDeleted():
                self._deleted(event.model_id, now)
            case BoundsChanged():
                if model := self._models.get(event.model_id):
                    model.spec = dataclasses.replace(model.spec, scaling=event.scaling)
                    self._review(model, now)
            case ForecastReady():
                for forecast in event.forecasts:
                    if model := self._models.get(forecast.series):
                        model.hear(forecast)
                        self._review(model, now)
            case NodeJoined():
                self._limit = event.node.max_sequences
                self._node_id = event.node.node_id
            case ReplicaReady() | Staged():
                self._learn(event)
            case _:
                pass

    # Requests

    def _arrived(self, event: RequestArrived, now: float) -> None:
        model = self._models.get(event.model_id)
        if model is None or event.request_id in self._requests:
            return
        self.policy.arrived(model.model_id, now)
        model.request_came(now)
        ran = self._requests[event.request_id] = Ran(event.request_id, model, now)
        self._active[model.model_id] = model
        model.settle(now)
        if not model.num_waiting and model.running < model.ready * self._limit:
            model.begin(ran, now)
            if model.running > model.serving * self._target(model):
                self._review(model, now)
        else:
            model.wait(ran)
            self._review(model, now)

    def _finished(self, event: RequestFinished, now: float) -> None:
        ran = self._requests.get(event.request_id)
        if ran is None or ran.service_s is not None:
            return
        if ran.dispatched_at is None:
            self._forget(ran, now)  # its client left before anything ran
            return
        ran.service_s = now - ran.dispatched_at
        if event.prefill_s is not None:
            self._estimates.observe_run(ran.model.model_id, event.prefill_s, ran.service_s)
        self._known_end(ran, now)

    def _rejected(self, command: Reject, now: float) -> None:
        ran = self._requests.get(command.request_id)
        if ran is None or ran.service_s is not None:
            return
        if ran.dispatched_at is None and command.code in _NO_ROOM:
            ran.service_s = self._estimates.run_s(ran.model.model_id)
            self._known_end(ran, now)
        elif ran.dispatched_at is None:
            self._forget(ran, now)

    def _known_end(self, ran: Ran, now: float) -> None:
        """How long the request runs is known from now on."""
        if ran.began_at is None or ran.service_s is None:
            return  # its end follows when it begins
        end = ran.began_at + ran.service_s
        if end >= now:
            heapq.heappush(self._ends, (end, ran.request_id))
        else:
            self._end(ran, now, end)

    def _end(self, ran: Ran, now: float, ended_at: float) -> None:
        """The request has left its place, at `ended_at`, which may come to light only now."""
        del self._requests[ran.request_id]
        model = ran.model
        model.settle(now)
        model.end(ended_at)
        self._serve_waiting(model, now, is_cold=False)
        if model.running < model.serving:
            self._review(model, now)

    def _forget(self, ran: Ran, now: float) -> None:
        """It counts no more, whether it waits or runs."""
        if ran.began_at is not None:
            self._end(ran, now, now)
            return
        del self._requests[ran.request_id]
        ran.model.leave(ran)

    def _serve_waiting(self, model: ShadowModel, now: float, *, is_cold: bool) -> None:
        while model.running < model.ready * self._limit and (ran := model.next_waiting()):
            model.begin(ran, now)
            if is_cold:
                model.usage.count_cold(now - ran.arrived_at, self._slo_s)
            self._known_end(ran, now)

    # Models

    def _deployed(self, spec: ModelSpec, now: float) -> None:
        model = self._models.get(spec.model_id)
        if model is None:
            model = self._models[spec.model_id] = ShadowModel(spec, now)
        elif model.spec.source != spec.source:
            model.settle(now)
            model.drop_idle()
            model.has_bytes = False
        model.spec = spec
        self._review(model, now)

    def _deleted(self, model_id: ModelId, now: float) -> None:
        model = self._models.pop(model_id, None)
        if model is None:
            return
        model.settle(now)
        self._gone.setdefault(model_id, WorkerUsage()).add(model.take_usage())
        self._active.pop(model_id, None)
        while ran := model.next_waiting():
            del self._requests[ran.request_id]
        model.is_deleted = True
        self.policy.forget(model_id)
        self._estimates.forget(model_id)

    def _learn(self, event: ReplicaReady | Staged) -> None:
        model = self._models.get(event.model_id)
        if isinstance(event, Staged):
            estimates = self._estimates
            estimates.observe_staged(event.node_id, event.tier, event.num_bytes, event.seconds)
        elif model is not None:
            phases = msgspec.structs.replace(event.phases, place_s=0.0)  # of no interest here
            self._estimates.observe_start(
                event.node_id, model.model_id, model.spec.size_bytes, WorkerState.SPARE, phases
            )

    def _review(self, model: ShadowModel, now: float) -> None:
        """Ask the policy, start what it wants and stop what it does not."""
        if model.is_deleted:
            return
        model.settle(now)
        facts = self._facts(model)
        plan = trusted(self.policy.plan(facts, now), facts, now)
        kept = plan.replicas
        missing = max(kept, 1 if model.num_waiting else 0) - model.serving
        if missing > 0:
            model.start(missing, now + facts.restart_s)
        model.stop_idle(kept, plan.keep_idle_s, now)
        if model.is_active:
            self._active[model.model_id] = model
        due = max(now + _MIN_REVIEW_S, plan.review_at)
        if model.serving > kept:
            due = min(due, keepalive.expires_at(model.idle_since, plan.keep_idle_s))
        self._schedule(model, min(due, model.loaded_at))

    def _schedule(self, model: ShadowModel, due: float) -> None:
        model.due = due
        if due < model.scheduled:
            model.scheduled = due
            heapq.heappush(self._reviews, (due, model.model_id))

    def _catch_up(self, now: float) -> None:
        """Do what has become due, in order of time."""
        while True:
            end = self._ends[0][0] if self._ends else float("inf")
            review = self._reviews[0][0] if self._reviews else float("inf")
            if min(end, review) > now:
                return
            if end <= review:
                when, request_id = heapq.heappop(self._ends)
                if ran := self._requests.get(request_id):
                    self._end(ran, when, when)
            else:
                self._due(*heapq.heappop(self._reviews))

    def _due(self, when: float, model_id: ModelId) -> None:
        model = self._models.get(model_id)
        if model is None or when != model.scheduled:
            return
        model.scheduled = float("inf")
        if model.due > when:  # it has moved back since
            model.scheduled = model.due
            heapq.heappush(self._reviews, (model.due, model_id))
            return
        model.settle(when)
        if model.load(when):
            self._serve_waiting(model, when, is_cold=True)
        self._review(model, when)

    def _facts(self, model: ShadowModel) -> Facts:
        spec = model.spec
        tier = Tier.DRAM if model.has_bytes else spec.lowest_tier
        costs = self._estimates.costs(self._node_id, spec.model_id, WorkerState.SPARE)
        return Facts(
            spec.model_id,
            spec.size_bytes,
            tier,
            startup_s(spec.size_bytes, tier, costs),
            self._estimates.prefill_s(spec.model_id),
            self._estimates.run_s(spec.model_id),
            self._limit,
            model.serving,
            model.running,
            model.num_waiting,
            model.all_idle_since,
            model.last_arrival_at,
            model.unseen_since,
            keepalive.keep_alive_s(spec, self._settings.keep_alive_s),
            spec.keep_alive_s is not None,
            bounded(spec.scaling, self._settings.max_replicas),
            model.forecast,
        )

    def _target(self, model: ShadowModel) -> int:
        return model.spec.scaling.target or self._limit
