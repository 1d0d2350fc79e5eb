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

_MAX_STAGING = 1
"""Stages ahead that one node carries out at a time: two would share its disk, and both be there
later than the first of them needs to be."""
_MAX_CANDIDATES = 256
_NUM_TRIES = 2
"""Candidates that are tried in one event; the others' turn comes when a node has staged one."""


def consider(state: State, model: Model) -> None:
    """Note a model that may be worth a place in DRAM, if it has none and a forecast wants one."""
    if model.plan.rate_per_s and not (model.dram_nodes or model.waiting or model.replicas):
        state.to_stage[model.model_id] = model
        state.can_stage = True
        if len(state.to_stage) > _MAX_CANDIDATES:
            del state.to_stage[next(iter(state.to_stage))]


def stage_ahead(state: State, now: float) -> list[Command]:
    """Order the bytes that are wanted soonest to DRAM, where they earn more than their place."""
    commands: list[Command] = []
    for _ in range(_NUM_TRIES):
        if not state.to_stage or state.is_draining:
            break
        model = max(state.to_stage.values(), key=lambda m: (m.plan.rate_per_s or 0.0, m.model_id))
        nodes = [
            node
            for node in slots.candidates(state, model, set(), for_replica=False)
            if node.num_staging < _MAX_STAGING and not node.claims
        ]
        if not nodes:
            break
        del state.to_stage[model.model_id]
        commands += _stage(state, model, nodes, now)
    else:
        if commands:
            state.can_stage = bool(state.to_stage)
        else:  # what is wanted later would find no place either; the next reviews name it again
            state.to_stage.clear()
    return commands


def _stage(state: State, model: Model, nodes: list[Node], now: float) -> list[Command]:
    """Nothing where none of the nodes has worse to lose."""
    rate = model.plan.rate_per_s
    if rate is None or model.dram_nodes or model.waiting or model.replicas:
        return []
    if state.find(model.model_id) is not model:
        return []
    if now < model.no_stage_before or model.failure or model.is_dismissed:
        return []
    suited = [node for node in nodes if _is_worth(state, node, model, rate, now)]
    placement = place(slots.views(state, suited, model))
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
