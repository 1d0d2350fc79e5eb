"""Which ready replica takes a request: where its first token is predicted soonest.

A replica computes what runs on it in one batch, so a prompt waits for a share of the others'; an
adapter that it does not hold is copied there first, and a prompt that begins like one before is
computed from where they differ.
"""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from flashserve.policy import text
from flashserve.types import ReplicaId

ADAPTER_MISS_S = 0.03
"""Until an adapter has come from DRAM."""
PREFIX_SHARE = 0.5
"""Of a prefill that a known prefix is taken to save."""


class ReplicaLoad(msgspec.Struct, frozen=True):
    in_flight: int
    replica_id: ReplicaId
    limit: int
    """Sequences that the replica runs at once; beyond it a request would only wait there."""
    has_adapter: bool = True
    """It holds the adapter that the request asks for, or none is asked for."""
    has_prefix: bool = False
    """It has computed a prompt that begins like this one."""


def route(loads: Iterable[ReplicaLoad], prefill_s: float) -> tuple[ReplicaId, str] | None:
    """The replica with room where the first token would come soonest, and why.

    None when none has room. Ties go to the smaller identifier.

    Args:
        prefill_s: from dispatch to first token on a replica of this model that does nothing else.
    """
    ranked = sorted(
        (_seconds(load, prefill_s), load.in_flight, load.replica_id, load)
        for load in loads
        if load.in_flight < load.limit
    )
    if not ranked:
        return None
    best_s, _, replica_id, best = ranked[0]
    reason = f"{replica_id}: {text.seconds(best_s)}, {_describe(best)}"
    if len(ranked) > 1:
        other_s, _, other_id, other = ranked[1]
        reason += f"; next best {other_id}: {text.seconds(other_s)}, {_describe(other)}"
    return replica_id, reason


def only(load: ReplicaLoad) -> tuple[ReplicaId, str] | None:
    """The same where there is one replica: nothing is compared."""
    if load.in_flight >= load.limit:
        return None
    return load.replica_id, f"{load.replica_id} is the only one: {load.in_flight} of {load.limit}"


def _seconds(load: ReplicaLoad, prefill_s: float) -> float:
    shared = prefill_s * (1 + load.in_flight / load.limit)
    saved = prefill_s * PREFIX_SHARE if load.has_prefix else 0.0
    return shared - saved + (0.0 if load.has_adapter else ADAPTER_MISS_S)


def _describe(load: ReplicaLoad) -> str:
    parts = [f"{load.in_flight} of {load.limit}"]
    if not load.has_adapter:
        parts.append("adapter to load")
    if load.has_prefix:
        parts.append("prefix known")
    return ", ".join(parts)
