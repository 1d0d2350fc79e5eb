"""Orders that the controller gives. Each names the wanted state and carries its reason."""

from __future__ import annotations

import msgspec

from flashserve.types import ModelSpec, NodeId, Phases, ReplicaId, RequestId, Tier


class StartReplica(msgspec.Struct, frozen=True):
    """Wanted: a ready replica of `model` on a worker, whatever tier its bytes are in."""

    node_id: NodeId
    epoch: int
    replica_id: ReplicaId
    model: ModelSpec
    reason: str


class StopReplica(msgspec.Struct, frozen=True):
    """Wanted: the replica's worker is spare again. Its bytes stay in DRAM."""

    node_id: NodeId
    epoch: int
    replica_id: ReplicaId
    model: ModelSpec
    reason: str


class Stage(msgspec.Struct, frozen=True):
    """Wanted: the model's bytes in `tier` (DISK or DRAM) of the node."""

    node_id: NodeId
    epoch: int
    model: ModelSpec
    tier: Tier
    reason: str


class Evict(msgspec.Struct, frozen=True):
    """Wanted: none of the model's bytes in `tier` or above. Never ordered under a replica."""

    node_id: NodeId
    epoch: int
    model: ModelSpec
    tier: Tier
    reason: str


class Hold(msgspec.Struct, frozen=True):
    """The request waits for a cold start or a slot; `predicted` is its estimated way to a token."""

    request_id: RequestId
    tier: Tier
    predicted: Phases
    reason: str


class Dispatch(msgspec.Struct, frozen=True):
    """Send the request to a ready replica.

    tier: where the model was when the request arrived (DEVICE: warm); predicted: as estimated at
    arrival; startup: what the cold start that it waited for took, None for a warm request.
    """

    request_id: RequestId
    node_id: NodeId
    replica_id: ReplicaId
    tier: Tier
    predicted: Phases
    startup: Phases | None
    reason: str


class Reject(msgspec.Struct, frozen=True):
    """The request will not be served; code as in errors.py."""

    request_id: RequestId
    code: str
    message: str
    retry_after_s: float | None = None


NodeCommand = StartReplica | StopReplica | Stage | Evict
RequestCommand = Hold | Dispatch | Reject
Command = NodeCommand | RequestCommand
