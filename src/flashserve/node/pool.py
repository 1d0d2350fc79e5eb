"""The workers of a node: kept alive, handed out in the order in which they were asked for."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import itertools
from collections.abc import AsyncIterator, Callable

import structlog

from flashserve.errors import FlashServeError, UnavailableError
from flashserve.messages.work import ModelLost
from flashserve.node.workers import START_TIMEOUT_S, Launcher, Worker
from flashserve.types import ModelId

_log = structlog.get_logger()

_TEMPORARY_KV_BYTES = 1 << 20
_SETTLED_S = 10.0
"""A worker that lived so long past its start did not die at once."""
_MAX_BACKOFF_S = 30.0


class WorkerPool:
    """Keeps `size` workers. A claim is answered in order; a dead worker is replaced.

    Args:
        on_ready: a worker became ready; the number ready now follows.
        on_spare: a worker has nothing to do and nobody waits for it.
        on_lost: a ready worker ended by itself; called at once, before it is reaped.
        on_model_lost: a worker cannot go on with the model that it holds.
    """

    def __init__(
        self,
        launcher: Launcher,
        size: int,
        *,
        on_ready: Callable[[Worker], None],
        on_spare: Callable[[Worker], None],
        on_lost: Callable[[Worker], None],
        on_model_lost: Callable[[Worker, ModelLost], None],
    ) -> None:
        self._launcher = launcher
        self._size = size
        self._on_ready = on_ready
        self._on_spare = on_spare
        self._on_lost = on_lost
        self._on_model_lost = on_model_lost
        self._names = itertools.count()
        self._claims: collections.deque[tuple[ModelId, asyncio.Future[Worker]]]
        self._claims = collections.deque()
        self._spare: list[Worker] = []
        self._ready: set[Worker] = set()
        self._all: set[Worker] = set()
        self._keepers: list[asyncio.Task[None]] = []
        self._first_ready = asyncio.Event()

    @property
    def num_ready(self) -> int:
        return len(self._ready)

    @property
    def ready(self) -> frozenset[Worker]:
        return frozenset(self._ready)

    @property
    def spare(self) -> tuple[Worker, ...]:
        return tuple(self._spare)

    @property
    def resting(self) -> tuple[Worker, ...]:
        """Those that hold a model and do nothing just now."""
        held = (worker for worker in self._all if worker in self._ready - set(self._spare))
        return tuple(worker for worker in held if worker.channel.is_quiet)

    def start(self) -> None:
        self._keepers = [asyncio.create_task(self._keep(slot)) for slot in range(self._size)]

    def claim(self, model_id: ModelId) -> asyncio.Future[Worker]:
        """A worker for one replica, as soon as those who asked before have theirs.

        Among spare workers, one in which the model sleeps is taken first, then one that served it
        last, then one that served none.
        """
        claim: asyncio.Future[Worker] = asyncio.get_running_loop().create_future()
        self._claims.append((model_id, claim))
        self._assign()
        return claim

    def release(self, claim: asyncio.Future[Worker]) -> None:
        """Gives a claim back, answered or not. Its worker, if alive, must be empty again."""
        if not claim.done():
            claim.cancel()
        elif not claim.cancelled() and (worker := claim.result()) in self._ready:
            self._add_spare(worker)

    @contextlib.asynccontextmanager
    async def temporary(self) -> AsyncIterator[Worker]:
        """A ready worker beyond the pool's size, for as long as the context lasts; it has hardly
        any memory for keys and values, and no device.

        Raises:
            UnavailableError: it did not start.
        """
        settings = self._launcher.settings.model_copy(update={"kv_bytes": _TEMPORARY_KV_BYTES})
        launcher = dataclasses.replace(self._launcher, settings=settings, device="cpu")
        worker = launcher.launch(f"temporary-{next(self._names)}")
        self._all.add(worker)
        try:
            await worker.wait_ready()
            yield worker
        finally:
            await worker.stop(grace_s=0.0)
            self._all.discard(worker)

    async def wait_any_ready(self) -> None:
        """Returns once some worker has become ready, at once when one had before.

        Raises:
            UnavailableError: none did in time.
        """
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                await self._first_ready.wait()
        except TimeoutError:
            raise UnavailableError("no worker has started yet; the log says why") from None

    async def close(self, grace_s: float) -> None:
        """Ends every worker; none is left when it returns."""
        for keeper in self._keepers:
            keeper.cancel()
        await asyncio.gather(*self._keepers, return_exceptions=True)
        for worker in self._all:
            worker.on_gone = None
        await asyncio.gather(*[worker.stop(grace_s) for worker in self._all])
        self._all.clear()
        self._ready.clear()
        self._spare.clear()

    async def _keep(self, slot: int) -> None:
        """Keeps one worker alive: starts it, waits for its end, starts the next."""
        failures = 0
        while True:
            try:
                lived_s = await self._run_one(f"{slot}-{next(self._names)}")
            except OSError as error:
                _log.error("worker_not_started", slot=slot, error=str(error))
                lived_s = 0.0
            failures = 0 if lived_s >= _SETTLED_S else failures + 1
            if failures > 1:
                await asyncio.sleep(min(_MAX_BACKOFF_S, 0.25 * 2**failures))

    async def _run_one(self, name: str) -> float:
        """One worker from start to end; returns for how many seconds it was ready."""
        loop = asyncio.get_running_loop()
        worker = self._launcher.launch(name)
        self._all.add(worker)
        worker.on_gone = self._gone
        worker.on_model_lost = self._on_model_lost
        ready_at = None
        try:
            await worker.wait_ready()
            ready_at = loop.time()
            self._became_ready(worker)
            await worker.wait_gone()
        except FlashServeError as error:
            _log.error("worker_not_ready", worker=name, error=error.message)
        lived_s = loop.time() - ready_at if ready_at is not None else 0.0
        status = await worker.reap()
        self._all.discard(worker)
        _log.warning(
            "worker_ended", worker=name, status=status, last_lines=worker.process.last_lines
        )
        return lived_s

    def _became_ready(self, worker: Worker) -> None:
        if worker.is_alive:
            self._ready.add(worker)
            self._first_ready.set()
            self._on_ready(worker)
            self._add_spare(worker)

    def _gone(self, worker: Worker) -> None:
        if worker in self._ready:
            self._ready.discard(worker)
            if worker in self._spare:
                self._spare.remove(worker)
            self._on_lost(worker)

    def _add_spare(self, worker: Worker) -> None:
        self._spare.append(worker)
        self._assign()
        if worker in self._spare:
            self._on_spare(worker)

    def _assign(self) -> None:
        while self._claims and (self._claims[0][1].done() or self._spare):
            model_id, claim = self._claims.popleft()
            if not claim.done():
                worker = min(self._spare, key=lambda each: _unfitness(each, model_id))
                self._spare.remove(worker)
                worker.last_model = model_id
                claim.set_result(worker)


def _unfitness(worker: Worker, model_id: ModelId) -> int:
    """Lowest for the worker to take; `min` keeps the longest spare among equals."""
    if model_id in worker.asleep:
        return 0
    if worker.last_model == model_id:
        return 1
    return 2 if worker.last_model is None else 3
