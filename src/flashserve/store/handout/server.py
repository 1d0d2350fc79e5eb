"""Gives models to processes that are no workers: a private Unix socket of the node's store.

Each model is copied once into a sealed memfd of its own, which everybody who asks shares; the
arena's descriptor never leaves. A client's lease is its open connection: the kernel ends it when
the client does, also while it waits. The memory goes some seconds after the last of them.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import TypeVar

import structlog

from flashserve.config import StoreSettings
from flashserve.errors import FlashServeError, SourceError, UnavailableError, WireError
from flashserve.messages import wire
from flashserve.messages.handout import MAX_REQUEST_BYTES, METHOD, HandoutRequest
from flashserve.store.checkpoint.files import one_line, shown
from flashserve.store.checkpoint.snapshot import Snapshot
from flashserve.store.handout.copies import ModelCopy
from flashserve.store.handout.kept import KeptCopies
from flashserve.store.handout.making import CopyJob
from flashserve.store.sources.source import scheme_of
from flashserve.store.store import Store
from flashserve.types import ModelId, ModelSpec

_REQUEST_TIMEOUT_S = 5.0
_ANSWER_TIMEOUT_S = 30.0
_PAUSE_S = 0.1
_RECV_BYTES = 16 << 10
_MAX_CLIENTS = 256
_NUM_THREADS = 4
CREDENTIALS = struct.Struct("iII")
"""struct ucred: process, user, group."""

T = TypeVar("T")
_Models = Mapping[ModelId, ModelSpec]
_log = structlog.get_logger()


class Handout:
    """Serves `listener` from `start` to `close`, on the running event loop.

    Args:
        models: what the node knows, by name; asked anew for each request.
        settings: for what is read past the node's store; handout_bytes bounds all copies,
            handout_keep_s is how long one without users stays.
    """

    def __init__(
        self,
        listener: socket.socket,
        store: Store,
        data_dir: Path,
        models: Callable[[], _Models],
        settings: StoreSettings,
    ) -> None:
        listener.setblocking(False)
        self._listener = listener
        self._store = store
        self._data_dir = data_dir
        self._models = models
        self._settings = settings
        # Also what reads sources, which may take minutes: threads that nobody else waits for.
        self._executor = concurrent.futures.ThreadPoolExecutor(_NUM_THREADS, "handout")
        self._kept = KeptCopies(self._executor, settings.handout_bytes, settings.handout_keep_s)
        self._accepting: asyncio.Task[None] | None = None
        self._clients: set[asyncio.Task[None]] = set()

    @property
    def copied_bytes(self) -> int:
        """Memory that copies take, or will when they are made."""
        return self._kept.num_bytes

    @property
    def num_clients(self) -> int:
        return len(self._clients)

    def leases(self) -> Mapping[str, int]:
        """How many connections have or wait for a model, by the uri of its source."""
        return self._kept.users()

    def start(self) -> None:
        self._accepting = asyncio.create_task(self._accept())

    async def close(self) -> None:
        """Ends every lease; what clients have mapped stays theirs. The listener stays open."""
        tasks = [*self._clients, *([self._accepting] if self._accepting else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._kept.close()
        self._executor.shutdown()

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, _ = await loop.sock_accept(self._listener)
            except OSError as error:  # too many descriptors, as a rule: some will be closed
                _log.warning("handout_cannot_accept", error=one_line(error))
                await asyncio.sleep(_PAUSE_S)
                continue
            sock.setblocking(False)
            task = asyncio.create_task(self._serve(sock))
            self._clients.add(task)
            task.add_done_callback(self._clients.discard)

    async def _serve(self, sock: socket.socket) -> None:
        """One connection, from its request to its end."""
        with sock:
            try:
                _check_peer(sock)
                async with asyncio.timeout(_REQUEST_TIMEOUT_S):
                    call_id, request = await _receive(sock)
            except (OSError, WireError, TimeoutError) as error:
                _log.warning("handout_refused", error=one_line(error) or "no request in time")
                return
            async with asyncio.TaskGroup() as group:
                giving = group.create_task(self._give(sock, call_id, request.source))
                await _left(sock)
                giving.cancel()

    async def _give(self, sock: socket.socket, call_id: int, source: str) -> None:
        """Answers, and keeps what it gave until it is cancelled."""
        with contextlib.suppress(OSError, TimeoutError):  # the client is gone
            try:
                async with self._copy(source) as copy:
                    await _send(sock, wire.Reply(call_id, wire.pack(copy.grant)), copy.fd)
                    await asyncio.Event().wait()
            except FlashServeError as error:
                await _send(sock, wire.Fault(call_id, error.code, error.message))
                sock.shutdown(socket.SHUT_RDWR)

    @contextlib.asynccontextmanager
    async def _copy(self, source: str) -> AsyncIterator[ModelCopy]:
        if len(self._clients) > _MAX_CLIENTS:
            raise UnavailableError(f"{_MAX_CLIENTS} other processes have models of this node")
        models = self._models()
        snapshot = await self._run(lambda: self._inspect(source, models))

        def make_job() -> CopyJob:
            return CopyJob(snapshot, models, self._store, self._data_dir, self._settings)

        async with self._kept.use(snapshot, make_job) as copy:
            yield copy

    def _inspect(self, source: str, models: _Models) -> Snapshot:
        model = models.get(ModelId(source))
        if model is None and scheme_of(source) is None and not Path(source).is_absolute():
            raise SourceError(
                f"{shown(source)} is neither a directory nor a model that this node knows"
            )
        return self._store.inspect(source if model is None else model.source)


def _check_peer(sock: socket.socket) -> None:
    credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    _, uid, _ = CREDENTIALS.unpack(credentials)
    if uid != os.getuid():
        raise WireError(f"a process of another user ({uid}) connected")


async def _receive(sock: socket.socket) -> tuple[int, HandoutRequest]:
    decoder, num_bytes = wire.FrameDecoder(), 0
    while piece := await asyncio.get_running_loop().sock_recv(sock, _RECV_BYTES):
        num_bytes += len(piece)
        if num_bytes > MAX_REQUEST_BYTES:
            raise WireError(f"a request is longer than {MAX_REQUEST_BYTES} bytes")
        for frame in decoder.feed(piece):
            if not isinstance(frame, wire.Call) or frame.method != METHOD:
                raise WireError(f"the first frame is no call of {METHOD}")
            return frame.id, wire.unpack(frame.body, HandoutRequest)
    raise WireError("the connection ended before its request")


async def _left(sock: socket.socket) -> None:
    """Returns when the client has closed its end, or says what it has no reason to."""
    with contextlib.suppress(OSError):
        await asyncio.get_running_loop().sock_recv(sock, 1)


async def _send(sock: socket.socket, frame: wire.Frame, *fds: int) -> None:
    """The descriptors travel with the first byte, which the empty buffer of a socket takes."""
    data = memoryview(wire.encode(frame))
    async with asyncio.timeout(_ANSWER_TIMEOUT_S):
        sent = socket.send_fds(sock, [data], fds)
        await asyncio.get_running_loop().sock_sendall(sock, data[sent:])
