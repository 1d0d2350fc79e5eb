"""How the controller's knowledge changes, with the indexes that keep every event's work small.

Handlers change the records through these methods alone, because each keeps the indexes true: the
line of models to start, `free_nodes`, `idle` and `busy` replicas in the order of their last
change, each node's pinned and evictable bytes, and the timers.
"""

from __future__ import annotations

from flashserve.control.knowledge import Knowledge
from flashserve.control.records import (
    DRAINING,
    READY,
    Model,
    Node,
    Replica,
    Request,
    Resident,
    Status,
)
from flashserve.control.timers import Timer, TimerKind
from flashserve.policy.cost import extent_bytes
from flashserve.types import ModelId, ModelSpec, NodeSpec, Tier


class State(Knowledge):
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
            replica.remember(request)
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
