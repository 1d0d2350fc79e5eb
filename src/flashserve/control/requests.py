"""Requests: admission, waiting, dispatch, deadlines, and going on after a lost replica."""

from __future__ import annotations

from collections.abc import Iterable

from flashserve.control import orders
from flashserve.control.records import DRAINING, READY, STARTING, Model, Node, Replica, Request
from flashserve.control.state import State
from flashserve.messages.commands import Command, Hold
from flashserve.messages.events import RequestArrived, RequestFinished
from flashserve.policy import admission, cost, routing, text
from flashserve.policy.admission import Refusal
from flashserve.types import Phases, ReplicaId, RequestId, Tier

_DEVICE, _DRAM = Tier.DEVICE, Tier.DRAM


def arrive(state: State, event: RequestArrived, now: float) -> list[Command]:
    """Dispatch at once to a ready replica, let it wait, or refuse it. A known id is ignored."""
    if event.request_id in state.requests:
        return []
    model = state.find(event.model_id)
    deadline_s = state.settings.deadline_s if event.deadline_s is None else event.deadline_s
    request = Request(
        event.request_id,
        event.model_id,
        state.new_sequence(),
        deadline_s,
        now,
        event.tenant,
        state.weights.get(event.tenant, 1.0),
        event.adapter,
        event.prefix,
    )
    if model is None:
        return [orders.reject(request, admission.refuse_unknown(event.model_id))]
    model.last_used_at = now
    model.request_came(now)
    model.is_dismissed = False
    state.policy.arrived(model.model_id, now)
    if refusal := _refusal(state, model, now):
        return [orders.reject(request, refusal)]
    if not model.waiting and (route := _route(state, model, request)):
        request.tier = _DEVICE
        request.predicted = Phases(prefill_s=_prefill_s(state, model))
        replica_id, reason = route
        return [orders.dispatch(state, request, state.replicas[replica_id], reason, now)]
    if len(model.waiting) >= state.settings.queue_limit and (
        refusal := admission.refuse_full(
            model.model_id,
            len(model.waiting),
            state.settings.queue_limit,
            _wait_s(state, model, now),
        )
    ):
        return _share_queue(state, model, request, refusal, now)
    state.enqueue(model, [request], now)
    return []


def _share_queue(
    state: State, model: Model, request: Request, refusal: Refusal, now: float
) -> list[Command]:
    """The queue is full: whoever has most of it for his weight is refused."""
    most = model.shares.most()
    own = model.shares.num_waiting(request.tenant)
    if most is None or not admission.gives_way(most, request.tenant, request.weight, own):
        return [orders.reject(request, refusal)]
    last = model.shares.last_of(most.tenant)
    if last is None:
        return [orders.reject(request, refusal)]
    gave_way = admission.refuse_excess(
        model.model_id,
        len(model.waiting),
        most.waiting,
        state.settings.queue_limit,
        _wait_s(state, model, now),
    )
    state.enqueue(model, [request], now)
    state.forget_waiting(model, last)
    return [orders.reject(last, gave_way)]


def _refusal(state: State, model: Model, now: float) -> Refusal | None:
    if state.is_draining:
        return admission.refuse_draining()
    if model.failure and now < model.failure.until:
        return admission.refuse_failed(model.failure, now)
    model.failure = None
    return too_large(state, model)


def too_large(state: State, model: Model) -> Refusal | None:
    if not state.nodes:
        return None
    need = cost.extent_bytes(model.spec.size_bytes)
    return admission.refuse_too_large(model.model_id, need, state.largest_bytes)


def finish(state: State, event: RequestFinished, now: float) -> list[Command]:
    """A request is over, wherever it was; one that is not known (any more) is ignored."""
    request = state.requests.get(event.request_id)
    if request is None:
        return []
    model = state.models[request.model_id]
    model.last_used_at = now
    if request.replica_id is None:
        state.forget_waiting(model, request)
        return []
    if event.prefill_s is not None and request.dispatched_at is not None:
        run_s = now - request.dispatched_at
        state.estimates.observe_run(model.model_id, event.prefill_s, run_s)
    replica = state.replicas[request.replica_id]
    state.end(request, replica, now)
    return release(state, model, replica, now)


def release(state: State, model: Model, replica: Replica, now: float) -> list[Command]:
    """A replica has room again: for a waiting request, or to stop if it was only to finish."""
    if replica.status is DRAINING and not replica.in_flight:
        return orders.stop_replica(state, replica, replica.drain_reason, now)
    return dispatch_waiting(state, model, now) if model.waiting else []


def dispatch_waiting(state: State, model: Model, now: float) -> list[Command]:
    """Dispatch waiting requests, by their tenants' shares, while a ready replica has room."""
    commands: list[Command] = []
    while model.waiting and (request := model.shares.next()):
        route = _route(state, model, request)
        if route is None:
            break
        replica_id, reason = route
        commands.append(orders.dispatch(state, request, state.replicas[replica_id], reason, now))
    return commands


def _route(state: State, model: Model, request: Request) -> tuple[ReplicaId, str] | None:
    ready = [r for r in model.replicas.values() if r.status is READY]
    if len(ready) == 1:  # nothing to compare
        [only] = ready
        return routing.only(routing.ReplicaLoad(len(only.in_flight), only.replica_id, only.limit))
    if not ready:
        return None
    return routing.route((_load(r, request) for r in ready), _prefill_s(state, model))


def _load(replica: Replica, request: Request) -> routing.ReplicaLoad:
    return routing.ReplicaLoad(
        len(replica.in_flight),
        replica.replica_id,
        replica.limit,
        not request.adapter or request.adapter in replica.adapters,
        request.prefix is not None and request.prefix in replica.prefixes,
    )


def go_on(
    state: State, model: Model, requests: list[Request], why: str, now: float
) -> list[Command]:
    """Requests have lost their replica: they wait again, first of all, unless it was one too many.

    Their deadlines start anew, since a long answer may have been running past the first one.
    """
    if model.is_deleted:
        gone = admission.refuse_unknown(model.model_id)
        return [orders.reject(request, gone) for request in requests]
    commands: list[Command] = []
    patient: list[Request] = []
    for request in requests:
        if refusal := _count_loss(state, request, why):
            commands.append(orders.reject(request, refusal))
        else:
            patient.append(request)
    state.enqueue(model, patient, now)
    return commands + dispatch_waiting(state, model, now)


def count_lost_start(state: State, model: Model, why: str) -> list[Command]:
    """A replica was lost before it was ready: one attempt less for everyone who waits for it."""
    commands: list[Command] = []
    for request in list(model.waiting.values()):
        if refusal := _count_loss(state, request, why):
            state.forget_waiting(model, request)
            commands.append(orders.reject(request, refusal))
    return commands


def _count_loss(state: State, request: Request, why: str) -> Refusal | None:
    request.attempts += 1
    if request.attempts < state.settings.max_attempts:
        return None
    lost = text.count(request.attempts, "replica")
    return Refusal("replica_failed", f"{request.model_id} lost {lost}, the last one: {why}")


def reject_waiting(state: State, model: Model, refusal: Refusal) -> list[Command]:
    requests = list(model.waiting.values())
    for request in requests:
        state.forget_waiting(model, request)
    return [orders.reject(request, refusal) for request in requests]


def reject_replaced(requests: Iterable[Request]) -> list[Command]:
    """An answer that was begun with a checkpoint which is gone cannot go on with another."""
    return [
        orders.reject(
            request,
            Refusal("replica_failed", f"{request.model_id} was replaced while it was answering"),
        )
        for request in requests
    ]


def deadline_passed(state: State, request_id: RequestId, now: float) -> list[Command]:
    request = state.requests[request_id]
    model = state.models[request.model_id]
    waited_s = now - request.waiting_since
    reason = waiting_for(state, model, now)
    state.forget_waiting(model, request)
    return [orders.reject(request, admission.refuse_late(model.model_id, waited_s, reason))]


def hold_new(state: State, now: float) -> list[Command]:
    """Tell each request that began to wait in this event, and waits still, what to expect."""
    requests, state.unheld = state.unheld, []
    commands: list[Command] = []
    for request in requests:
        if request.replica_id is not None or request.request_id not in state.requests:
            continue
        model = state.models[request.model_id]
        tier = state.tier(model)
        if tier > _DRAM and not any(r.status is READY for r in model.replicas.values()):
            tier = _DRAM
        request.tier = tier
        request.predicted = predict(state, model, now)
        reason = f"waits for {waiting_for(state, model, now)}"
        commands.append(Hold(request.request_id, request.tier, request.predicted, reason))
    return commands


def predict(state: State, model: Model, now: float) -> Phases:
    """The estimated way to a first token for a request that has to wait now."""
    prefill_s = _prefill_s(state, model)
    if starting := _starting(model):
        start, queue_s = cost.remaining(starting.phases, now - starting.started_at), 0.0
    elif any(replica.status is READY for replica in model.replicas.values()):
        return Phases(queue_s=_wait_s(state, model, now), prefill_s=prefill_s)
    else:
        start, queue_s = _predict_anywhere(state, model), _wait_s(state, model, now)
    return Phases(
        queue_s,
        start.place_s,
        start.fetch_s,
        start.dram_s,
        start.device_s,
        start.init_s,
        prefill_s,
    )


def _predict_anywhere(state: State, model: Model) -> Phases:
    """A start on the node that holds most of the model, or on any."""
    node_id, tier = state.nearest(model)
    costs = state.estimates.costs(node_id, model.model_id, cost.WorkerState.STOPPING)
    return cost.predict_start(model.spec.size_bytes, tier, costs)


def _wait_s(state: State, model: Model, now: float) -> float:
    """Until the last that waits for this model has a replica with room, as far as can be told."""
    if starting := _starting(model):
        return cost.remaining(starting.phases, now - starting.started_at).startup_s
    run_s = state.estimates.run_s(model.model_id)
    room = sum(r.limit for r in model.replicas.values() if r.status is READY)
    if room:
        return admission.wait_s(max(len(model.waiting) - 1, 0), room, run_s)
    return admission.wait_s(max(len(state.line.models) - 1, 0), state.num_workers, run_s)


def _prefill_s(state: State, model: Model) -> float:
    return state.estimates.prefill_s(model.model_id)


def _starting(model: Model) -> Replica | None:
    for replica in model.replicas.values():
        if replica.status is STARTING:
            return replica
    return None


def waiting_for(state: State, model: Model, now: float) -> str:
    """What a waiting request of this model waits for, for people."""
    if starting := _starting(model):
        since = text.seconds(now - starting.started_at)
        return f"{starting.replica_id} on {starting.node_id}, which has been loading for {since}"
    ready = [r for r in model.replicas.values() if r.status is READY]
    if ready:
        return f"one of {sum(len(r.in_flight) for r in ready)} running requests to end"
    return _waiting_for_room(state, model)


def _is_clearing(node: Node) -> bool:
    return any(replica.status is DRAINING for replica in node.replicas.values())


def _waiting_for_room(state: State, model: Model) -> str:
    if not state.nodes:
        return "a node to join"
    if model.claim is not None and _is_clearing(state.nodes[model.claim]):
        return f"busy replicas on {model.claim} to finish their last requests"
    if model.shunned:
        return f"memory on {', '.join(model.shunned)}: {model.reason}"
    if state.free_nodes or state.idle:
        need = text.size(cost.extent_bytes(model.spec.size_bytes))
        return f"{need} of DRAM that no running model holds"
    return f"a free worker: {state.num_workers} of {state.num_workers} are busy"
