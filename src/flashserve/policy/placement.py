"""Which node starts a model: the one with the least estimated time to readiness."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from flashserve.policy import text
from flashserve.types import NodeId, Tier


class NodeView(msgspec.Struct, frozen=True):
    """A node that could take the model now, or after stopping and evicting what is not in use."""

    node_id: NodeId
    tier: Tier
    """Where this node has the model's bytes."""
    startup_s: float
    """What a start of the model is predicted to take there."""
    free_slots: int
    free_bytes: int


class Placement(msgspec.Struct, frozen=True):
    node_id: NodeId
    tier: Tier
    reason: str


def place(nodes: Iterable[NodeView]) -> Placement | None:
    """The node where the model would be ready first; None when there is no node.

    Ties go to the node with more free slots, then more free memory, then the smaller identifier.
    """
    ranked = [
        (node.startup_s, -node.free_slots, -node.free_bytes, node.node_id, node) for node in nodes
    ]
    if not ranked:
        return None
    ranked.sort()
    best = ranked[0][-1]
    reason = f"{best.tier.label} on {best.node_id}: {text.seconds(best.startup_s)} predicted"
    if len(ranked) > 1:
        other = ranked[1][-1]
        reason += f", next best {other.node_id} {text.seconds(other.startup_s)}"
    return Placement(best.node_id, best.tier, reason)
