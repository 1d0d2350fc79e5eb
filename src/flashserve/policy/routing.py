"""Which ready replica takes a request."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from flashserve.types import ReplicaId


class ReplicaLoad(NamedTuple):
    in_flight: int
    replica_id: ReplicaId
    limit: int
    """Sequences that the replica runs at once; beyond it a request would only wait there."""


def route(loads: Iterable[ReplicaLoad]) -> tuple[ReplicaId, str] | None:
    """The least loaded replica with room, and why; None when there is none. Ties: identifier."""
    best = min((load for load in loads if load.in_flight < load.limit), default=None)
    if best is None:
        return None
    return best.replica_id, f"{best.replica_id} is least loaded: {best.in_flight} of {best.limit}"
