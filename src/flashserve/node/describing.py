"""Checks a source before it is deployed; a worker knows whether its model can be built."""

from __future__ import annotations

from flashserve.messages.work import DescribeModel, ModelDescription, ModelFacts, Prepare
from flashserve.node.pool import WorkerPool
from flashserve.store.checkpoint.snapshot import Snapshot
from flashserve.types import TensorSlice, Tier

_MAX_TENSORS_BESIDE = 1000
"""A model of so many is built, without its weights, within the time of a step or two. A worker that
holds another model is not kept from its requests for longer than that.
"""


async def describe(snapshot: Snapshot, lowest_tier: Tier, pool: WorkerPool) -> ModelFacts:
    """What a node finds out about a source; spare workers begin to prepare for it.

    Raises:
        DeployError: a worker says that the model would not be served.
        UnavailableError, ReplicaError: no worker could say.
    """
    tensors = tuple(
        TensorSlice(entry.name, entry.dtype, entry.shape, entry.begin, entry.end - entry.begin)
        for entry in snapshot.layout.tensors
    )
    description = await _ask(DescribeModel(snapshot.config, tensors), pool)
    hint = Prepare((), snapshot.config, tensors)
    for worker in pool.spare:
        worker.channel.notify("prepare", hint)
    return ModelFacts(
        size_bytes=snapshot.size_bytes,
        identity=snapshot.identity,
        directory=str(snapshot.directory),
        architecture=description.architecture,
        context_tokens=description.context_tokens,
        has_chat_template=snapshot.chat_template is not None,
        kv_bytes_per_token=description.kv_bytes_per_token,
        lowest_tier=lowest_tier,
    )


async def _ask(order: DescribeModel, pool: WorkerPool) -> ModelDescription:
    """A spare worker, of them the last in line for a replica, or one whose model has no requests;
    else one that is started for this, which takes seconds.
    """
    await pool.wait_any_ready()
    resting = pool.resting if len(order.tensors) <= _MAX_TENSORS_BESIDE else ()
    if asked := pool.spare[-1:] or resting[:1]:
        return await asked[0].channel.call("describe", order, ModelDescription)
    async with pool.temporary() as worker:
        return await worker.channel.call("describe", order, ModelDescription)
