"""One worker process as the agent sees it: started, connected, ready, gone, reaped."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import pathlib
import socket
from collections.abc import Callable, Hashable, Sequence

import structlog

from flashserve.config import EngineSettings
from flashserve.errors import FlashServeError, ReplicaError, UnavailableError, WireError
from flashserve.messages import wire
from flashserve.messages.wire import Frame, Notice
from flashserve.messages.work import ModelLost, WorkerReady
from flashserve.node.channel import Channel, open_channel
from flashserve.node.process import WORKER_COMMAND, WorkerProcess, spawn, worker_arguments
from flashserve.types import ModelId

_log = structlog.get_logger()

START_TIMEOUT_S = 120.0


@dataclasses.dataclass(frozen=True, slots=True)
class Launcher:
    """How this node starts a worker. arena_fd stays open here for as long as workers start."""

    arena_fd: int
    arena_bytes: int
    num_threads: int
    settings: EngineSettings
    device: str
    """cpu, cuda or auto."""
    references: pathlib.Path
    """Directory of the self-checks' references."""
    command: Sequence[str] = WORKER_COMMAND

    def launch(self, name: str) -> Worker:
        """Starts a worker, which is not ready yet. Call it on the main thread (process.py).

        Raises:
            OSError: the process cannot be started.
        """
        process, sock = spawn(
            name,
            lambda fd: worker_arguments(
                self.command,
                fd,
                (self.arena_fd, self.arena_bytes),
                self.num_threads,
                self.settings,
                self.device,
                self.references,
            ),
            (self.arena_fd,),
            self.num_threads,
        )
        return Worker(name, process, sock)


class Worker:
    """One worker process, from its start until it is reaped."""

    def __init__(self, name: str, process: WorkerProcess, sock: socket.socket) -> None:
        self.name = name
        self.process = process
        self.hinted: set[Hashable] = set()
        """Keys of the hints that it was sent; see agent.py."""
        self.last_model: ModelId | None = None
        """What it served last, or serves: its first use of the model's shapes is behind it."""
        self.asleep: frozenset[ModelId] = frozenset()
        """Models that it said it would wake instead of building them anew."""
        self.on_model_lost: Callable[[Worker, ModelLost], None] | None = None
        self.on_gone: Callable[[Worker], None] | None = None
        loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[WorkerReady] = loop.create_future()
        self._gone: asyncio.Future[None] = loop.create_future()
        self.channel = Channel(f"worker {name}", self._frame, self._closed)
        self._connecting = asyncio.create_task(self._connect(sock))

    @property
    def is_alive(self) -> bool:
        return not self._gone.done()

    async def wait_ready(self) -> WorkerReady:
        """Raises ReplicaError when it ends before, UnavailableError when it takes too long."""
        await asyncio.shield(self._connecting)
        waited = (self._ready, self._gone)
        await asyncio.wait(waited, timeout=START_TIMEOUT_S, return_when="FIRST_COMPLETED")
        if self._ready.done():
            return self._ready.result()
        if self._gone.done():
            raise ReplicaError(f"worker {self.name} ended before it was ready")
        raise UnavailableError(f"worker {self.name} was not ready in {START_TIMEOUT_S:g} s")

    async def wait_gone(self) -> None:
        await asyncio.shield(self._gone)

    async def reap(self) -> int:
        """Kills what is left of it; returns the exit status once nothing is."""
        await asyncio.shield(self._connecting)
        self.channel.close()
        self.process.kill()
        status = await self.process.wait()
        await self.process.finish_output()
        await self.channel.wait_closed()
        return status

    async def stop(self, grace_s: float) -> int:
        """Closing its connection makes a ready worker exit; the others are killed."""
        await asyncio.shield(self._connecting)
        self.channel.close()
        if self._ready.done():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(grace_s):
                    await self.process.wait()
        return await self.reap()

    async def _connect(self, sock: socket.socket) -> None:
        await self.process.read_output()
        await open_channel(sock, self.channel)

    def _frame(self, frame: Frame) -> None:
        if isinstance(frame, Notice) and frame.method == "ready":
            if not self._ready.done():
                self._ready.set_result(wire.unpack(frame.body, WorkerReady))
        elif isinstance(frame, Notice) and frame.method == "lost":
            if self.on_model_lost is not None:
                self.on_model_lost(self, wire.unpack(frame.body, ModelLost))
        else:
            raise WireError(f"worker {self.name} sent an unexpected {type(frame).__name__}")

    def _closed(self, error: FlashServeError | None) -> None:
        if error is not None:
            _log.warning("worker_connection_failed", worker=self.name, error=error.message)
        self._gone.set_result(None)
        if self.on_gone is not None:
            self.on_gone(self)
