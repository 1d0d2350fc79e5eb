"""The life of one replica on a node, from the order to start it until its worker is free again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable

import msgspec
import structlog

from flashserve.errors import FlashServeError, InternalError, ReplicaError, UnavailableError
from flashserve.messages.commands import StartReplica
from flashserve.messages.events import (
    Evicted,
    NodeEvent,
    ReplicaFailed,
    ReplicaLost,
    ReplicaReady,
    ReplicaStopped,
    Staged,
)
from flashserve.messages.work import (
    ArrivalFailed,
    GenerateJob,
    LoadReport,
    Opened,
    Prepare,
    TokenBatch,
    UnloadReport,
)
from flashserve.node.channel import ItemStream
from flashserve.node.landing import Landing
from flashserve.node.pool import WorkerPool
from flashserve.node.staging import HeldModel, Operation, StoreQueue
from flashserve.node.workers import Worker
from flashserve.store.arrival import StageReport
from flashserve.types import ModelId, ModelSpec, NodeId, Phases, ReplicaId, Tier

_log = structlog.get_logger()
_UNLOAD_TIMEOUT_S = 60.0


class Replica:
    """Its claims on a worker and on arena bytes are made at once, so they follow the orders.

    Exactly one of ReplicaStopped, ReplicaFailed and ReplicaLost is its last event, but for what
    becomes of bytes that are still arriving by then. The lease is given back when the worker has
    confirmed that it holds the model no more, or has died.

    Args:
        emit: takes every event.
        on_staged: the model is in DRAM; spare workers may prepare for it.
        after: replicas whose bytes are worth nothing; their room may be needed for these.
    """

    def __init__(
        self,
        order: StartReplica,
        pool: WorkerPool,
        store: StoreQueue,
        emit: Callable[[NodeEvent], None],
        on_staged: Callable[[ModelId, Prepare], None],
        after: Iterable[asyncio.Task[None]] = (),
    ) -> None:
        self.order = order
        self.ready: ReplicaReady | None = None
        self.is_spoilt = False
        """Its bytes were damaged, or did not all come."""
        self._pool = pool
        self._store = store
        self._emit = emit
        self._on_staged = on_staged
        self._ordered_at = time.monotonic()
        self._claim = pool.claim(order.model.model_id)
        self._operation: Operation[HeldModel] = store.hold(order.model, after)
        self._landing: Landing | None = None
        self._was_told_to_load = False
        self._is_loaded = False
        self._ended: asyncio.Future[NodeEvent | None] = asyncio.get_running_loop().create_future()
        """Its last event; None when that was sent already."""
        self.task = asyncio.create_task(self._run())

    @property
    def is_ending(self) -> bool:
        return self._ended.done()

    @property
    def is_fetched(self) -> bool:
        """Its bytes come, or came, from far away."""
        return self._landing is not None and self._landing.is_fetched

    @property
    def worker(self) -> Worker | None:
        """The worker that it has claimed, dead or alive."""
        claim = self._claim
        return claim.result() if claim.done() and not claim.cancelled() else None

    def stop(self) -> None:
        """Ends it, whatever it is doing; ReplicaStopped follows. Harmless when it is ending."""
        self._end(ReplicaStopped(*self._names()))

    @property
    def is_whole(self) -> bool:
        """All of its bytes have arrived."""
        return self._landing is not None and self._landing.report.done()

    def lose(self, reason: str) -> None:
        """It can serve no more, its worker having died or given it up; says so at once."""
        if not self.is_ending:
            self._emit(ReplicaLost(*self._names(), reason))
            self._end(None)

    def spoil(self, reason: str) -> None:
        """Its bytes are worth nothing; says so at once, before its worker is emptied."""
        if not self.is_ending:
            self.is_spoilt = True
            self._emit(ReplicaLost(*self._names(), reason))
            self._end(None)

    def stream(self, job: GenerateJob) -> ItemStream[TokenBatch]:
        """Starts a sequence. Raises ReplicaError when the replica is not ready."""
        return self.serving().channel.stream("generate", job, TokenBatch)

    def serving(self) -> Worker:
        """The worker that takes its sequences. Raises ReplicaError when there is none now."""
        if self.ready is None or self.is_ending or self.worker is None:
            raise ReplicaError(f"replica {self.order.replica_id} is not ready")
        return self.worker

    async def _run(self) -> None:
        starting = asyncio.create_task(self._start())
        await asyncio.wait((starting, self._ended), return_when=asyncio.FIRST_COMPLETED)
        if not self.is_ending:
            self._started(starting)
        last = await self._ended
        starting.cancel()
        await asyncio.wait((starting,))
        if not starting.cancelled():
            starting.exception()  # one that came together with the end says nothing new
        await self._give_back()
        if last is not None:
            self._emit(last)

    def _started(self, starting: asyncio.Task[ReplicaReady]) -> None:
        """The start has come to its end, good or bad."""
        match starting.exception():
            case None:
                self.ready = starting.result()
                self._emit(self.ready)
            case FlashServeError(code=code, message=message):
                self._end(ReplicaFailed(*self._names(), code, message))
            case error:
                _log.error("replica_not_started", replica=self.order.replica_id, exc_info=error)
                message = f"starting failed: {type(error).__name__}: {error}"
                self._end(ReplicaFailed(*self._names(), InternalError.code, message))

    async def _start(self) -> ReplicaReady:
        held = await self._operation.result()
        held_at = time.monotonic()
        landing = self._follow(held)
        worker = await asyncio.shield(self._claim)
        order = held.load_order(landing.num_open)
        waited = self._waited(held_at)
        told_at = time.monotonic()
        self._was_told_to_load = True
        loaded = await worker.channel.call("load", order, LoadReport)
        self._is_loaded = True
        if not order.is_whole:
            self._relay(landing.num_open)
        init_s = max(0.0, time.monotonic() - told_at - loaded.device_s)
        phases = msgspec.structs.replace(waited, device_s=loaded.device_s, init_s=init_s)
        return ReplicaReady(*self._names(), phases)

    def _follow(self, held: HeldModel) -> Landing:
        self._landing = landing = Landing(held.lease.arrival, self._relay)
        landing.report.add_done_callback(lambda report: self._landed(held, report))
        return landing

    def _waited(self, held_at: float) -> Phases:
        """What it took until the worker could be told to load: bytes, then the worker.

        Of bytes that are still arriving only the finding of their place counts here; the rest is
        waited for by the first request.
        """
        now = time.monotonic()
        landed = self._landing.report if self._landing is not None else None
        if landed is not None and landed.done():
            report = landed.result()
            place_s = max(0.0, now - self._ordered_at - report.fetch_s - report.dram_s)
            return Phases(place_s=place_s, fetch_s=report.fetch_s, dram_s=report.dram_s)
        held_s, place_s = held_at - self._ordered_at, now - held_at
        if self.order.model.lowest_tier is Tier.REMOTE:
            return Phases(place_s=place_s, fetch_s=held_s)
        return Phases(place_s=place_s, dram_s=held_s)

    def _relay(self, num_open: int) -> None:
        """Tells a worker that has bound the model what it may use by now."""
        if self._is_loaded and not self.is_ending and (worker := self.worker):
            worker.channel.notify("opened", Opened(self.order.model.model_id, num_open))

    def _landed(self, held: HeldModel, report: asyncio.Future[StageReport]) -> None:
        """All bytes are there, or the rest will not come; perhaps after its own end, when they
        may have been evicted at once.
        """
        model, was_ending = self.order.model, self.is_ending
        is_here = self._store.holds(model.model_id)
        try:
            moved = report.result()
        except FlashServeError as error:
            if not was_ending:
                self._arrival_failed(error)
            elif not is_here and not isinstance(error, UnavailableError):  # nobody stopped it
                self._emit(Evicted(self.order.node_id, model.model_id, Tier.DRAM))
            return
        if was_ending and not is_here:
            return
        events = staged_events(self.order.node_id, model, moved)
        if was_ending and not events:  # somebody else's read
            events = [Staged(self.order.node_id, model.model_id, Tier.DRAM, 0, 0.0)]
        for event in events:
            self._emit(event)
        self._on_staged(model.model_id, held.hint)

    def _arrival_failed(self, error: FlashServeError) -> None:
        """Who computes with the first bytes gets the error; who waits gets it of the next start."""
        if self.ready is None:
            self._end(ReplicaFailed(*self._names(), error.code, error.message))
            return
        if worker := self.worker:
            failed = ArrivalFailed(self.order.model.model_id, error.code, error.message)
            worker.channel.notify("failed", failed)
        self.spoil(error.message)
        self._emit(Evicted(self.order.node_id, self.order.model.model_id, Tier.DRAM))

    async def _give_back(self) -> None:
        if (worker := self.worker) and self._was_told_to_load:
            await _empty(worker)
        self._operation.abandon(self._leave)
        self._pool.release(self._claim)

    def _leave(self, held: HeldModel) -> None:
        """Nobody here needs the bytes, which may go on arriving."""
        if self._landing is None:
            self._follow(held)
        held.lease.release()

    def _end(self, last: NodeEvent | None) -> None:
        if not self._ended.done():
            self._ended.set_result(last)

    def _names(self) -> tuple[NodeId, ReplicaId, ModelId]:
        return self.order.node_id, self.order.replica_id, self.order.model.model_id


async def _empty(worker: Worker) -> None:
    """Returns when the worker holds no model: it has said so, or it is dead."""
    if worker.is_alive:
        try:
            report = await worker.channel.call("unload", None, UnloadReport, _UNLOAD_TIMEOUT_S)
            worker.asleep = frozenset(report.asleep)
        except ReplicaError:
            worker.process.kill()  # the connection has ended, and so does a worker then
        except FlashServeError as error:
            _log.warning("worker_not_emptied", worker=worker.name, error=error.message)
            worker.process.kill()
        else:
            return
    await worker.wait_gone()
    await worker.process.wait()


def staged_events(node_id: NodeId, model: ModelSpec, report: StageReport) -> list[Staged]:
    """That bytes have come into DRAM, if any were moved, and what it took from disk.

    What is fetched comes to disk behind that; the store tells when it has (listening.py).
    """
    if not report.num_bytes:
        return []
    return [Staged(node_id, model.model_id, Tier.DRAM, report.num_bytes, report.dram_s)]
