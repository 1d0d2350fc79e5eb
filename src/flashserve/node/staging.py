"""Puts the blocking store behind the event loop, and its operations in the order of the orders.

Per model strictly in order. Across models, whatever needs room waits for every eviction that was
ordered before it, so that `Evict(B)` then `StartReplica(C)` gives B's bytes to C.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from flashserve.messages.work import LoadModel, Prepare
from flashserve.store.arrival import StageReport
from flashserve.store.store import Lease, Store
from flashserve.types import ModelId, ModelSpec, Tier

T = TypeVar("T")
_NUM_THREADS = 4


@dataclasses.dataclass(frozen=True, slots=True)
class StagedModel:
    """hint: what a spare worker may prepare with; None below the DRAM tier."""

    report: StageReport
    hint: Prepare | None


@dataclasses.dataclass(frozen=True, slots=True)
class HeldModel:
    """A model whose bytes are in DRAM, or on their way; its place is kept until `lease` ends."""

    hint: Prepare
    lease: Lease

    def load_order(self, num_open: int) -> LoadModel:
        snapshot = self.lease.snapshot
        return LoadModel(
            self.lease.model_id,
            snapshot.config,
            snapshot.generation_config,
            self.lease.tensors,
            self.lease.arrival.num_groups,
            num_open,
            snapshot.identity,
        )


class Operation(Generic[T]):
    """One operation of the store: waiting for earlier ones, running in a thread, or done."""

    def __init__(self) -> None:
        self.task: asyncio.Task[T]
        self.is_running = False

    async def result(self) -> T:
        """Waiting for it can be cancelled without ending it."""
        return await asyncio.shield(self.task)

    def abandon(self, undo: Callable[[T], None]) -> None:
        """Nobody wants it any more: never starts it, or undoes it once it has come to its end."""
        if not self.is_running:
            self.task.cancel()

        def ended(task: asyncio.Task[T]) -> None:
            if not task.cancelled() and task.exception() is None:
                undo(task.result())

        if self.task.done():
            ended(self.task)
        else:
            self.task.add_done_callback(ended)


class StoreQueue:
    """The store's operations, each in a thread, in order.

    Args:
        execute_while_loading: hold a model as soon as its bytes begin to arrive.
    """

    def __init__(self, store: Store, *, execute_while_loading: bool) -> None:
        self._store = store
        self._execute_while_loading = execute_while_loading
        self._executor = concurrent.futures.ThreadPoolExecutor(_NUM_THREADS, "store")
        self._of_model: collections.defaultdict[ModelId, set[asyncio.Task[Any]]]
        self._of_model = collections.defaultdict(set)
        self._evictions: set[asyncio.Task[Any]] = set()

    def stage(self, model: ModelSpec, tier: Tier) -> Operation[StagedModel]:
        """Brings the model up to `tier`."""
        return self._submit(model, lambda: self._stage(model, tier), self._evictions)

    def hold(
        self, model: ModelSpec, after: Iterable[asyncio.Task[Any]] = ()
    ) -> Operation[HeldModel]:
        """Leases the model in DRAM, where its bytes may still be arriving, once `after` is done."""
        return self._submit(model, lambda: self._hold(model), (*self._evictions, *after))

    def evict(
        self, model: ModelSpec, tier: Tier, after: Iterable[asyncio.Task[Any]]
    ) -> Operation[int]:
        """Frees the model's bytes in `tier` and above once the tasks of `after` are done."""
        operation = self._submit(
            model, lambda: self._store.evict(model.model_id, tier), (*self._evictions, *after)
        )
        self._evictions.add(operation.task)
        operation.task.add_done_callback(self._evictions.discard)
        return operation

    def holds(self, model_id: ModelId) -> bool:
        """Whether bytes of the model are in DRAM, or on their way."""
        return self._store.dram_bytes(model_id) > 0

    async def run(self, work: Callable[[], T]) -> T:
        """Something that needs no order, in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def close(self) -> None:
        """Waits for what runs; what has not started is dropped."""
        for tasks in list(self._of_model.values()):
            for task in list(tasks):
                task.cancel()
        await asyncio.to_thread(self._executor.shutdown, wait=True, cancel_futures=True)

    def _stage(self, model: ModelSpec, tier: Tier) -> StagedModel:
        report = self._store.stage(model, tier)
        if tier is not Tier.DRAM:
            return StagedModel(report, None)
        with self._store.lease(model.model_id) as lease:
            return StagedModel(report, _hint(lease))

    def _hold(self, model: ModelSpec) -> HeldModel:
        lease = self._store.hold(model)
        try:
            if not self._execute_while_loading:
                lease.arrival.wait()
        except BaseException:
            lease.release()
            raise
        return HeldModel(_hint(lease), lease)

    def _submit(
        self, model: ModelSpec, work: Callable[[], T], after: Iterable[asyncio.Task[Any]]
    ) -> Operation[T]:
        same_model = self._of_model[model.model_id]
        operation: Operation[T] = Operation()
        operation.task = asyncio.create_task(
            self._run_after(operation, work, {*same_model, *after})
        )
        same_model.add(operation.task)
        operation.task.add_done_callback(same_model.discard)
        return operation

    async def _run_after(
        self, operation: Operation[T], work: Callable[[], T], earlier: set[asyncio.Task[Any]]
    ) -> T:
        if earlier:
            await asyncio.wait(earlier)
        operation.is_running = True
        return await self.run(work)


def _hint(lease: Lease) -> Prepare:
    snapshot = lease.snapshot
    return Prepare(lease.extents, snapshot.config, lease.tensors, snapshot.identity)
