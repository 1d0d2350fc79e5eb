"""The records that the controller keeps: requests, replicas, models and nodes.

knowledge.py holds them; state.py changes them, alone, and keeps its indexes true.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from typing import TypeVar

import msgspec

from flashserve.control.demand import Demand
from flashserve.control.shares import Shares
from flashserve.control.timers import Timer, TimerKind
from flashserve.policy.admission import Failure
from flashserve.policy.cost import EXTENT_BYTES, WorkerState, extent_bytes
from flashserve.policy.plans import Plan
from flashserve.types import (
    ModelId,
    ModelSpec,
    NodeId,
    NodeSpec,
    Phases,
    ReplicaId,
    RequestId,
    Scaling,
    Tier,
)


class Status(enum.Enum):
    """A replica's life as the controller sees it; once its stop is ordered, it is forgotten."""

    STARTING = "loading"
    READY = "ready"
    DRAINING = "draining"
    """It finishes what it runs and takes no more."""


STARTING, READY, DRAINING = Status.STARTING, Status.READY, Status.DRAINING
"""By themselves: all ask for them, and an enumeration looks its members up slowly."""


_UNTOLD = Phases()
_NUM_ADAPTERS = 64
_NUM_PREFIXES = 512


class Request(msgspec.Struct):
    request_id: RequestId
    model_id: ModelId
    sequence: int
    """Order of arrival; every queue is in this order."""
    deadline_s: float
    waiting_since: float
    tenant: str = ""
    weight: float = 1.0
    """The tenant's."""
    adapter: str = ""
    prefix: int | None = None
    attempts: int = 0
    """Replicas that it has lost."""
    tier: Tier = Tier.REMOTE
    predicted: Phases = _UNTOLD
    startup: Phases | None = None
    """What the start that it waited for took."""
    replica_id: ReplicaId | None = None
    """None while it waits."""
    dispatched_at: float | None = None

    @property
    def deadline_at(self) -> float:
        return self.waiting_since + self.deadline_s


class Replica(msgspec.Struct):
    replica_id: ReplicaId
    model: ModelSpec
    """As it was when this replica was ordered; a later deployment may differ."""
    node_id: NodeId
    epoch: int
    limit: int
    """Requests that it takes at once."""
    started_at: float
    phases: Phases
    """Predicted while starting, actual once ready."""
    worker: WorkerState
    status: Status = STARTING
    ready_at: float = 0.0
    changed_at: float = 0.0
    """Since when it has been idle, or busy."""
    is_kept: bool = False
    """One of the model's min_replicas: it gives way to nobody."""
    is_yielding: bool = False
    """It drains only for a model that claims room on its node, and resumes if that ends."""
    drain_reason: str = ""
    in_flight: dict[RequestId, Request] = msgspec.field(default_factory=dict)
    adapters: dict[str, None] = msgspec.field(default_factory=dict)
    """Those that it has answered with, least recently first."""
    prefixes: dict[int, None] = msgspec.field(default_factory=dict)
    model_id: ModelId = ModelId("")
    """The model's; an attribute, since all ask for it."""

    def __post_init__(self) -> None:
        self.model_id = self.model.model_id

    @property
    def is_idle(self) -> bool:
        return not self.in_flight and self.status is READY

    @property
    def is_spare(self) -> bool:
        """Idle, and may give way to another model."""
        return not self.in_flight and self.status is READY and not self.is_kept

    def remember(self, request: Request) -> None:
        """What it has computed with lately; its engine is taken to have it still."""
        if request.adapter:
            _use(self.adapters, request.adapter, _NUM_ADAPTERS)
        if request.prefix is not None:
            _use(self.prefixes, request.prefix, _NUM_PREFIXES)


_Key = TypeVar("_Key", str, int)


def _use(recent: dict[_Key, None], key: _Key, limit: int) -> None:
    recent.pop(key, None)
    recent[key] = None
    if len(recent) > limit:
        del recent[next(iter(recent))]


@dataclasses.dataclass(slots=True)
class Model(Demand):
    spec: ModelSpec
    waiting: dict[RequestId, Request] = dataclasses.field(default_factory=dict)
    shares: Shares = dataclasses.field(default_factory=Shares)
    """The same requests, and those that run, by tenant."""
    replicas: dict[ReplicaId, Replica] = dataclasses.field(default_factory=dict)
    dram_nodes: dict[NodeId, None] = dataclasses.field(default_factory=dict)
    """Nodes where its bytes are in DRAM or on the way there."""
    disk_nodes: dict[NodeId, None] = dataclasses.field(default_factory=dict)
    """Nodes that fetched it to their disk, when its lowest tier is REMOTE."""
    num_running: int = 0
    num_serving: int = 0
    """Replicas that are starting or ready."""
    last_used_at: float | None = None
    reason: str = ""
    failure: Failure | None = None
    plan: Plan = dataclasses.field(default_factory=lambda: Plan(0, 0.0))
    """The policy's last answer."""
    scale_out_at: float = math.inf
    """With more requests than this, the policy is asked for another replica."""
    room_seen: int = -1
    """State.room_version when a start ahead last found no room."""
    no_start_before: float = 0.0
    """Starts ahead wait so long after one that was lost."""
    no_stage_before: float = 0.0
    is_dismissed: bool = False
    """Somebody had it evicted: nothing brings it back but a request, a stage or its bounds."""
    memory_failures: int = 0
    shunned: dict[NodeId, None] = dataclasses.field(default_factory=dict)
    """Nodes that just had no memory for it; cleared when anything changes or at retry_at."""
    retry_at: float = 0.0
    place_in_line: int = 0
    """Smaller is further ahead, among the models that want a slot."""
    patience_at: float = 0.0
    claim: NodeId | None = None
    """The node on which replicas drain so that this model gets room."""
    is_deleted: bool = False
    """Only its last replicas remain."""
    bounds: Scaling | None = None
    bounds_of: Scaling | None = None
    """What State.bounds found, of which spec.scaling."""
    model_id: ModelId = dataclasses.field(init=False)  # == spec.model_id, whatever spec it has
    review_timer: Timer = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        self.model_id = self.spec.model_id
        self.review_timer = Timer(TimerKind.REVIEW, self.model_id)

    @property
    def is_wanting(self) -> bool:
        """It has waiting requests and no replica that would serve them."""
        return bool(self.waiting) and not self.num_serving


@dataclasses.dataclass(slots=True)
class Resident:
    """A model's bytes in one node's DRAM, from the order that brings them to the one that evicts.

    Bytes of a start or Stage that failed stay counted, though they may never have arrived: the
    node could still hold them, and evicting what is not there costs nothing.
    Pinned: a replica starts, runs or drains on them, or a Stage is under way.
    """

    num_bytes: int
    touched_at: float
    is_loaded: bool = False
    is_staging: bool = False
    is_pinned: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class PendingEvict:
    """Evict as soon as the model's last replica on the node has stopped."""

    model: ModelSpec
    tier: Tier
    reason: str


@dataclasses.dataclass(slots=True)
class Node:
    spec: NodeSpec
    num_live: int = 0
    """Worker processes past their start."""
    used_bytes: int = 0  # == sum of resident bytes, in [0, capacity_bytes] as far as we order it
    pinned_bytes: int = 0  # == sum of pinned resident bytes
    replicas: dict[ReplicaId, Replica] = dataclasses.field(default_factory=dict)
    idle: dict[ReplicaId, Replica] = dataclasses.field(default_factory=dict)
    """Those that may give way."""
    num_staging: int = 0
    resident: dict[ModelId, Resident] = dataclasses.field(default_factory=dict)
    fetched: dict[ModelId, None] = dataclasses.field(default_factory=dict)
    """Models whose disk_nodes name this node."""
    evictable: dict[ModelId, None] = dataclasses.field(default_factory=dict)
    """Resident, not pinned, under no replica; least recently used first."""
    pending_evicts: dict[ModelId, PendingEvict] = dataclasses.field(default_factory=dict)
    unanswered_evicts: dict[ModelId, int] = dataclasses.field(default_factory=dict)
    stage_failures: dict[ModelId, int] = dataclasses.field(default_factory=dict)
    claims: dict[ModelId, None] = dataclasses.field(default_factory=dict)
    node_id: NodeId = dataclasses.field(init=False)
    num_workers: int = dataclasses.field(init=False)
    capacity_bytes: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """The spec of a node stays: one that joins anew is another Node."""
        self.node_id = self.spec.node_id
        self.num_workers = self.spec.num_workers
        self.capacity_bytes = self.spec.dram_bytes // EXTENT_BYTES * EXTENT_BYTES

    @property
    def free_bytes(self) -> int:
        return self.capacity_bytes - self.used_bytes

    @property
    def free_slots(self) -> int:
        return self.num_workers - len(self.replicas)

    @property
    def num_kept(self) -> int:
        return sum(replica.is_kept for replica in self.replicas.values())

    def replicas_of(self, model: Model) -> list[Replica]:
        node_id = self.node_id
        return [r for r in model.replicas.values() if r.node_id == node_id]

    def has_room(self, spec: ModelSpec) -> bool:
        """Whether the model's bytes fit once all that is neither pinned nor its own is evicted."""
        own = self.resident.get(spec.model_id)
        pinned = self.pinned_bytes - (own.num_bytes if own and own.is_pinned else 0)
        return self.capacity_bytes - pinned >= extent_bytes(spec.size_bytes)
