"""What the controller knows, and the indexes that keep every event's work small.

Handlers change the records through these methods alone, because each keeps the indexes true: the
line of models to start, `free_nodes`, `idle` and `busy` replicas in the order of their last
change, each node's pinned and evictable bytes, and the timers.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping
from typing import TypeVar

from flashserve.config import PolicySettings
from flashserve.control.estimates import Estimates
from flashserve.control.line import Line
from flashserve.control.records import (
    DRAINING,
    READY,
    STARTING,
    Model,
    Node,
    Replica,
    Request,
    Resident,
    Status,
)
from flashserve.control.timers import Timer, TimerKind, Timers
from flashserve.policy import keepalive
from flashserve.policy.cost import Prices, Rates, extent_bytes
from flashserve.policy.plans import Policy, bounded
from flashserve.types import (
    ModelId,
    ModelSpec,
    NodeId,
    NodeSpec,
    ReplicaId,
    RequestId,
    Scaling,
    Tier,
)

_DISK, _DRAM = Tier.DISK, Tier.DRAM


class State:
    def __init__(
        self,
        settings: PolicySettings,
        rates: Rates,
        policy: Policy,
        prices: Prices,
        weights: Mapping[str, float],
    ) -> None:
        self.settings = settings
        self.policy = policy
        self.prices = prices
        self.weights = weights
        """Of tenants; others have 1."""
        self.models: dict[ModelId, Model] = {}
        self.nodes: dict[NodeId, Node] = {}
        self.replicas: dict[ReplicaId, Replica] = {}
        self.requests: dict[RequestId, Request] = {}
        self.free_nodes: dict[NodeId, Node] = {}
        self.idle: dict[ReplicaId, Replica] = {}
        """Those that may give way."""
        self.unplanned: dict[ModelId, Model] = {}
        """Models about which the policy is to be asked at the end of this event."""
        self.reviewed: dict[ModelId, Model] = {}
        """Models with a new forecast of starts, whose bytes may be worth a place in DRAM."""
        self.to_stage: dict[ModelId, Model] = {}
        """Models whose bytes may be worth a place in DRAM, while their nodes bring others there."""
        self.can_stage = False
        """In this event something was added to them, or a node has ended to bring bytes."""
        self.short: dict[ModelId, Model] = {}
        """Models with fewer replicas than their plan wants, and no request that waits for one."""
        self.room_version = 0
        """Grows whenever a start that found no room might find some."""
        self.busy: dict[ReplicaId, Replica] = {}
        self.unheld: list[Request] = []
        """Requests that began to wait in this event and have not been told so."""
        self.estimates = Estimates(rates)
        self.timers = Timers(self._due_at)
        self.line = Line(self.timers, settings.slot_patience_s)
        self.epochs: dict[NodeId, int] = {}
        """The last epoch seen of every node, also of lost ones."""
        self.num_workers = 0
        self.largest_bytes = 0
        self.max_sequences = 1
        self._capacities = collections.Counter[int]()
        self._sequences = collections.Counter[int]()
        """Nodes by bytes of DRAM and by sequences of a replica; most are alike."""
        self.num_running = 0
        self.fill_at: float | None = None
        """When the turn of those comes who are farther behind in line; see slots.py."""
        self.is_draining = False
        self._num_started = 0
        self._num_arrived = 0

    def new_replica_id(self, model_id: ModelId) -> ReplicaId:
        """Never used twice, not even by a model that was deleted and deployed again."""
        self._num_started += 1
        return ReplicaId(f"{model_id}#{self._num_started}")

    def new_sequence(self) -> int:
        self._num_arrived += 1
        return self._num_arrived

    def find(self, model_id: ModelId) -> Model | None:
        """A deployed model; None when it is not, or not any more."""
        model = self.models.get(model_id)
        return None if model is None or model.is_deleted else model

    def bounds(self, model: Model) -> Scaling:
        """Of its replicas; max_replicas is the server's where it has none of its own."""
        if model.bounds is None or model.bounds_of is not model.spec.scaling:
            model.bounds_of = model.spec.scaling
            model.bounds = bounded(model.bounds_of, self.settings.max_replicas)
        return model.bounds

    def tier(self, model: Model) -> Tier:
        """The highest tier that holds the model's bytes anywhere."""
        for replica in model.replicas.values():
            if replica.status is not STARTING:
                return Tier.DEVICE
        for node_id in model.dram_nodes:
            if self.nodes[node_id].resident[model.model_id].is_loaded:
                return _DRAM
        return max(model.spec.lowest_tier, Tier.DISK if model.disk_nodes else Tier.REMOTE)

    def nearest(self, model: Model) -> tuple[NodeId, Tier]:
        """The node that has most of the model, or any, and where it has it."""
        for node_id in model.dram_nodes or model.disk_nodes or self.nodes:
            return node_id, self.tier_on(model, self.nodes[node_id])
        return NodeId(""), model.spec.lowest_tier

    def tier_on(self, model: Model, node: Node) -> Tier:
        """Where one node has the model's bytes, replicas apart."""
        resident = node.resident.get(model.model_id)
        if resident and resident.is_loaded:
            return _DRAM
        lowest = model.spec.lowest_tier
        return _DISK if lowest < _DISK and node.node_id in model.disk_nodes else lowest

    # Requests

    def enqueue(self, model: Model, requests: list[Request], now: float) -> None:
        """Let requests wait in order of arrival, so that ones from a lost replica come first."""
        last = next(reversed(model.waiting.values()), None)
        for request in requests:
            request.replica_id = request.startup = None
            request.waiting_since = now
            model.waiting[request.request_id] = request
            self.requests[request.request_id] = request
            self.unheld.append(request)
            timer = Timer(TimerKind.DEADLINE, request.request_id)
            self.timers.schedule(timer, request.deadline_at)
            self.unplanned[model.model_id] = model
        model.shares.wait(requests)
        if requests and last and requests[0].sequence < last.sequence:
            ordered = sorted(model.waiting.values(), key=lambda request: request.sequence)
            model.waiting = {request.request_id: request for request in ordered}
        self.line.review(model)

    def forget_waiting(self, model: Model, request: Request) -> None:
        del model.waiting[request.request_id]
        model.shares.stop_waiting(request)
        del self.requests[request.request_id]
        self.line.review(model)

    def begin(self, model: Model, request: Request, replica: Replica, now: float) -> None:
        """The request runs on a replica from now on."""
        if model.waiting.pop(request.request_id, None):
            model.shares.stop_waiting(request)
        model.shares.run(request)
        self.requests[request.request_id] = request
        request.replica_id = replica.replica_id
        request.dispatched_at = now
        replica.in_flight[request.request_id] = request
        if request.adapter or request.prefix is not None:
            _remember(replica, request)
        model.num_running += 1
        self.num_running += 1
        if model.num_running > model.scale_out_at:
            self.unplanned[model.model_id] = model
        if len(replica.in_flight) == 1:
            replica.changed_at = now
            self._reindex(replica)

    def end(self, request: Request, replica: Replica, now: float) -> None:
        """The request runs no more and is forgotten."""
        del self.requests[request.request_id]
        del replica.in_flight[request.request_id]
        model = self.models[replica.model_id]
        model.shares.stop_running(request)
        model.num_running -= 1
        self.num_running -= 1
        if not replica.in_flight:
            replica.changed_at = now
            self._reindex(replica)
            self.unplanned[replica.model_id] = model

    def take_in_flight(self, replica: Replica) -> list[Request]:
        """Take every running request from a replica that is gone, in order of arrival."""
        requests = sorted(replica.in_flight.values(), key=lambda request: request.sequence)
        replica.in_flight.clear()
        for request in requests:
            del self.requests[request.request_id]
        self._count_ended(replica.model_id, requests)
        return requests

    def _count_ended(self, model_id: ModelId, requests: list[Request]) -> None:
        model = self.models[model_id]
        for request in requests:
            model.shares.stop_running(request)
        model.num_running -= len(requests)
        self.num_running -= len(requests)

    # Replicas

    def add_replica(self, replica: Replica) -> None:
        node, model = self.nodes[replica.node_id], self.models[replica.model_id]
        self.replicas[replica.replica_id] = replica
        node.replicas[replica.replica_id] = replica
        model.replicas[replica.replica_id] = replica
        model.num_serving += replica.status is not DRAINING
        self._review_slots(node)
        self._refresh_pin(node, model)
        self.line.review(model)
        self.unplanned[model.model_id] = model

    def remove_replica(self, replica: Replica, now: float) -> None:
        """Its slot is free; requests must have been taken from it before."""
        node, model = self.nodes[replica.node_id], self.models[replica.model_id]
        del self.replicas[replica.replica_id]
        del node.replicas[replica.replica_id]
        del model.replicas[replica.replica_id]
        model.num_serving -= replica.status is not DRAINING
        self.idle.pop(replica.replica_id, None)
        self.busy.pop(replica.replica_id, None)
        node.idle.pop(replica.replica_id, None)
        if resident := node.resident.get(model.model_id):
            resident.touched_at = now
        self._review_slots(node)
        self._refresh_pin(node, model)
        self.line.review(model)
        self._room_grew()
        self.unplanned[model.model_id] = model

    def set_status(self, replica: Replica, status: Status, now: float) -> None:
        model = self.models[replica.model_id]
        change = (replica.status is DRAINING) - (status is DRAINING)
        replica.status = status
        replica.changed_at = now
        self._reindex(replica)
        if change:
            model.num_serving += change
            self.line.review(model)
            self.unplanned[model.model_id] = model

    def set_kept(self, replica: Replica, is_kept: bool) -> None:
        """Whether the replica is one of those that its model always has."""
        if replica.is_kept != is_kept:
            replica.is_kept = is_kept
            self._reindex(replica)

    def fill_on(self, now: float) -> None:
        """The turn of models farther behind in line comes at once, in another event."""
        self.fill_at = now
        self.timers.schedule(Timer(TimerKind.FILL, ""), now)

    def watch_keep_alive(self, replica: Replica) -> None:
        due = self._keep_alive_ends(replica)
        if due is not None and due < math.inf:
            self.timers.schedule(Timer(TimerKind.KEEP_ALIVE, replica.replica_id), due)

    def set_short(self, model: Model, is_short: bool, now: float) -> None:
        """Whether the model wants a start ahead of requests."""
        if is_short == (model.model_id in self.short):
            return
        if not is_short:
            del self.short[model.model_id]
        else:
            self.short[model.model_id] = model
            model.room_seen = -1
            if model.no_start_before <= now:
                model.no_start_before = 0.0

    def _room_grew(self) -> None:
        self.room_version += 1
        self.line.clear_shunned()

    def _reindex(self, replica: Replica) -> None:
        node, replica_id = self.nodes[replica.node_id], replica.replica_id
        is_busy = bool(replica.in_flight) and replica.status is READY
        if not is_busy and replica.is_spare:
            self.busy.pop(replica_id, None)
            self.idle[replica_id] = node.idle[replica_id] = replica
            self.room_version += 1
            self._refresh_pin(node, self.models[replica.model_id])
            return
        self.idle.pop(replica_id, None)
        node.idle.pop(replica_id, None)
        if is_busy:
            self.busy[replica_id] = replica
        else:
            self.busy.pop(replica_id, None)
        resident = node.resident.get(replica.model_id)
        if resident is not None and not resident.is_pinned:
            resident.is_pinned = True
            node.pinned_bytes += resident.num_bytes
            node.evictable.pop(replica.model_id, None)

    def _review_slots(self, node: Node) -> None:
        self.free_nodes.pop(node.node_id, None)  # the next start goes to another node, all equal
        if node.free_slots > 0:
            self.free_nodes[node.node_id] = node

    # DRAM

    def hold_bytes(self, node: Node, model: ModelSpec, now: float) -> Resident:
        """The model's bytes count as used on the node from now on, loaded or on the way."""
        resident = node.resident.get(model.model_id)
        if resident is None:
            resident = Resident(extent_bytes(model.size_bytes), touched_at=now)
            node.resident[model.model_id] = resident
            node.used_bytes += resident.num_bytes
            self.models[model.model_id].dram_nodes[node.node_id] = None
        resident.touched_at = now
        self._refresh_pin(node, self.models[model.model_id])
        return resident

    def set_staging(self, node: Node, model_id: ModelId, is_staging: bool) -> None:
        resident = node.resident[model_id]
        self.can_stage |= resident.is_staging and not is_staging
        node.num_staging += is_staging - resident.is_staging
        resident.is_staging = is_staging
        self._refresh_pin(node, self.models[model_id])

    def set_fetched(self, node: Node, model: Model, is_fetched: bool) -> None:
        """Whether the node's disk has a copy that FlashServe made."""
        if is_fetched and model.spec.lowest_tier < Tier.DISK:
            node.fetched[model.model_id] = model.disk_nodes[node.node_id] = None
        elif not is_fetched:
            node.fetched.pop(model.model_id, None)
            model.disk_nodes.pop(node.node_id, None)

    def drop_bytes(self, node: Node, model_id: ModelId) -> None:
        resident = node.resident.pop(model_id, None)
        if resident is None:
            return
        node.used_bytes -= resident.num_bytes
        node.num_staging -= resident.is_staging
        self.can_stage |= resident.is_staging
        node.pinned_bytes -= resident.num_bytes if resident.is_pinned else 0
        node.evictable.pop(model_id, None)
        del self.models[model_id].dram_nodes[node.node_id]
        self._room_grew()

    def _refresh_pin(self, node: Node, model: Model) -> None:
        resident = node.resident.get(model.model_id)
        if resident is None:
            return
        pinned, is_here, node_id = resident.is_staging, False, node.node_id
        for replica in model.replicas.values():
            if replica.node_id == node_id:
                is_here = True
                if not pinned and not replica.is_spare:
                    pinned = True
        if pinned != resident.is_pinned:
            resident.is_pinned = pinned
            node.pinned_bytes += resident.num_bytes if pinned else -resident.num_bytes
        if pinned or is_here:
            node.evictable.pop(model.model_id, None)
        else:
            node.evictable.setdefault(model.model_id)

    # Nodes

    def add_node(self, spec: NodeSpec) -> None:
        node = Node(spec)
        self.nodes[spec.node_id] = node
        self.epochs[spec.node_id] = spec.epoch
        self._review_slots(node)
        self._count_node(node, 1)
        self._room_grew()

    def forget_bytes(self, node: Node) -> None:
        """Everything that was in the node's DRAM or on its disk is gone."""
        for model_id in list(node.resident):
            self.drop_bytes(node, model_id)
        for model_id in node.fetched:
            del self.models[model_id].disk_nodes[node.node_id]
        node.fetched.clear()
        node.pending_evicts.clear()

    def remove_node(self, node: Node) -> None:
        """Its bytes must have been forgotten and its replicas removed before."""
        for model_id in node.claims:
            self.models[model_id].claim = None
        del self.nodes[node.node_id]
        self.free_nodes.pop(node.node_id, None)
        self.estimates.forget(node.node_id)
        self._count_node(node, -1)

    def _count_node(self, node: Node, change: int) -> None:
        self.num_workers += change * node.spec.num_workers
        for counts, value in (
            (self._capacities, node.capacity_bytes),
            (self._sequences, node.spec.max_sequences),
        ):
            counts[value] += change
            if not counts[value]:
                del counts[value]
        self.largest_bytes = max(self._capacities, default=0)
        self.max_sequences = min(self._sequences, default=1)

    # Timers

    def watch_review(self, model: Model) -> None:
        due = self.review_at(model)
        if due is not None:
            self.timers.schedule(model.review_timer, due)

    def review_at(self, model: Model) -> float | None:
        """When the policy is to be asked about the model, with no other event."""
        due = model.plan.review_at
        if model.no_start_before > 0 and model.model_id in self.short:
            due = min(due, model.no_start_before)
        return due if due < math.inf else None

    def _keep_alive_ends(self, replica: Replica) -> float | None:
        """When an idle replica stops; None while it works or its model's plan wants it."""
        if not replica.is_idle:
            return None
        model = self.models[replica.model_id]
        if model.num_serving <= model.plan.replicas:
            return None
        return keepalive.expires_at(replica.changed_at, model.plan.keep_idle_s)

    def _due_at(self, timer: Timer) -> float | None:
        kind = timer.kind
        if kind is TimerKind.KEEP_ALIVE:  # the most frequent ones first
            replica = self.replicas.get(ReplicaId(timer.key))
            return self._keep_alive_ends(replica) if replica else None
        if kind is TimerKind.REVIEW:
            model = self.find(ModelId(timer.key))
            return self.review_at(model) if model else None
        if kind is TimerKind.DEADLINE:
            request = self.requests.get(RequestId(timer.key))
            waits = request is not None and request.replica_id is None
            return request.deadline_at if request and waits else None
        return self._rare_due_at(kind, ModelId(timer.key))

    def _rare_due_at(self, kind: TimerKind, model_id: ModelId) -> float | None:
        if kind is TimerKind.PATIENCE:
            model = self.line.models.get(model_id)
            return model.patience_at if model else None
        if kind is TimerKind.FILL:
            return self.fill_at
        if kind is TimerKind.RETRY:
            model = self.line.shunning.get(model_id)
            return model.retry_at if model else None
        assert kind is TimerKind.BACKOFF
        model = self.models.get(model_id)
        return model.failure.until if model and model.failure else None


_Key = TypeVar("_Key", str, int)
_NUM_ADAPTERS = 64
_NUM_PREFIXES = 512


def _remember(replica: Replica, request: Request) -> None:
    """What the replica has computed with lately; its engine is taken to have it still."""
    if request.adapter:
        _use(replica.adapters, request.adapter, _NUM_ADAPTERS)
    if request.prefix is not None:
        _use(replica.prefixes, request.prefix, _NUM_PREFIXES)


def _use(recent: dict[_Key, None], key: _Key, limit: int) -> None:
    recent.pop(key, None)
    recent[key] = None
    if len(recent) > limit:
        del recent[next(iter(recent))]
