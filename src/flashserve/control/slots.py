"""Who gets a worker: models that want a replica stand in line, first come first served.

A free slot, or else the idle replica of least worth, goes to the first in line that it suits. A
model that has waited `slot_patience_s` claims room on one node: the replicas that have been busy
longest there take no further requests, and nobody behind it in line starts on that node before it
did. A replica that became ready less than `slot_patience_s` ago is left alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import chain, islice

from flashserve.control import orders, requests
from flashserve.control.records import DRAINING, READY, Model, Node, Replica
from flashserve.control.room import make_room
from flashserve.control.state import State
from flashserve.messages.commands import Command
from flashserve.policy import text
from flashserve.policy.cost import WorkerState, extent_bytes
from flashserve.policy.placement import NodeView, place
from flashserve.types import NodeId

_SPARE, _STOPPING, _STARTING = WorkerState
_NUM_ALL = 16
"""With more nodes than that, the likeliest ones are compared and not all."""
_NUM_LIKELY = 6
_NUM_SEEN = 256
"""Likely nodes looked at until so many suit. Who waits because none of them did claims room."""
_NUM_MISSES = 8
"""After so many models that fit nowhere, the rest of the line waits for the next event."""
_NUM_TURNS = 32
"""Of so many first in line the turn comes in one event; that of the others in a Tick at once."""
_NUM_BUSY = 64
"""Replicas, busy longest first, among whose nodes a claim is looked for."""
_MIN_PATIENCE_S = 1.0


def fill(state: State, now: float) -> list[Command]:
    """Start what stands in line, as far as workers and memory go."""
    commands = _release_claims(state, now)
    if not state.line.models or not (state.free_nodes or state.idle):
        return commands
    taken: set[NodeId] = set()
    num_misses = 0
    for model in list(islice(state.line.models.values(), _NUM_TURNS)):
        if num_misses == _NUM_MISSES:
            return commands
        if model.model_id not in state.line.models:  # a release gave it its old replica back
            continue
        if started := _start(state, model, taken, now):
            commands += started
            commands += _release_claims(state, now)
        else:
            num_misses += 1
            if model.claim is not None:
                taken.add(model.claim)
    if len(state.line.models) > num_misses:
        state.fill_on(now)
    return commands


def _start(state: State, model: Model, taken: set[NodeId], now: float) -> list[Command]:
    """Start the model where it would be ready first; nothing when it fits nowhere."""
    nodes = candidates(state, model, taken)
    placement = place(views(state, nodes, model))
    if placement is None:
        return []
    node = state.nodes[placement.node_id]
    worker = worker_state(node)
    commands = make_room(state, node, model, now, for_replica=True)
    return [*commands, orders.start_replica(state, node, model, placement, worker, now)]


def candidates(
    state: State, model: Model, taken: set[NodeId], *, for_replica: bool = True
) -> list[Node]:
    """Nodes that can take the model's bytes now, and with `for_replica` a replica of it."""
    if len(state.nodes) <= _NUM_ALL:
        likely: Iterable[Node] = state.nodes.values()
        most = _NUM_ALL
    else:
        likely, most = islice(_likely(state, model), _NUM_SEEN), _NUM_LIKELY
    spec, shunned = model.spec, model.shunned
    need = extent_bytes(spec.size_bytes)
    suited: list[Node] = []
    for node in likely:
        if (
            (not for_replica or len(node.replicas) < node.num_workers or node.idle)
            and node.node_id not in taken
            and node.node_id not in shunned
            and spec.model_id not in node.pending_evicts
            and (node.capacity_bytes - node.pinned_bytes >= need or node.has_room(spec))
        ):
            suited.append(node)
            if len(suited) == most:
                break
    return suited


def _likely(state: State, model: Model) -> Iterator[Node]:
    """Nodes that have the bytes, then ones with a free slot, then ones with an idle replica."""
    holders = (state.nodes[n] for n in chain(model.dram_nodes, model.disk_nodes))
    idle = (state.nodes[replica.node_id] for replica in state.idle.values())
    seen: set[NodeId] = set()
    for node in chain(holders, state.free_nodes.values(), idle):
        if node.node_id not in seen:
            seen.add(node.node_id)
            yield node


def views(state: State, nodes: Iterable[Node], model: Model) -> list[NodeView]:
    model_id, size_bytes = model.model_id, model.spec.size_bytes
    seen: list[NodeView] = []
    for node in nodes:
        tier, worker = state.tier_on(model, node), worker_state(node)
        predicted_s = state.estimates.startup_s(node.node_id, model_id, size_bytes, tier, worker)
        seen.append(NodeView(node.node_id, tier, predicted_s, node.free_slots, node.free_bytes))
    return seen


def worker_state(node: Node) -> WorkerState:
    num_replicas = len(node.replicas)
    if num_replicas >= node.num_workers:
        return _STOPPING
    return _SPARE if node.num_live > num_replicas else _STARTING


def lose_patience(state: State, model: Model, now: float) -> list[Command]:
    """A model has waited long: it claims a node, and what it lacks there drains.

    Where all that it lacks may drain now, it does; else the model claims the first node that can
    be made to suit, so that nobody behind it gets in its way, and asks again.
    """
    commands = fill(state, now)
    if model.model_id not in state.line.models:
        return commands
    again = now + max(state.settings.slot_patience_s, _MIN_PATIENCE_S)
    nodes = [node for node in _nodes_to_claim(state, model) if _could_suit(state, node, model)]
    for node in nodes:
        victims, spared_until = _victims(state, node, model, now)
        if victims is not None:
            _claim(state, node, model, victims, now)
            break
        again = min(again, spared_until)
    else:
        if nodes:
            _claim(state, nodes[0], model, [], now)
    state.line.set_patience(model, again)
    return commands + _release_claims(state, now)


def _nodes_to_claim(state: State, model: Model) -> Iterable[Node]:
    """The node that it claims already, those of the replicas that have been busy longest, others.

    The others count too, because everything on them may just be draining or starting.
    """
    nodes: dict[NodeId, Node] = {}
    if model.claim is not None:
        nodes[model.claim] = state.nodes[model.claim]
    for replica in islice(state.busy.values(), _NUM_BUSY):
        nodes.setdefault(replica.node_id, state.nodes[replica.node_id])
    for node in islice(state.nodes.values(), _NUM_ALL):
        nodes.setdefault(node.node_id, node)
    return nodes.values()


def _could_suit(state: State, node: Node, model: Model) -> bool:
    """Whether the node has room for the model beside everyone who claims it and is ahead."""
    ahead = _ahead(state, node, model)
    wanted = sum(extent_bytes(m.spec.size_bytes) for m in (model, *ahead))
    return (
        len(ahead) < node.spec.num_workers
        and wanted <= node.capacity_bytes
        and model.model_id not in node.pending_evicts
    )


def _ahead(state: State, node: Node, model: Model) -> list[Model]:
    claiming = (state.models[model_id] for model_id in node.claims)
    return [other for other in claiming if other.place_in_line < model.place_in_line]


def _victims(
    state: State, node: Node, model: Model, now: float
) -> tuple[list[Replica] | None, float]:
    """Busy replicas of a node that must drain so that the model gets room beside who is ahead.

    None when even all that may be drained now are not enough, with the time when more may be.
    """
    ahead = _ahead(state, node, model)
    running = [r for r in node.replicas.values() if not r.is_spare]
    kept = [r for r in running if r.status is not DRAINING]
    lack_slots = len(ahead) + 1 + len(kept) - node.spec.num_workers
    wanted = sum(extent_bytes(m.spec.size_bytes) for m in (model, *ahead))
    staging = node.pinned_bytes - _bytes_under(node, running)
    lack_bytes = wanted + staging + _bytes_under(node, kept) - node.capacity_bytes
    victims: list[Replica] = []
    spared_until = math.inf
    for replica in sorted(kept, key=lambda r: (r.changed_at, r.replica_id)):
        if lack_slots <= 0 and lack_bytes <= 0:
            break
        if replica.status is not READY or replica.is_kept:
            continue
        spared = replica.ready_at + state.settings.slot_patience_s
        if spared > now:
            spared_until = min(spared_until, spared)
            continue
        before = _bytes_under(node, kept)
        kept = [r for r in kept if r is not replica]
        victims.append(replica)
        lack_slots -= 1
        lack_bytes -= before - _bytes_under(node, kept)
    if lack_slots > 0 or lack_bytes > 0:
        return None, spared_until
    return victims, spared_until


def _bytes_under(node: Node, replicas: list[Replica]) -> int:
    held = {replica.model_id for replica in replicas}
    return sum(node.resident[m].num_bytes for m in held if m in node.resident)


def _claim(state: State, node: Node, model: Model, victims: list[Replica], now: float) -> None:
    if model.claim is not None and model.claim != node.node_id:
        state.nodes[model.claim].claims.pop(model.model_id, None)
    model.claim = node.node_id
    node.claims[model.model_id] = None
    first = next(iter(model.waiting.values()))
    waited = text.seconds(now - first.waiting_since)
    model.reason = f"waited {waited} for room: claims {node.node_id}"
    for replica in victims:
        busy = text.seconds(now - replica.changed_at)
        reason = f"slot given to {model.model_id}, which waited {waited}: busy {busy}"
        orders.drain(state, replica, reason, now)
        replica.is_yielding = True


def _release_claims(state: State, now: float) -> list[Command]:
    """End the claims of models that got room or want none; what drained for them goes on."""
    commands: list[Command] = []
    while state.line.lapsed:
        model = state.line.lapsed.pop()
        if model.claim is None or model.model_id in state.line.models:
            continue
        node = state.nodes[model.claim]
        node.claims.pop(model.model_id, None)
        model.claim = None
        if not node.claims:
            commands += _resume(state, node, now)
    return commands


def _resume(state: State, node: Node, now: float) -> list[Command]:
    commands: list[Command] = []
    for replica in node.replicas.values():
        if replica.is_yielding:
            replica.is_yielding = False
            state.set_status(replica, READY, now)
            model = state.models[replica.model_id]
            model.reason = f"{replica.replica_id} goes on: its slot is not needed any more"
            commands += requests.dispatch_waiting(state, model, now)
    return commands
