"""The adapters that a node serves: declared, staged when they are asked for, told to workers.

A worker reads an adapter's bytes in the arena when one of its sequences is to use it, so they stay
there for as long as any worker has been told of them. What it copies may outlive them, so when
bytes turn out to be damaged, every worker that may have a copy is told. Under pressure those that
no request uses are taken back from the workers, the longest unused first. One that nobody asks for
costs nothing.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from types import NoneType
from typing import Any, TypeVar

import structlog

from flashserve.errors import (
    FlashServeError,
    ModelNotFoundError,
    ReplicaError,
    UnavailableError,
)
from flashserve.messages.work import AdapterFacts, AdapterImage, DropAdapter
from flashserve.node.client import AdapterResidence
from flashserve.node.workers import Worker
from flashserve.store.adapters.tier import AdapterLease, AdapterTier
from flashserve.types import AdapterId, AdapterSpec, ModelId, ModelSpec

T = TypeVar("T")
Serving = Callable[[ModelId], Iterable[Worker]]
_log = structlog.get_logger()
_NUM_THREADS = 4
_DROP_TIMEOUT_S = 60.0


@dataclasses.dataclass(eq=False, slots=True)
class _Adapter:
    """One version. While it has users or workers that were told, it has a lease and an image."""

    spec: AdapterSpec
    num_users: int = 0
    lease: AdapterLease | None = None
    image: AdapterImage | None = None
    told: set[Worker] = dataclasses.field(default_factory=set)
    copied: set[Worker] = dataclasses.field(default_factory=set)
    """Workers that may have a copy: told at any time since they loaded the model."""
    staging: asyncio.Task[None] | None = None
    is_retired: bool = False

    @property
    def is_idle(self) -> bool:
        return not self.num_users and self.staging is None


class Adapters:
    """Runs on the event loop's thread; the store's work is done in threads of its own."""

    def __init__(self, tier: AdapterTier) -> None:
        self._tier = tier
        self._loop = asyncio.get_running_loop()
        self._executor = concurrent.futures.ThreadPoolExecutor(_NUM_THREADS, "adapters")
        # The one that was used last is at the end.
        self._adapters: collections.OrderedDict[AdapterId, _Adapter] = collections.OrderedDict()
        self._tasks: set[asyncio.Task[None]] = set()
        tier.on_damage = self._damaged_in_store

    async def close(self) -> None:
        """Call it when no worker runs any more; waits for what the store does."""
        self._tier.on_damage = None
        while self._tasks:
            await asyncio.wait(self._tasks)
        await asyncio.to_thread(self._executor.shutdown, wait=True, cancel_futures=True)

    async def describe(self, uri: str, base: ModelSpec) -> AdapterFacts:
        """Reads an adapter and checks that it can be served on `base`.

        Raises:
            DeployError: it cannot; one line that says why.
            UnavailableError: there is no room for it now.
        """
        found = await self._with_room(lambda: self._tier.admit(uri, base))
        return AdapterFacts(
            found.size_bytes, found.identity, found.rank, found.num_parameters, found.targets
        )

    def declare(self, spec: AdapterSpec) -> None:
        """Requests may name it from now on. Reads nothing."""
        adapter = self._adapters.setdefault(spec.adapter_id, _Adapter(spec))
        adapter.is_retired = False

    def retire(self, adapter_id: AdapterId) -> None:
        """It leaves with its last user. Harmless when it is not declared."""
        if adapter := self._adapters.get(adapter_id):
            adapter.is_retired = True
            self._settle(adapter)

    def prefetch(self, adapter_id: AdapterId, serving: Serving | None = None) -> None:
        """Brings it into DRAM if it is not there; a failure is told to whoever uses it.

        Args:
            serving: given the base, the workers that are to load it into their own memory too,
                if that has room.
        """
        if (adapter := self._adapters.get(adapter_id)) is None:
            return
        if serving is not None:
            self._adapters.move_to_end(adapter_id)
            adapter.num_users += 1
            self._start(self._bring_near(adapter, serving))
        elif adapter.lease is None and adapter.staging is None:
            self._adapters.move_to_end(adapter_id)
            self._stage(adapter)

    @contextlib.asynccontextmanager
    async def use(self, adapter_id: AdapterId, worker: Callable[[], Worker]) -> AsyncIterator[None]:
        """While inside, `worker` may be asked for tokens of this adapter.

        Args:
            adapter_id: must be declared.
            worker: asked once the bytes are in DRAM; what it raises is raised here.

        Raises:
            ModelNotFoundError: it is not declared.
            DeployError: it cannot be read, or its source has changed.
            UnavailableError: all room is taken by adapters that are in use.
        """
        adapter = self._adapters.get(adapter_id)
        if adapter is None:
            raise ModelNotFoundError(f"adapter {adapter_id} is not registered on this node")
        adapter.num_users += 1
        self._adapters.move_to_end(adapter_id)
        try:
            image = await self._image(adapter)
            self._tell(adapter, worker(), image)
            yield
        finally:
            adapter.num_users -= 1
            self._settle(adapter)

    def forgotten_by(self, worker: Worker) -> None:
        """The worker has died, or has given up the model and with it its adapters."""
        for adapter in list(self._adapters.values()):
            adapter.told.discard(worker)
            adapter.copied.discard(worker)
            self._settle(adapter)

    async def residences(self) -> dict[AdapterId, AdapterResidence]:
        """Of all declared ones."""
        declared = {id_: (each.spec, each.num_users) for id_, each in self._adapters.items()}
        specs = [spec for spec, _ in declared.values()]
        # Not in the executor's threads: those may all be busy with what somebody wants to watch.
        where = await asyncio.to_thread(self._tier.where, specs)
        return {
            id_: AdapterResidence(*where[spec.identity], num_users)
            for id_, (spec, num_users) in declared.items()
        }

    def retire_all(self) -> None:
        for adapter_id in list(self._adapters):
            self.retire(adapter_id)

    async def _image(self, adapter: _Adapter) -> AdapterImage:
        while adapter.image is None:
            if adapter.staging is None and (lease := self._tier.lease(adapter.spec.identity)):
                self._hold(adapter, lease)
            else:
                await asyncio.shield(adapter.staging or self._stage(adapter))
        return adapter.image

    async def _bring_near(self, adapter: _Adapter, serving: Serving) -> None:
        """Counts as a user, which ends with it."""
        try:
            image = await self._image(adapter)
            for worker in serving(adapter.spec.base):
                self._tell(adapter, worker, image)
                worker.channel.notify("prefetch", adapter.spec.adapter_id)
        finally:
            adapter.num_users -= 1
            self._settle(adapter)

    def _tell(self, adapter: _Adapter, worker: Worker, image: AdapterImage) -> None:
        if worker not in adapter.told:
            adapter.told.add(worker)
            adapter.copied.add(worker)
            worker.channel.notify("adapter", image)

    def _stage(self, adapter: _Adapter) -> asyncio.Task[None]:
        adapter.staging = self._start(self._bring(adapter))
        return adapter.staging

    async def _bring(self, adapter: _Adapter) -> None:
        try:
            lease = await self._with_room(lambda: self._tier.hold(adapter.spec))
        except FlashServeError as error:
            _log.warning("adapter_not_staged", adapter=adapter.spec.name, error=error.message)
            raise
        finally:
            adapter.staging = None
        self._hold(adapter, lease)
        self._settle(adapter)  # nobody may be waiting for it any more

    def _hold(self, adapter: _Adapter, lease: AdapterLease) -> None:
        adapter.lease = lease
        adapter.image = AdapterImage(adapter.spec.adapter_id, lease.layers)

    def _settle(self, adapter: _Adapter) -> None:
        """Ends what nobody needs any more."""
        if not adapter.is_idle:
            return
        if adapter.is_retired:
            if self._adapters.pop(adapter.spec.adapter_id, None):
                self._start(self._leave(adapter))
        elif not adapter.told:
            self._release(adapter)

    async def _leave(self, adapter: _Adapter) -> None:
        await self._take_back(adapter)
        identity = adapter.spec.identity
        if all(other.spec.identity != identity for other in self._adapters.values()):
            self._tier.forget(identity)

    def _release(self, adapter: _Adapter) -> None:
        lease, adapter.lease, adapter.image = adapter.lease, None, None
        if lease is not None:
            lease.release()

    async def _with_room(self, work: Callable[[], T]) -> T:
        """Does something that needs room; what workers hold of unused adapters makes some."""
        while True:
            try:
                return await self._loop.run_in_executor(self._executor, work)
            except UnavailableError:
                unused = (each for each in self._adapters.values() if each.lease and each.is_idle)
                oldest = next(unused, None)
                if oldest is None:
                    raise
                await self._take_back(oldest)

    async def _take_back(self, adapter: _Adapter) -> None:
        """Has the workers forget an adapter's bytes, and then gives them up.

        Whoever asks for it meanwhile gets a lease of its own, and tells the workers anew: the
        orders to forget leave before this yields, so that nobody can tell them in between.
        """
        told, lease = adapter.told, adapter.lease
        adapter.told, adapter.lease, adapter.image = set(), None, None
        await self._end_reads(told, lease, DropAdapter(adapter.spec.adapter_id))

    async def _take_back_damaged(self, adapter: _Adapter) -> None:
        """As `_take_back`, and whatever workers have copied at any time goes too."""
        copied, lease = adapter.copied, adapter.lease
        adapter.told, adapter.copied, adapter.lease, adapter.image = set(), set(), None, None
        await self._end_reads(copied, lease, DropAdapter(adapter.spec.adapter_id, is_damaged=True))

    async def _end_reads(
        self, workers: set[Worker], lease: AdapterLease | None, order: DropAdapter
    ) -> None:
        await asyncio.gather(*[_drop(worker, order) for worker in workers])
        if lease is not None:
            lease.release()

    def _damaged_in_store(self, identities: tuple[str, ...], message: str) -> None:
        """In a thread of the store."""
        self._loop.call_soon_threadsafe(self._damaged, identities, message)

    def _damaged(self, identities: tuple[str, ...], message: str) -> None:
        """Who uses one next reads it anew, and so do the workers."""
        _log.error("adapter_damaged", error=message)
        for adapter in list(self._adapters.values()):
            if adapter.spec.identity in identities and (adapter.lease or adapter.copied):
                self._start(self._take_back_damaged(adapter))

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # told to whoever waits, and logged


def _drop(worker: Worker, order: DropAdapter) -> Coroutine[Any, Any, None]:
    """Sends the order at once; what to await is that the worker reads the bytes no more."""
    try:
        answer = worker.channel.ask("drop", order, NoneType, timeout_s=_DROP_TIMEOUT_S)
    except ReplicaError:
        return worker.wait_gone()
    return _dropped(worker, answer)


async def _dropped(worker: Worker, answer: Coroutine[Any, Any, None]) -> None:
    """Returns when the worker has said so, or is dead."""
    try:
        await answer
    except ReplicaError:
        await worker.wait_gone()
    except FlashServeError as error:
        _log.warning("adapter_not_dropped", worker=worker.name, error=error.message)
        worker.process.kill()
        await worker.wait_gone()
