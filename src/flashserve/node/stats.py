"""What a node tells of its models when it is asked: where they are, and how busy their replicas."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping

from flashserve.errors import FlashServeError
from flashserve.messages.work import WorkerStats
from flashserve.node.client import ModelResidence
from flashserve.node.replica import Replica
from flashserve.store.store import Store
from flashserve.types import ModelId, ModelSpec, ReplicaId

_TIMEOUT_S = 2.0


def model_residences(
    store: Store, models: Mapping[ModelId, ModelSpec], others: Mapping[str, int]
) -> dict[ModelId, ModelResidence]:
    """The tier, bytes and leases of each model. Blocks.

    Args:
        others: how many processes that are no workers have a copy, by source.
    """
    residents = store.residents()
    found: dict[ModelId, ModelResidence] = {}
    for model_id, model in models.items():
        at = residents.get(model_id)
        dram, disk, leases = (at.dram_bytes, at.disk_bytes, at.num_leases) if at else (0, 0, 0)
        leases += others.get(model.source, 0)
        found[model_id] = ModelResidence(store.tier(model), dram, disk, leases)
    return found


async def replica_stats(replicas: Mapping[ReplicaId, Replica]) -> dict[ReplicaId, WorkerStats]:
    """Those that answer soon: one that is gone, stuck, or may wait for its bytes in a step, has no
    numbers.
    """
    asked = dict(replicas)
    answers = await asyncio.gather(*map(_ask, asked.values()))
    return {
        replica_id: answer
        for replica_id, answer in zip(asked, answers, strict=True)
        if answer is not None
    }


async def _ask(replica: Replica) -> WorkerStats | None:
    worker = replica.worker
    if replica.ready is None or not replica.is_whole or worker is None:
        return None
    with contextlib.suppress(FlashServeError):
        return await worker.channel.call("stats", None, WorkerStats, _TIMEOUT_S)
    return None
