"""What nodes report of replicas: ready, failed, lost, stopped.

A report about a replica that is not known, or not (any more) in the state that the report ends,
is ignored: its stop was ordered meanwhile, or its node left.
"""

from __future__ import annotations

from flashserve.control import orders, requests
from flashserve.control.records import READY, STARTING, Model, Node, Replica
from flashserve.control.room import free_more
from flashserve.control.state import State
from flashserve.control.timers import Timer, TimerKind
from flashserve.messages.commands import Command
from flashserve.messages.events import ReplicaFailed, ReplicaLost, ReplicaReady, ReplicaStopped
from flashserve.policy import keepalive
from flashserve.policy.admission import Failure, refuse_failed
from flashserve.types import NodeId, ReplicaId

_MEMORY_RETRIES = 3
"""Starts in a row that a node may refuse for want of memory before the model counts as failed."""
_MIN_RETRY_S = 1.0
_NO_MEMORY = "unavailable"


def ready(state: State, event: ReplicaReady, now: float) -> list[Command]:
    replica = _known(state, event.replica_id, event.node_id)
    if replica is None or replica.status is not STARTING:
        return []
    node, model = state.nodes[replica.node_id], state.models[replica.model_id]
    state.hold_bytes(node, replica.model, now).is_loaded = True
    node.unanswered_evicts.pop(model.model_id, None)
    state.estimates.observe_start(
        node.node_id, model.model_id, replica.model.size_bytes, replica.worker, event.phases
    )
    replica.phases = event.phases
    replica.ready_at = now
    model.memory_failures = 0
    model.failure = None
    for request in model.waiting.values():
        request.startup = event.phases
    state.set_status(replica, READY, now)
    commands = requests.dispatch_waiting(state, model, now)
    if not replica.in_flight:  # else the policy knows no more than when it was started
        state.unplanned[model.model_id] = model
    if pending := node.pending_evicts.get(model.model_id):
        return commands + orders.evict_when_free(state, node, pending, now, cancel_starts=True)
    return commands


def failed(state: State, event: ReplicaFailed, now: float) -> list[Command]:
    """Everyone who waits gets the model's error; want of memory is mended or tried again first."""
    replica = _known(state, event.replica_id, event.node_id)
    if replica is None:
        return []
    node, model = state.nodes[replica.node_id], state.models[replica.model_id]
    commands = lose(state, replica, event.message, now)
    if state.find(model.model_id) is None:
        return commands
    if event.code == _NO_MEMORY and model.memory_failures < _MEMORY_RETRIES:
        return commands + _try_again(state, node, model, event.message, now)
    model.memory_failures = 0
    model.reason = f"start on {node.node_id} failed: {event.message}"
    model.failure = Failure(event.code, event.message, now + state.settings.failure_backoff_s)
    state.timers.schedule(Timer(TimerKind.BACKOFF, model.model_id), model.failure.until)
    return commands + requests.reject_waiting(state, model, refuse_failed(model.failure, now))


def _try_again(state: State, node: Node, model: Model, message: str, now: float) -> list[Command]:
    model.memory_failures += 1
    again = model.memory_failures > 1
    commands = free_more(state, node, model, now, everything=again)
    model.reason = f"{node.node_id} had no room for it, next try follows: {message}"
    if not commands:
        retry_s = max(state.settings.failure_backoff_s, _MIN_RETRY_S)
        state.line.shun(model, node.node_id, now + retry_s)
    return commands


def lost(state: State, event: ReplicaLost, now: float) -> list[Command]:
    replica = _known(state, event.replica_id, event.node_id)
    if replica is None:
        return []
    model = state.models[replica.model_id]
    model.reason = f"{replica.replica_id} was lost: {event.reason}"
    commands: list[Command] = []
    if replica.status is STARTING:
        commands = requests.count_lost_start(state, model, event.reason)
        model.no_start_before = now + max(state.settings.failure_backoff_s, _MIN_RETRY_S)
    return commands + lose(state, replica, event.reason, now)


def stopped(state: State, event: ReplicaStopped, now: float) -> list[Command]:
    """The answer to our order, or a node that stopped a replica by itself: then it is lost."""
    if replica := _known(state, event.replica_id, event.node_id):
        return lose(state, replica, "its node stopped it", now)
    return []


def lose(state: State, replica: Replica, why: str, now: float) -> list[Command]:
    """A replica is gone without our order; its requests go on elsewhere."""
    return lose_all(state, [replica], why, now)


def lose_all(state: State, lost: list[Replica], why: str, now: float) -> list[Command]:
    """Replicas are gone together: none of their requests goes on with another of them."""
    taken = [(replica, state.take_in_flight(replica)) for replica in lost]
    for replica in lost:
        state.remove_replica(replica, now)
    commands: list[Command] = []
    for replica, interrupted in taken:
        node, model = state.nodes[replica.node_id], state.models[replica.model_id]
        if replica.model.source != model.spec.source:
            commands += requests.reject_replaced(interrupted)
        else:
            commands += requests.go_on(state, model, interrupted, why, now)
        commands += orders.after_removal(state, node, model)
    return commands


def keep_alive_over(state: State, replica_id: ReplicaId, now: float) -> list[Command]:
    replica = state.replicas[replica_id]
    plan = state.models[replica.model_id].plan
    reason = keepalive.stop_reason(now - replica.changed_at, plan.keep_idle_s, plan.reason)
    return orders.stop_replica(state, replica, reason, now)


def _known(state: State, replica_id: ReplicaId, node_id: NodeId) -> Replica | None:
    replica = state.replicas.get(replica_id)
    return replica if replica and replica.node_id == node_id else None
