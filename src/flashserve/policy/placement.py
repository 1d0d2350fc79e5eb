"""Which node starts a model: the one with the least estimated time to readiness."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

from flashserve.policy import text
from flashserve.policy.cost import Costs, predict_start
from flashserve.types import NodeId, Phases, Tier


@dataclasses.dataclass(frozen=True, slots=True)
class NodeView:
    """A node that could take the model now, or after stopping and evicting what is not in use."""

    node_id: NodeId
    tier: Tier
    """Where this node has the model's bytes."""
    costs: Costs
    free_slots: int
    free_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    node_id: NodeId
    phases: Phases
    reason: str


def place(nodes: Iterable[NodeView], size_bytes: int) -> Placement | None:
    """The node where the model would be ready first; None when there is no node.

    Ties go to the node with more free slots, then more free memory, then the smaller identifier.
    """
    ranked = sorted(
        ((predict_start(size_bytes, node.tier, node.costs), node) for node in nodes),
        key=lambda pair: (
            pair[0].startup_s,
            -pair[1].free_slots,
            -pair[1].free_bytes,
            pair[1].node_id,
        ),
    )
    if not ranked:
        return None
    phases, best = ranked[0]
    reason = f"{best.tier.label} on {best.node_id}: {text.seconds(phases.startup_s)} predicted"
    if len(ranked) > 1:
        other_phases, other = ranked[1]
        reason += f", next best {other.node_id} {text.seconds(other_phases.startup_s)}"
    return Placement(best.node_id, phases, reason)
