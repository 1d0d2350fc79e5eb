"""How many replicas each model is to have: the policy is asked, and its plans are carried out.

State notes models whose facts changed (`unplanned`); at the end of an event each is reviewed once.
What a plan wants beyond what there is stands in `short` and starts where there is room, or where
what gives way is worth clearly less. Requests that wait come first: while any model stands in line,
nothing starts ahead.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from itertools import islice

import msgspec

from flashserve.control import orders, room, slots, staging
from flashserve.control.records import DRAINING, READY, Model, Node
from flashserve.control.state import State
from flashserve.messages.commands import Command
from flashserve.messages.events import BoundsChanged, ForecastReady
from flashserve.policy import keepalive
from flashserve.policy.placement import place
from flashserve.policy.plans import Facts, trusted

_NUM_TRIES = 2
"""Starts ahead that are tried in one event; the others' turn comes with the next ones."""
_RETRY_S = 15.0
"""After a start ahead that found no room, the model's next one is tried so much later."""


def forecast_ready(state: State, event: ForecastReady) -> list[Command]:
    """Series that are no deployed model's (an adapter's, or one just deleted) change nothing."""
    models = state.models
    for forecast in event.forecasts:
        model = models.get(forecast.series)
        if model is not None and not model.is_deleted:
            model.hear(forecast)
            if _may_matter(model, forecast.p_arrival):
                state.unplanned[model.model_id] = model
    return []


def _may_matter(model: Model, chances: Sequence[float]) -> bool:
    """Whether the plan could change. Most models are quiet mostly, and cost a comparison."""
    if model.replicas or model.waiting or model.spec.scaling.min_replicas:
        return True
    plan = model.plan
    if not chances or not chances[0] < plan.heed_first:
        return True
    return not (model.dram_nodes or chances[-1] < plan.heed_last)


def bounds_changed(state: State, event: BoundsChanged) -> list[Command]:
    if model := state.find(event.model_id):
        model.spec = dataclasses.replace(model.spec, scaling=event.scaling)
        state.unplanned[model.model_id] = model
    return []


def review_due(state: State, model: Model, now: float) -> None:
    """The time that a plan named has come, or a start ahead may be tried again."""
    if model.no_start_before <= now:
        model.no_start_before = 0.0
    model.room_seen = -1
    state.unplanned[model.model_id] = model


def settle(state: State, now: float, *, before_starts: bool = False) -> list[Command]:
    """Review every model whose facts changed in this event, and stop what no plan wants.

    before_starts: models that stand in line and have nothing to stop are left for after them.
    """
    commands: list[Command] = []
    put_off: list[Model] = []
    while state.unplanned:
        model_id = next(iter(state.unplanned))
        model = state.unplanned.pop(model_id)
        if model.is_deleted or state.models.get(model_id) is not model:
            continue
        if before_starts and not model.replicas and model_id in state.line.models:
            put_off.append(model)
        else:
            commands += _review(state, model, now)
    for model in put_off:
        state.unplanned[model.model_id] = model
    return commands


def _review(state: State, model: Model, now: float) -> list[Command]:
    facts = _facts(state, model)
    plan = model.plan = trusted(state.policy.plan(facts, now), facts, now)
    model.scale_out_at = _scale_out_at(facts) if facts.num_replicas else math.inf
    commands: list[Command] = []
    if model.replicas:
        _keep_minimum(state, model)
        commands = _stop_surplus(state, model, now)
        if commands and plan.outlives_replicas and not model.replicas:
            state.unplanned.pop(model.model_id, None)
            model.scale_out_at = math.inf
    serving = model.num_serving
    wanted = model.spec.scaling.min_replicas if model.is_dismissed else plan.replicas
    stands_in_line = not serving and bool(model.waiting)
    is_short = serving < wanted and not stands_in_line and not state.is_draining
    state.set_short(model, is_short, now)
    if plan.review_at < math.inf or model.no_start_before > 0:
        state.watch_review(model)
    if plan.rate_per_s is not None and not model.dram_nodes:
        state.reviewed[model.model_id] = model
    return commands


def _facts(state: State, model: Model) -> Facts:
    spec, model_id, estimates = model.spec, model.model_id, state.estimates
    node_id, tier = state.nearest(model)
    in_flight, idle_since = _load(model) if model.replicas else (0, None)
    return Facts(
        model_id,
        spec.size_bytes,
        tier,
        estimates.startup_s(node_id, model_id, spec.size_bytes, tier),
        estimates.prefill_s(model_id),
        estimates.run_s(model_id),
        state.max_sequences,
        model.num_serving,
        in_flight,
        len(model.waiting),
        idle_since,
        model.last_arrival_at,
        model.unseen_since,
        keepalive.keep_alive_s(spec, state.settings.keep_alive_s),
        spec.keep_alive_s is not None,
        state.bounds(model),
        model.forecast,
    )


def _load(model: Model) -> tuple[int, float | None]:
    """What runs on replicas that do not drain, and since when none of them has had work."""
    in_flight, idle_since = 0, -math.inf
    for replica in model.replicas.values():
        if replica.status is DRAINING:
            continue
        if replica.in_flight or replica.status is not READY:
            in_flight += len(replica.in_flight)
            idle_since = math.inf
        elif replica.changed_at > idle_since:
            idle_since = replica.changed_at
    return in_flight, idle_since if -math.inf < idle_since < math.inf else None


def _scale_out_at(facts: Facts) -> float:
    """With more requests than this, the policy is asked for another replica beside those there."""
    scaling, num_replicas = facts.scaling, facts.num_replicas
    assert scaling.max_replicas is not None
    if num_replicas >= scaling.max_replicas:
        return math.inf
    return num_replicas * (scaling.target or facts.limit)


def _keep_minimum(state: State, model: Model) -> None:
    """As many replicas as the model always has give way to nobody; nor do any, where none share."""
    left = model.spec.scaling.min_replicas if state.policy.shares_slots else len(model.replicas)
    for replica in model.replicas.values():
        is_kept = left > 0 and replica.status is not DRAINING
        if replica.is_kept != is_kept:
            state.set_kept(replica, is_kept)
        left -= is_kept


def _stop_surplus(state: State, model: Model, now: float) -> list[Command]:
    """Stop idle replicas beyond the wanted number whose time is over, and watch the others."""
    if model.num_serving <= model.plan.replicas:
        return []
    idle = [r for r in model.replicas.values() if not r.in_flight and r.status is READY]
    if len(idle) > 1:
        idle.sort(key=lambda replica: (replica.changed_at, replica.replica_id))
    commands: list[Command] = []
    for replica in idle:
        if model.num_serving <= model.plan.replicas:
            break
        if now - replica.changed_at >= model.plan.keep_idle_s:
            why = keepalive.stop_reason(
                now - replica.changed_at, model.plan.keep_idle_s, model.plan.reason
            )
            commands += orders.stop_replica(state, replica, why, now)
        else:
            state.watch_keep_alive(replica)
    return commands


def act_ahead(state: State, now: float) -> list[Command]:
    """Start ahead of requests what plans want, and bring to DRAM what is worth its place there."""
    commands = _start_short(state, now)
    reviewed, state.reviewed = state.reviewed, {}
    for model in reviewed.values():
        staging.consider(state, model)
    if state.can_stage:
        state.can_stage = False
        commands += staging.stage_ahead(state, now)
    return commands + settle(state, now)  # bytes may have taken an idle replica's place


def _start_short(state: State, now: float) -> list[Command]:
    if not state.short or state.line.models or state.is_draining:
        return []
    commands: list[Command] = []
    for model in list(islice(state.short.values(), _NUM_TRIES)):
        state.short[model.model_id] = state.short.pop(model.model_id)  # the others' turn comes
        if model.room_seen == state.room_version or model.failure or model.no_start_before > now:
            continue
        started = _start_ahead(state, model, now)
        commands += started
        if not started:
            model.room_seen = state.room_version
            model.no_start_before = now + _RETRY_S
            state.watch_review(model)
    return commands + settle(state, now)


def _start_ahead(state: State, model: Model, now: float) -> list[Command]:
    """Start one more replica where it would be ready first; nothing where it is not worth it."""
    nodes = [
        node for node in slots.candidates(state, model, set()) if _is_worth(state, node, model, now)
    ]
    placement = place(slots.views(state, nodes, model))
    if placement is None:
        return []
    node = state.nodes[placement.node_id]
    placement = msgspec.structs.replace(placement, reason=_why_ahead(model) + placement.reason)
    worker = slots.worker_state(node)
    commands = room.make_room(state, node, model, now, for_replica=True)
    return [*commands, orders.start_replica(state, node, model, placement, worker, now)]


def _why_ahead(model: Model) -> str:
    if model.num_serving < (least := model.spec.scaling.min_replicas):
        return f"min_replicas {least}; "
    return f"ahead of requests: {reason}; " if (reason := model.plan.reason) else "wanted; "


def _is_worth(state: State, node: Node, model: Model, now: float) -> bool:
    """Whether what would give way on the node is worth less than a replica of the model."""
    if node.claims:
        return False
    if model.num_serving < model.spec.scaling.min_replicas:
        return True
    tier = state.tier_on(model, node)
    saved_s = state.estimates.startup_s(node.node_id, model.model_id, model.spec.size_bytes, tier)
    worth = saved_s * (model.plan.rate_per_s or 0.0)
    return room.gives_way(state, node, model, worth, now, for_replica=True)
