"""Models and nodes that come and go, and the end of the server."""

from __future__ import annotations

from flashserve.control import orders, replicas, requests
from flashserve.control.memory import holders
from flashserve.control.records import Model, Node, PendingEvict
from flashserve.control.state import State
from flashserve.messages.commands import Command
from flashserve.messages.events import (
    ModelDeleted,
    ModelDeployed,
    NodeJoined,
    NodeLost,
    WorkersChanged,
)
from flashserve.policy import admission
from flashserve.types import ModelSpec, Tier


def deployed(state: State, event: ModelDeployed, now: float) -> list[Command]:
    """A new model, or new settings or another checkpoint for one that is there."""
    spec = event.model
    model = state.models.get(spec.model_id)
    if model is None:
        model = Model(spec, reason="deployed")
        state.models[spec.model_id] = state.unplanned[spec.model_id] = model
        return []
    commands: list[Command] = []
    if not model.is_deleted and not _same_checkpoint(model.spec, spec):
        commands += _retire(state, model, "replaced by another checkpoint", now)
        begun = [r for r in model.waiting.values() if r.dispatched_at is not None]
        for request in begun:
            state.forget_waiting(model, request)
        commands += requests.reject_replaced(begun)
    model.spec = spec
    model.is_deleted = False
    model.failure = None
    model.memory_failures = 0
    commands += _reject_too_large(state, model)
    state.unplanned[model.model_id] = model
    return commands


def _same_checkpoint(old: ModelSpec, new: ModelSpec) -> bool:
    return (old.source, old.size_bytes, old.lowest_tier) == (
        new.source,
        new.size_bytes,
        new.lowest_tier,
    )


def deleted(state: State, event: ModelDeleted, now: float) -> list[Command]:
    """Running answers end; the model is gone with the last of them."""
    model = state.find(event.model_id)
    if model is None:
        return []
    gone = admission.refuse_unknown(model.model_id)
    commands = requests.reject_waiting(state, model, gone)
    commands += _retire(state, model, "deleted", now)
    model.is_deleted = True
    orders.forget_deleted(state, model)
    return commands


def _retire(state: State, model: Model, why: str, now: float) -> list[Command]:
    """Stop or drain every replica of the present checkpoint, and evict its bytes after that."""
    tier = Tier.DISK if model.spec.lowest_tier < Tier.DISK else Tier.DRAM
    pending = PendingEvict(model.spec, tier, why)
    commands: list[Command] = []
    for node_id in holders(model, tier):
        node = state.nodes[node_id]
        commands += orders.evict_when_free(state, node, pending, now, cancel_starts=True)
    return commands


def joined(state: State, event: NodeJoined, now: float) -> list[Command]:
    """A node with empty slots. One that joins with an epoch that was seen already is ignored."""
    spec = event.node
    if spec.epoch <= state.epochs.get(spec.node_id, spec.epoch - 1):
        return []
    commands: list[Command] = []
    if node := state.nodes.get(spec.node_id):
        commands += _lose(state, node, f"node {spec.node_id} joined anew", now)
    state.add_node(spec)
    return commands + _reject_all_too_large(state)


def node_lost(state: State, event: NodeLost, now: float) -> list[Command]:
    node = state.nodes.get(event.node_id)
    if node is None or node.spec.epoch != event.epoch:
        return []
    commands = _lose(state, node, f"node {event.node_id} was lost", now)
    return commands + _reject_all_too_large(state)


def _lose(state: State, node: Node, why: str, now: float) -> list[Command]:
    """Everything on the node is gone, and its requests go on elsewhere."""
    state.forget_bytes(node)
    commands = replicas.lose_all(state, list(node.replicas.values()), why, now)
    state.remove_node(node)
    return commands


def workers_changed(state: State, event: WorkersChanged) -> list[Command]:
    if node := state.nodes.get(event.node_id):
        node.num_live = min(max(event.num_ready, 0), node.spec.num_workers)
    return []


def drain_started(state: State) -> list[Command]:
    """Requests with a replica that is ready or starting go on; who waits for a slot does not."""
    state.is_draining = True
    commands: list[Command] = []
    for model in list(state.line.models.values()):
        commands += requests.reject_waiting(state, model, admission.refuse_draining())
    return commands


def _reject_all_too_large(state: State) -> list[Command]:
    commands: list[Command] = []
    for model in list(state.line.models.values()):
        commands += _reject_too_large(state, model)
    return commands


def _reject_too_large(state: State, model: Model) -> list[Command]:
    refusal = requests.too_large(state, model)
    return requests.reject_waiting(state, model, refusal) if refusal else []
