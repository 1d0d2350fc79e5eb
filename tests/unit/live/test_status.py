"""What the nodes say of their memory, put together."""

from __future__ import annotations

import asyncio
import dataclasses

from flashserve.errors import UnavailableError
from flashserve.live.status import gather_stats, gather_tiers
from flashserve.messages.work import WorkerStats
from flashserve.node.client import ModelResidence, NodeStats
from flashserve.store.dram.arena import ArenaUsage
from flashserve.store.guard import ScrubReport
from flashserve.store.reporting import ArenaReport, StoreReport, TierReport
from flashserve.types import KVUsage, ModelId, NodeId, NodeSpec, ReplicaId, Tier

A, B = ModelId("a"), ModelId("b/c#d")


class FakeNode:
    def __init__(self, stats: NodeStats | None) -> None:
        self.spec = NodeSpec(NodeId("n"), 1, 1, 1)
        self._stats = stats

    async def stats(self) -> NodeStats:
        if self._stats is None:
            raise UnavailableError("the node does not answer")
        return self._stats


def node_stats(dram_bytes: int, replicas: dict[str, KVUsage]) -> NodeStats:
    return NodeStats(
        ArenaUsage(100, 50, 50),
        {A: ModelResidence(Tier.DRAM, dram_bytes, 2 * dram_bytes, 1)},
        {ReplicaId(name): WorkerStats(kv, 0, 0) for name, kv in replicas.items()},
    )


def test_memory_adds_up_over_nodes_and_replicas_and_a_silent_node_is_left_out() -> None:
    nodes = [
        FakeNode(node_stats(3, {"a#1": KVUsage(10, 1, 2, 7), "b/c#d#3": KVUsage(5, 0, 0, 5)})),
        FakeNode(None),
        FakeNode(node_stats(4, {"a#2": KVUsage(10, 4, 0, 6)})),
    ]
    stats = asyncio.run(gather_stats(nodes))  # type: ignore[arg-type]
    assert stats.dram_bytes == {A: 7}
    assert stats.disk_bytes == {A: 14}
    assert stats.leases == {A: 2}
    assert stats.kv == {A: KVUsage(20, 5, 2, 13), B: KVUsage(5, 0, 0, 5)}


def test_tiers_come_from_the_nodes_that_answer_and_have_some() -> None:
    tier = TierReport(1, 1, 0, 1, 0, 0, 0)
    report = StoreReport(tier, None, ArenaReport(0, 0, False, 0, (), ()), ScrubReport(), (), {})
    with_store = dataclasses.replace(node_stats(3, {}), store=report)
    nodes = [FakeNode(with_store), FakeNode(None), FakeNode(node_stats(4, {}))]
    for name, node in zip("abc", nodes, strict=True):
        node.spec = NodeSpec(NodeId(name), 1, 1, 1)
    assert asyncio.run(gather_tiers(nodes)) == {NodeId("a"): report}  # type: ignore[arg-type]
