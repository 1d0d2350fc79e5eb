"""Facts that the controller is told. All are frozen values; none is an order."""

from __future__ import annotations

import msgspec

from flashserve.types import (
    ModelId,
    ModelSpec,
    NodeId,
    NodeSpec,
    Phases,
    ReplicaId,
    RequestId,
    Scaling,
    SeriesForecast,
    Tier,
)


class ModelDeployed(msgspec.Struct, frozen=True):
    model: ModelSpec


class ModelDeleted(msgspec.Struct, frozen=True):
    model_id: ModelId


class NodeJoined(msgspec.Struct, frozen=True):
    """A node with empty slots; an earlier incarnation of it (lower epoch) is gone."""

    node: NodeSpec


class NodeLost(msgspec.Struct, frozen=True):
    node_id: NodeId
    epoch: int


class WorkersChanged(msgspec.Struct, frozen=True):
    """How many worker processes of a node are alive and past their start, busy or spare."""

    node_id: NodeId
    num_ready: int


class RequestArrived(msgspec.Struct, frozen=True):
    request_id: RequestId
    model_id: ModelId
    num_prompt_tokens: int = 0
    deadline_s: float | None = None
    """Seconds from now in which the request must be dispatched; None follows the server."""
    adapter: str = ""
    """The adapter's name, if it asks for one; replicas that hold it answer sooner."""
    tenant: str = ""
    """Whose request it is, for fair shares; all without a name are one tenant."""
    prefix: int | None = None
    """Equal for prompts that begin alike; replicas that computed one before answer sooner."""


class RequestFinished(msgspec.Struct, frozen=True):
    """The request has its last token, failed for good, or its client went away."""

    request_id: RequestId
    prefill_s: float | None = None
    """Dispatch to first token; None when there was none."""


class StageRequested(msgspec.Struct, frozen=True):
    """Somebody asked for a model to be brought up to `tier` (DISK or DRAM)."""

    model_id: ModelId
    tier: Tier


class EvictRequested(msgspec.Struct, frozen=True):
    """Somebody asked for a model to leave `tier` (DRAM or DISK) and every tier above it."""

    model_id: ModelId
    tier: Tier


class ReplicaReady(msgspec.Struct, frozen=True):
    """A replica answers from now on. `phases` says what its start took."""

    node_id: NodeId
    replica_id: ReplicaId
    model_id: ModelId
    phases: Phases


class ReplicaFailed(msgspec.Struct, frozen=True):
    """A replica never became ready, for a reason of its model's (`code` as in errors.py)."""

    node_id: NodeId
    replica_id: ReplicaId
    model_id: ModelId
    code: str
    message: str


class ReplicaLost(msgspec.Struct, frozen=True):
    """The worker of a replica died while loading or serving; its requests must go on elsewhere."""

    node_id: NodeId
    replica_id: ReplicaId
    model_id: ModelId
    reason: str


class ReplicaStopped(msgspec.Struct, frozen=True):
    node_id: NodeId
    replica_id: ReplicaId
    model_id: ModelId


class Staged(msgspec.Struct, frozen=True):
    """A model's bytes are in `tier`. Sent for a Stage order and, with DRAM, inside a cold start."""

    node_id: NodeId
    model_id: ModelId
    tier: Tier
    num_bytes: int
    seconds: float


class StageFailed(msgspec.Struct, frozen=True):
    node_id: NodeId
    model_id: ModelId
    tier: Tier
    code: str
    message: str


class Evicted(msgspec.Struct, frozen=True):
    node_id: NodeId
    model_id: ModelId
    tier: Tier


FORECASTS_PER_EVENT = 8
"""So that no event of the controller's is long: each may be one more plan."""


class ForecastReady(msgspec.Struct, frozen=True):
    """Forecasts of a few series, each newer than the last one of the same series."""

    forecasts: tuple[SeriesForecast, ...]


class BoundsChanged(msgspec.Struct, frozen=True):
    """A model's bounds are others from now on: set by somebody, or by its schedule."""

    model_id: ModelId
    scaling: Scaling


class DrainStarted(msgspec.Struct, frozen=True):
    """The server is to stop: no new work is accepted, running work may finish."""


class Tick(msgspec.Struct, frozen=True):
    """Time has passed: deadlines and keep-alives may be due."""


NodeEvent = (
    WorkersChanged
    | ReplicaReady
    | ReplicaFailed
    | ReplicaLost
    | ReplicaStopped
    | Staged
    | StageFailed
    | Evicted
)
Event = (
    NodeEvent
    | ModelDeployed
    | ModelDeleted
    | NodeJoined
    | NodeLost
    | RequestArrived
    | RequestFinished
    | StageRequested
    | EvictRequested
    | ForecastReady
    | BoundsChanged
    | DrainStarted
    | Tick
)
