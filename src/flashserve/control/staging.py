"""Bytes that come to DRAM ahead of requests, where a forecast makes them worth the room."""

from __future__ import annotations

from flashserve.control import orders, room, slots
from flashserve.control.records import Model, Node
from flashserve.control.state import State
from flashserve.messages.commands import Command
from flashserve.policy import text
from flashserve.policy.cost import WorkerState, startup_s
from flashserve.policy.placement import place
from flashserve.policy.tiers import deserves_dram
from flashserve.types import Tier

_MAX_STAGING = 2
"""Stages ahead that one node carries out at a time: requests' own loads come first."""


def stage_ahead(state: State, model: Model, now: float) -> list[Command]:
    """Order a model's bytes to DRAM, if none has them there and they earn more than their place."""
    rate = model.plan.rate_per_s
    if rate is None or model.dram_nodes or model.waiting or model.replicas or state.is_draining:
        return []
    if state.find(model.model_id) is not model:
        return []
    if now < model.no_stage_before or model.failure or model.is_dismissed:
        return []
    nodes = [
        node
        for node in slots.candidates(state, model, set(), for_replica=False)
        if node.num_staging < _MAX_STAGING and not node.claims
    ]
    suited = [node for node in nodes if _is_worth(state, node, model, rate, now)]
    placement = place((slots.view(state, node, model) for node in suited), model.spec.size_bytes)
    if placement is None:
        return []
    node = state.nodes[placement.node_id]
    commands = reserve(state, node, model, now)
    reason = f"{text.rate(rate)} starts expected: worth its place in DRAM; {placement.reason}"
    return [*commands, orders.stage(node, model, Tier.DRAM, reason)]


def reserve(state: State, node: Node, model: Model, now: float) -> list[Command]:
    """Make room for the model's bytes and count them as on their way."""
    commands = room.make_room(state, node, model, now, for_replica=False)
    state.hold_bytes(node, model.spec, now)
    state.set_staging(node, model.model_id, True)
    return commands


def _is_worth(state: State, node: Node, model: Model, rate: float, now: float) -> bool:
    costs = state.estimates.costs(node.node_id, model.model_id, WorkerState.SPARE)
    size = model.spec.size_bytes
    cold_s = startup_s(size, state.tier_on(model, node), costs)
    warm_s = startup_s(size, Tier.DRAM, costs)
    if not deserves_dram(rate, size, cold_s, warm_s, state.prices):
        return False
    return room.gives_way(state, node, model, rate * (cold_s - warm_s), now, for_replica=False)
