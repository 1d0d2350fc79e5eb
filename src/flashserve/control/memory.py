"""Staging and eviction: what people ask for, and what nodes report of it."""

from __future__ import annotations

from flashserve.control import orders, slots, staging
from flashserve.control.records import Model, Node, PendingEvict
from flashserve.control.room import free_more
from flashserve.control.state import State
from flashserve.messages.commands import Command
from flashserve.messages.events import Evicted, EvictRequested, Staged, StageFailed, StageRequested
from flashserve.policy.placement import place
from flashserve.types import NodeId, Tier

_STAGE_RETRIES = 2
_STAGE_BACKOFF_S = 60.0
"""After a stage that failed, none is ordered ahead of requests for so long."""


def stage_requested(state: State, event: StageRequested, now: float) -> list[Command]:
    """Order it from a node even when it has the bytes or cannot take them: it answers for both."""
    model = state.find(event.model_id)
    if model is None or not state.nodes:
        return []
    model.is_dismissed = False
    if node := _holder(state, model, event.tier):
        reason = f"asked for; {node.node_id} holds it or is about to"
        return [orders.stage(node, model, event.tier, reason)]
    nodes = slots.candidates(state, model, set(), for_replica=False)
    placement = place(slots.views(state, nodes, model))
    if placement is None:
        node = max(state.nodes.values(), key=lambda n: (n.capacity_bytes, n.node_id))
        reason = f"asked for; no node has room, {node.node_id} is the largest"
        return [orders.stage(node, model, event.tier, reason)]
    node = state.nodes[placement.node_id]
    commands: list[Command] = []
    if event.tier is Tier.DRAM:
        commands = staging.reserve(state, node, model, now)
    reason = f"asked for; {placement.reason}"
    return [*commands, orders.stage(node, model, event.tier, reason)]


def _holder(state: State, model: Model, tier: Tier) -> Node | None:
    held = set(model.dram_nodes)
    if tier is Tier.DISK:
        held |= set(state.nodes if model.spec.lowest_tier >= Tier.DISK else model.disk_nodes)
    return state.nodes[min(held)] if held else None


def staged(state: State, event: Staged, now: float) -> list[Command]:
    """Bytes have arrived; ignored when they were ordered out again meanwhile."""
    node, model = state.nodes.get(event.node_id), state.find(event.model_id)
    if node is None:
        return []
    state.estimates.observe_staged(node.node_id, event.tier, event.num_bytes, event.seconds)
    if model is None or node.unanswered_evicts.get(event.model_id):
        return []
    state.set_fetched(node, model, True)
    if event.tier is Tier.DRAM:
        state.hold_bytes(node, model.spec, now).is_loaded = True
        state.set_staging(node, model.model_id, False)
        node.stage_failures.pop(model.model_id, None)
        state.unplanned[model.model_id] = model  # a start costs less now
    return []


def stage_failed(state: State, event: StageFailed, now: float) -> list[Command]:
    """Bytes did not arrive, or (conflict) did not leave.

    What did not arrive for want of memory is ordered again after evictions, if any help. Bytes
    that a start needs are not: that fails by itself, and its ReplicaFailed says what follows.
    """
    node, model = state.nodes.get(event.node_id), state.find(event.model_id)
    if node is None or model is None or event.tier is not Tier.DRAM:
        return []
    if event.code == "conflict" and node.unanswered_evicts.pop(model.model_id, 0):
        state.hold_bytes(node, model.spec, now).is_loaded = True
        return []
    resident = node.resident.get(model.model_id)
    if (resident and resident.is_loaded) or node.replicas_of(model):
        return []
    if resident:
        state.set_staging(node, model.model_id, False)
    model.reason = f"staging on {node.node_id} failed: {event.message}"
    model.no_stage_before = now + _STAGE_BACKOFF_S
    num_failures = node.stage_failures.pop(model.model_id, 0) + 1
    if event.code != "unavailable" or num_failures > _STAGE_RETRIES:
        return []
    freed = free_more(state, node, model, now, everything=num_failures > 1)
    if freed:
        node.stage_failures[model.model_id] = num_failures
        freed += staging.reserve(state, node, model, now)
        reason = f"tried again after evictions: {event.message}"
        freed.append(orders.stage(node, model, event.tier, reason))
    return freed


def evict_requested(state: State, event: EvictRequested, now: float) -> list[Command]:
    """Ordered where the bytes are; with none anywhere, from one node, so that somebody answers."""
    model = state.find(event.model_id)
    if model is None or not state.nodes:
        return []
    model.is_dismissed = True
    state.unplanned[model.model_id] = model
    pending = PendingEvict(model.spec, event.tier, f"asked to leave {event.tier.label}")
    commands: list[Command] = []
    for node_id in holders(model, event.tier) or [min(state.nodes)]:
        node = state.nodes[node_id]
        commands += orders.evict_when_free(state, node, pending, now, cancel_starts=False)
    return commands


def holders(model: Model, tier: Tier) -> list[NodeId]:
    """Nodes that have bytes of the model in `tier` or above."""
    nodes = set(model.dram_nodes) | {replica.node_id for replica in model.replicas.values()}
    if tier is Tier.DISK:
        nodes |= set(model.disk_nodes)
    return sorted(nodes)


def evicted(state: State, event: Evicted) -> list[Command]:
    """The answer to an Evict; without one, the node has lost the bytes by itself."""
    node, model = state.nodes.get(event.node_id), state.models.get(event.model_id)
    if node is None:
        return []
    state.line.clear_shunned()
    if num_unanswered := node.unanswered_evicts.pop(event.model_id, 0):
        if num_unanswered > 1:
            node.unanswered_evicts[event.model_id] = num_unanswered - 1
    elif model and event.tier is Tier.DISK:
        state.set_fetched(node, model, False)
    elif model and not node.replicas_of(model):
        state.drop_bytes(node, event.model_id)
    elif resident := node.resident.get(event.model_id):
        resident.is_loaded = False  # a start that followed the loss at once reads them anew
    return []
