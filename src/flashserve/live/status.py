"""What a model's line of `flashserve ps` says, from the controller's view and the nodes' stats."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
from collections.abc import Mapping, Sequence

import structlog

from flashserve.control.controller import ModelView
from flashserve.errors import FlashServeError
from flashserve.live.modelrows import DeployedModel
from flashserve.live.requests import ModelStatus
from flashserve.node.client import Node, NodeStats
from flashserve.store.reporting import StoreReport
from flashserve.types import KVUsage, ModelId, NodeId, ReplicaId

_log = structlog.get_logger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Stats:
    """Memory per model, over all nodes; a model that is not named was not asked for."""

    dram_bytes: Mapping[ModelId, int]
    kv: Mapping[ModelId, KVUsage]
    disk_bytes: Mapping[ModelId, int] = dataclasses.field(default_factory=dict)
    leases: Mapping[ModelId, int] = dataclasses.field(default_factory=dict)


NO_STATS = Stats({}, {})


async def gather_stats(nodes: Sequence[Node]) -> Stats:
    """Ask every node at once; one that does not answer is left out and logged."""
    answers = await asyncio.gather(*(ask(node) for node in nodes))
    dram_bytes: collections.Counter[ModelId] = collections.Counter()
    disk_bytes: collections.Counter[ModelId] = collections.Counter()
    leases: collections.Counter[ModelId] = collections.Counter()
    kv: dict[ModelId, KVUsage] = {}
    for stats in answers:
        for model_id, residence in stats.models.items() if stats else ():
            dram_bytes[model_id] += residence.dram_bytes
            disk_bytes[model_id] += residence.disk_bytes
            leases[model_id] += residence.num_leases
        for replica_id, worker in stats.replicas.items() if stats else ():
            model_id = _model_of(replica_id)
            kv[model_id] = _sum(kv.get(model_id, KVUsage()), worker.kv)
    return Stats(dram_bytes, kv, disk_bytes, leases)


async def gather_tiers(nodes: Sequence[Node]) -> dict[NodeId, StoreReport]:
    """What each node's tiers hold and do; one that does not answer is left out and logged."""
    answers = await asyncio.gather(*(ask(node) for node in nodes))
    return {
        node.spec.node_id: stats.store
        for node, stats in zip(nodes, answers, strict=True)
        if stats and stats.store
    }


def model_status(
    model: DeployedModel, view: ModelView, stats: Stats, now: float, default_keep_alive_s: float
) -> ModelStatus:
    """One model at the controller's time `now`."""
    spec = model.spec
    keep_alive_s = default_keep_alive_s if spec.keep_alive_s is None else spec.keep_alive_s
    return ModelStatus(
        name=spec.model_id,
        source=spec.source,
        state=view.state,
        tier=view.tier,
        replicas=view.num_replicas,
        in_flight=view.in_flight,
        waiting=view.waiting,
        size_bytes=spec.size_bytes,
        dram_bytes=stats.dram_bytes.get(spec.model_id, view.dram_bytes),
        disk_bytes=stats.disk_bytes.get(spec.model_id, 0),
        leases=stats.leases.get(spec.model_id, 0),
        last_used_s=None if view.last_used_at is None else max(now - view.last_used_at, 0.0),
        keep_alive_s=keep_alive_s,
        reason=view.reason,
        context_tokens=spec.context_tokens,
        architecture=spec.architecture,
        created_at=model.created_at,
        min_replicas=spec.scaling.min_replicas,
        max_replicas=spec.scaling.max_replicas,
        target=spec.scaling.target,
        schedule=model.bounds.schedule,
        wanted_replicas=view.wanted_replicas,
        plan=view.plan,
        kv=stats.kv.get(spec.model_id),
    )


async def ask(node: Node) -> NodeStats | None:
    try:
        return await node.stats()
    except FlashServeError as error:
        _log.warning("no stats", node_id=node.spec.node_id, reason=error.message)
        return None


def _model_of(replica_id: ReplicaId) -> ModelId:
    """Replica ids are made by the controller as MODEL#NUMBER."""
    return ModelId(replica_id.rpartition("#")[0])


def _sum(one: KVUsage, other: KVUsage) -> KVUsage:
    return KVUsage(
        one.total + other.total,
        one.used + other.used,
        one.cached + other.cached,
        one.free + other.free,
    )
