"""The agent of one node: carries out the controller's orders with its store and its workers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from typing import Any

import structlog

from flashserve.config import Settings
from flashserve.errors import FlashServeError, InternalError, ReplicaError
from flashserve.messages.commands import Evict, NodeCommand, Stage, StartReplica, StopReplica
from flashserve.messages.events import (
    Evicted,
    NodeEvent,
    ReplicaStopped,
    Staged,
    StageFailed,
    WorkersChanged,
)
from flashserve.messages.work import (
    AdapterFacts,
    GenerateJob,
    ModelFacts,
    ModelLost,
    Prepare,
    TokenBatch,
)
from flashserve.node.adapters import Adapters
from flashserve.node.client import NodeStats
from flashserve.node.describing import describe
from flashserve.node.handing import HandoutSocket
from flashserve.node.hints import Hints
from flashserve.node.listening import StoreNews
from flashserve.node.pool import WorkerPool
from flashserve.node.process import WORKER_COMMAND, threads_per_worker
from flashserve.node.replica import Replica, staged_events
from flashserve.node.staging import Operation, StagedModel, StoreQueue
from flashserve.node.stats import model_residences, replica_stats
from flashserve.node.workers import Launcher, Worker
from flashserve.store.sources.source import open_source
from flashserve.store.store import Store
from flashserve.types import (
    AdapterId,
    AdapterSpec,
    ModelId,
    ModelSpec,
    NodeId,
    NodeSpec,
    ReplicaId,
    Tier,
)

_log = structlog.get_logger()


class Agent:
    """A node in this process; see node.client.Node for what it promises.

    Per model, orders are carried out in order; across models, worker slots and arena bytes are
    claimed in the order of the orders (pool.py, staging.py).

    Args:
        epoch: of the first `start`; each further one adds 1.
        store: made from the settings at the first `start` if not given; owned in either case.
        worker_command: how a worker process is started; tests put another program here.
    """

    def __init__(
        self,
        settings: Settings,
        node_id: NodeId = NodeId("local"),  # noqa: B008 - a string
        *,
        epoch: int = 1,
        store: Store | None = None,
        worker_command: Sequence[str] = WORKER_COMMAND,
    ) -> None:
        self.spec = NodeSpec(
            node_id,
            epoch,
            settings.node.num_workers,
            settings.node.dram_bytes,
            settings.engine.max_batch_sequences,
        )
        self._settings = settings
        self._worker_command = worker_command
        self._given_store = store
        self._store: Store
        self._queue: StoreQueue
        self._adapters: Adapters
        self._pool: WorkerPool
        self._handout: HandoutSocket
        self._is_started = False
        self._is_closed = False
        self.deployed: Callable[[], dict[ModelId, ModelSpec]] = dict
        """Models that other processes may ask for by name although no order named them yet."""
        self._on_event: Callable[[NodeEvent], None] = _ignore
        self._replicas: dict[ReplicaId, Replica] = {}
        self._models: dict[ModelId, ModelSpec] = {}
        self._hints = Hints()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, on_event: Callable[[NodeEvent], None]) -> None:
        """Also takes the node over from an earlier caller, who hears no more of it: its replicas
        end and its models leave DRAM.
        """
        if self._is_started:
            await self._rejoin()
        else:
            await self._open()
            self._is_started = True
        self._on_event = on_event
        self._report_workers()

    def execute(self, command: NodeCommand) -> None:
        if command.epoch != self.spec.epoch or self._is_closed:
            _log.warning("order_ignored", order=command, epoch=self.spec.epoch)
            return
        if isinstance(command, Evict):
            self._models.pop(command.model.model_id, None)
        else:
            self._models[command.model.model_id] = command.model
        match command:
            case StartReplica():
                self._start_replica(command)
            case StopReplica():
                self._stop_replica(command)
            case Stage():
                self._watch(self._stage(command, self._queue.stage(command.model, command.tier)))
            case Evict():
                self._watch(self._evict(command, self._evict_operation(command)))

    async def generate(
        self, replica_id: ReplicaId, job: GenerateJob
    ) -> AsyncGenerator[TokenBatch, None]:
        if (replica := self._replicas.get(replica_id)) is None:
            raise ReplicaError(f"replica {replica_id} is not on this node")
        async with contextlib.AsyncExitStack() as stack:
            if job.adapter_id is not None:
                used = self._adapters.use(job.adapter_id, replica.serving)
                await stack.enter_async_context(used)
            stream = replica.stream(job)
            stack.callback(stream.cancel)
            async for batch in stream:
                is_fetched = batch.waited_s > 0 and replica.is_fetched
                yield dataclasses.replace(batch, is_fetched=True) if is_fetched else batch

    async def describe(self, uri: str) -> ModelFacts:
        """A worker without requests checks that the model can be built, a temporary one if there is
        none.
        """
        snapshot = await self._queue.run(lambda: self._store.inspect(uri))
        lowest_tier = open_source(uri, self._settings.data_dir).lowest_tier
        return await describe(snapshot, lowest_tier, self._pool)

    async def describe_adapter(self, uri: str, base: ModelSpec) -> AdapterFacts:
        return await self._adapters.describe(uri, base)

    def declare_adapter(self, spec: AdapterSpec) -> None:
        self._adapters.declare(spec)

    def retire_adapter(self, adapter_id: AdapterId) -> None:
        self._adapters.retire(adapter_id)

    def prefetch_adapter(self, adapter_id: AdapterId, *, into_pages: bool = False) -> None:
        self._adapters.prefetch(adapter_id, self._serving if into_pages else None)

    async def stats(self) -> NodeStats:
        others = self._handout.leases()
        handed = {id_: model for id_, model in self.deployed().items() if model.source in others}
        models = {**handed, **self._models}
        # Not in the queue's threads: those may all be busy with what somebody wants to watch.
        residences = await asyncio.to_thread(model_residences, self._store, models, others)
        report = await asyncio.to_thread(self._store.report)
        replicas = await replica_stats(self._replicas)
        adapters = await self._adapters.residences()
        return NodeStats(self._store.usage(), residences, replicas, report, adapters)

    async def close(self, grace_s: float) -> None:
        """Leaves no process, thread or memory. Workers get grace_s to end by themselves."""
        if self._is_closed or not self._is_started:
            self._is_closed = True
            return
        self._is_closed = True
        self._on_event = _ignore
        await self._handout.close()
        ending = [self._end(replica) for replica in self._replicas.values()]
        if ending:
            await asyncio.wait(ending, timeout=grace_s)
        await self._pool.close(grace_s)
        await self._adapters.close()
        await asyncio.to_thread(self._store.close)
        await asyncio.gather(*ending)
        await self._queue.close()
        await asyncio.gather(*self._tasks)

    async def _open(self) -> None:
        node = self._settings.node
        if self._given_store is None:
            self._store = await asyncio.to_thread(
                Store,
                self._settings.data_dir,
                node.dram_bytes,
                node.prefault,
                self._settings.store,
                adapter_bytes=node.adapter_quota_bytes,
                max_lora_rank=self._settings.engine.max_lora_rank,
            )
        else:
            self._store = self._given_store
        self._store.listener = StoreNews(self._damaged, self._come_to_disk, self._left_disk)
        self._adapters = Adapters(self._store.adapters)
        self._queue = StoreQueue(
            self._store, execute_while_loading=self._settings.store.execute_while_loading
        )
        self.spec = dataclasses.replace(self.spec, dram_bytes=self._store.usage().total)
        arena = self._store.arena
        self._pool = WorkerPool(
            Launcher(
                arena.fd,
                arena.num_bytes,
                threads_per_worker(node),
                self._settings.engine,
                node.device,
                self._settings.data_dir / "references",
                self._worker_command,
            ),
            node.num_workers,
            on_ready=lambda _: self._report_workers(),
            on_spare=self._hints.send_all,
            on_lost=self._worker_lost,
            on_model_lost=self._model_lost,
        )
        self._pool.start()
        self._handout = HandoutSocket(
            self._settings, self._store, lambda: {**self.deployed(), **self._models}
        )

    async def _rejoin(self) -> None:
        self._on_event = _ignore
        self.spec = dataclasses.replace(self.spec, epoch=self.spec.epoch + 1)
        await asyncio.gather(*(self._end(replica) for replica in list(self._replicas.values())))
        self._adapters.retire_all()
        models, self._models = self._models, {}
        for model_id in models:  # what the new caller knows nothing of would fill the arena
            self._hints.forget(model_id, self._pool.ready)
            await self._queue.run(functools.partial(self._store.forget, model_id))

    # Orders

    def _start_replica(self, order: StartReplica) -> None:
        if known := self._replicas.get(order.replica_id):
            if known.ready is not None and not known.is_ending:
                self._emit(known.ready)
            return
        model_id = order.model.model_id
        spoilt = [
            replica.task
            for replica in self._replicas.values()
            if replica.is_spoilt and replica.order.model.model_id == model_id
        ]
        replica = Replica(order, self._pool, self._queue, self._emit, self._hint, spoilt)
        self._replicas[order.replica_id] = replica
        replica.task.add_done_callback(lambda _: self._replica_ended(replica))

    def _replica_ended(self, replica: Replica) -> None:
        del self._replicas[replica.order.replica_id]
        if worker := replica.worker:
            self._adapters.forgotten_by(worker)

    def _stop_replica(self, order: StopReplica) -> None:
        if replica := self._replicas.get(order.replica_id):
            replica.stop()
        else:
            self._emit(ReplicaStopped(order.node_id, order.replica_id, order.model.model_id))

    async def _stage(self, order: Stage, operation: Operation[StagedModel]) -> None:
        model_id = order.model.model_id
        try:
            staged = await operation.result()
        except Exception as error:
            self._stage_failed(order, error)
            return
        report = staged.report
        if order.tier is Tier.DISK:
            events = [Staged(order.node_id, model_id, Tier.DISK, report.num_bytes, report.fetch_s)]
        else:  # without bytes moved, they were there
            events = staged_events(order.node_id, order.model, report)
            events = events or [Staged(order.node_id, model_id, order.tier, 0, 0.0)]
        for event in events:
            self._emit(event)
        if staged.hint is not None:
            self._hint(model_id, staged.hint)

    def _evict_operation(self, order: Evict) -> Operation[int]:
        """After the model's replicas that are ending: they hold leases until they have ended."""
        model_id = order.model.model_id
        ending = [
            replica.task
            for replica in self._replicas.values()
            if replica.is_ending and replica.order.model.model_id == model_id
        ]
        return self._queue.evict(order.model, order.tier, ending)

    async def _evict(self, order: Evict, operation: Operation[int]) -> None:
        try:
            await operation.result()
        except Exception as error:
            self._models.setdefault(order.model.model_id, order.model)
            self._stage_failed(order, error)
            return
        self._hints.forget(order.model.model_id, self._pool.ready)
        self._emit(Evicted(order.node_id, order.model.model_id, order.tier))

    def _stage_failed(self, order: Stage | Evict, error: Exception) -> None:
        """An order for a tier that could not be carried out, whichever direction it had."""
        if not isinstance(error, FlashServeError):
            _log.error("store_failed", order=order, exc_info=error)
            error = InternalError(f"the store failed: {type(error).__name__}: {error}")
        self._emit(
            StageFailed(order.node_id, order.model.model_id, order.tier, error.code, error.message)
        )

    def _end(self, replica: Replica) -> asyncio.Task[None]:
        replica.stop()
        return replica.task

    # What happens in the store by itself

    def _damaged(self, model_ids: tuple[ModelId, ...], message: str) -> None:
        """Replicas of damaged bytes end; their requests go on with what is read anew."""
        for replica in list(self._replicas.values()):
            if replica.order.model.model_id in model_ids:
                replica.spoil(message)
        for model_id in model_ids:
            self._hints.forget(model_id, self._pool.ready)
            self._emit(Evicted(self.spec.node_id, model_id, Tier.DRAM))

    def _come_to_disk(self, model_id: ModelId, num_bytes: int, seconds: float) -> None:
        self._emit(Staged(self.spec.node_id, model_id, Tier.DISK, num_bytes, seconds))

    def _left_disk(self, model_id: ModelId) -> None:
        self._emit(Evicted(self.spec.node_id, model_id, Tier.DISK))

    # Workers

    def _worker_lost(self, worker: Worker) -> None:
        reason = f"worker {worker.name} (process {worker.process.pid}) ended unexpectedly"
        self._report_workers()  # first, so that what the loss causes counts one worker less
        for replica in list(self._replicas.values()):
            if replica.worker is worker:
                replica.lose(reason)
        self._adapters.forgotten_by(worker)

    def _model_lost(self, worker: Worker, lost: ModelLost) -> None:
        """A worker gave up what it had loaded; it is emptied and used again."""
        for replica in list(self._replicas.values()):
            if replica.worker is worker and replica.order.model.model_id == lost.model_id:
                replica.lose(lost.message)

    def _serving(self, model_id: ModelId) -> list[Worker]:
        """The workers whose replicas of a model take sequences."""
        of_model = (r for r in self._replicas.values() if r.order.model.model_id == model_id)
        return [r.worker for r in of_model if r.ready and not r.is_ending and r.worker]

    def _report_workers(self) -> None:
        self._emit(WorkersChanged(self.spec.node_id, self._pool.num_ready))

    def _hint(self, model_id: ModelId, hint: Prepare) -> None:
        self._hints.add(model_id, hint, self._pool.spare)

    def _emit(self, event: NodeEvent) -> None:
        self._on_event(event)

    def _watch(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _ignore(event: NodeEvent) -> None:
    """Events before somebody listens, or after nobody does."""
