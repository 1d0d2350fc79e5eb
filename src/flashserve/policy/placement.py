"""Which node starts a model: the one with the least estimated time to readiness."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import msgspec

from flashserve.policy import text
from flashserve.policy.cost import Costs, predict_start, startup_s
from flashserve.types import NodeId, Phases, Tier


class NodeView(NamedTuple):
    """A node that could take the model now, or after stopping and evicting what is not in use."""

    node_id: NodeId
    tier: Tier
    """Where this node has the model's bytes."""
    costs: Costs
    free_slots: int
    free_bytes: int


class Placement(msgspec.Struct, frozen=True):
    node_id: NodeId
    phases: Phases
    reason: str


def place(nodes: Iterable[NodeView], size_bytes: int) -> Placement | None:
    """The node where the model would be ready first; None when there is no node.

    Ties go to the node with more free slots, then more free memory, then the smaller identifier.
    """
    ranked = sorted(
        (startup_s(size_bytes, node.tier, node.costs), -node.free_slots, -node.free_bytes, node)
        for node in nodes
    )
    if not ranked:
        return None
    best_s, *_, best = ranked[0]
    reason = f"{best.tier.label} on {best.node_id}: {text.seconds(best_s)} predicted"
    if len(ranked) > 1:
        other_s, *_, other = ranked[1]
        reason += f", next best {other.node_id} {text.seconds(other_s)}"
    return Placement(best.node_id, predict_start(size_bytes, best.tier, best.costs), reason)
