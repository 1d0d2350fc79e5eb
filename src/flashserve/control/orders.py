"""The orders that the controller gives, each with what it changes in the state.

An order counts as carried out from the moment it is given: commands to a node run in order, so
that the slot and the bytes that a StopReplica and an Evict give back can be promised at once to
the StartReplica that follows them.
"""

from __future__ import annotations

from flashserve.control.records import (
    DRAINING,
    STARTING,
    Model,
    Node,
    PendingEvict,
    Replica,
    Request,
)
from flashserve.control.state import State
from flashserve.messages.commands import (
    Command,
    Dispatch,
    Evict,
    Reject,
    Stage,
    StartReplica,
    StopReplica,
)
from flashserve.policy.admission import Refusal
from flashserve.policy.cost import WorkerState, predict_start
from flashserve.policy.placement import Placement
from flashserve.types import ModelSpec, Tier


def start_replica(
    state: State, node: Node, model: Model, placement: Placement, worker: WorkerState, now: float
) -> StartReplica:
    """The caller has made sure of a slot and of the bytes."""
    costs = state.estimates.costs(node.node_id, model.model_id, worker)
    replica = Replica(
        state.new_replica_id(model.model_id),
        model.spec,
        node.node_id,
        node.spec.epoch,
        node.spec.max_sequences,
        started_at=now,
        phases=predict_start(model.spec.size_bytes, placement.tier, costs),
        worker=worker,
    )
    state.hold_bytes(node, model.spec, now)
    state.add_replica(replica)
    model.reason = placement.reason
    return StartReplica(
        node.node_id, node.spec.epoch, replica.replica_id, model.spec, placement.reason
    )


def stop_replica(state: State, replica: Replica, reason: str, now: float) -> list[Command]:
    """Stop a replica that runs nothing, and do what waited for its end."""
    node, model = state.nodes[replica.node_id], state.models[replica.model_id]
    state.remove_replica(replica, now)
    model.reason = reason
    stop = StopReplica(node.node_id, replica.epoch, replica.replica_id, replica.model, reason)
    return [stop, *after_removal(state, node, model)]


def after_removal(state: State, node: Node, model: Model) -> list[Command]:
    """A replica of the model has left the node: evict if that was asked for meanwhile."""
    if node.replicas_of(model):
        return []
    commands: list[Command] = []
    if pending := node.pending_evicts.pop(model.model_id, None):
        commands.append(evict(state, node, pending.model, pending.tier, pending.reason))
    forget_deleted(state, model)
    return commands


def forget_deleted(state: State, model: Model) -> None:
    """A deleted model is gone with its last replica; its bytes were evicted before."""
    if model.is_deleted and not model.replicas:
        del state.models[model.model_id]
        state.line.end_shunning(model)
        state.short.pop(model.model_id, None)
        state.policy.forget(model.model_id)
        state.estimates.forget(model.model_id)


def stage(node: Node, model: Model, tier: Tier, reason: str) -> Stage:
    model.reason = reason
    return Stage(node.node_id, node.spec.epoch, model.spec, tier, reason)


def evict(state: State, node: Node, model: ModelSpec, tier: Tier, reason: str) -> Evict:
    """The model has no replica on the node."""
    model_id = model.model_id
    state.drop_bytes(node, model_id)
    if tier is Tier.DISK:
        state.set_fetched(node, state.models[model_id], False)
    node.unanswered_evicts[model_id] = node.unanswered_evicts.get(model_id, 0) + 1
    state.models[model_id].reason = reason
    return Evict(node.node_id, node.spec.epoch, model, tier, reason)


def evict_when_free(
    state: State, node: Node, pending: PendingEvict, now: float, *, cancel_starts: bool
) -> list[Command]:
    """Evict a model from a node: at once, or when its replicas there have finished what they run.

    Idle replicas are stopped first, and so are starting ones that nobody waits for; with
    `cancel_starts` every starting one.
    """
    model = state.models[pending.model.model_id]
    node.pending_evicts[model.model_id] = pending
    commands: list[Command] = []
    for replica in node.replicas_of(model):
        starting = replica.status is STARTING
        if replica.is_idle or (starting and (cancel_starts or not model.waiting)):
            commands += stop_replica(state, replica, pending.reason, now)
        elif not starting:
            drain(state, replica, pending.reason, now)
    if not commands:
        commands += after_removal(state, node, model)
    return commands


def drain(state: State, replica: Replica, reason: str, now: float) -> None:
    """Let a busy replica finish what it runs; it takes no more and stops with its last request."""
    replica.is_yielding = False
    replica.drain_reason = reason
    if replica.status is not DRAINING:
        state.set_status(replica, DRAINING, now)
    state.models[replica.model_id].reason = reason


def dispatch(state: State, request: Request, replica: Replica, reason: str, now: float) -> Dispatch:
    """Send a request to a ready replica with room."""
    model = state.models[replica.model_id]
    state.begin(model, request, replica, now)
    return Dispatch(
        request.request_id,
        replica.node_id,
        replica.replica_id,
        request.tier,
        request.predicted,
        request.startup,
        reason,
    )


def reject(request: Request, refusal: Refusal) -> Reject:
    return Reject(request.request_id, refusal.code, refusal.message, refusal.retry_after_s)
