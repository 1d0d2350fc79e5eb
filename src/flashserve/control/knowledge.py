"""What the controller knows of everybody, and when something becomes due for whom.

Nothing here changes a record: state.py does.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Mapping

from flashserve.config import PolicySettings
from flashserve.control.estimates import Estimates
from flashserve.control.line import Line
from flashserve.control.records import STARTING, Model, Node, Replica, Request
from flashserve.control.timers import Timer, TimerKind, Timers
from flashserve.policy import keepalive
from flashserve.policy.cost import Prices, Rates
from flashserve.policy.plans import Policy, bounded
from flashserve.types import ModelId, NodeId, ReplicaId, RequestId, Scaling, Tier

_DISK, _DRAM = Tier.DISK, Tier.DRAM


class Knowledge:
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

    # Timers

    def fill_on(self, now: float) -> None:
        """The turn of models farther behind in line comes at once, in another event."""
        self.fill_at = now
        self.timers.schedule(Timer(TimerKind.FILL, ""), now)

    def watch_keep_alive(self, replica: Replica) -> None:
        due = self._keep_alive_ends(replica)
        if due is not None and due < math.inf:
            self.timers.schedule(Timer(TimerKind.KEEP_ALIVE, replica.replica_id), due)

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
