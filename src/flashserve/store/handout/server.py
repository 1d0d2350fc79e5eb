"""Gives models to processes that are no workers: a private Unix socket of the node's store.

Each model is copied once into a sealed memfd of its own, which everybody who asks shares; the
arena's descriptor never leaves. A client's lease is its open connection: the kernel ends it when
the client does, and the memory goes with the last of them.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import TypeVar

import structlog

from flashserve.config import StoreSettings
from flashserve.errors import (
    ConflictError,
    FlashServeError,
    InternalError,
    ModelTooLargeError,
    SourceError,
    UnavailableError,
    WireError,
)
from flashserve.messages import wire
from flashserve.messages.handout import MAX_REQUEST_BYTES, METHOD, HandoutRequest
from flashserve.store.checkpoint.files import one_line, shown
from flashserve.store.checkpoint.snapshot import Snapshot
from flashserve.store.handout.copies import ModelCopy, copy_lease, read_copy, reading_store
from flashserve.store.sources.source import open_source, scheme_of
from flashserve.store.store import Lease, Store
from flashserve.types import ModelId, ModelSpec, Tier

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


@dataclasses.dataclass(slots=True, eq=False)
class _Shared:
    """One model's copy, there or being made; num_users connections want or have it."""

    num_bytes: int
    making: asyncio.Task[ModelCopy]
    num_users: int = 0


class Handout:
    """Serves `listener` from `start` to `close`, on the running event loop.

    Args:
        models: what the node knows, by name; asked anew for each request.
        settings: for what is read past the node's store; handout_bytes bounds all copies.
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
        self._max_bytes = settings.handout_bytes
        # By the identity of the content; an entry goes with its last user.
        self._shared: dict[str, _Shared] = {}
        # Reading may take minutes, in threads that nobody else waits for.
        self._executor = concurrent.futures.ThreadPoolExecutor(_NUM_THREADS, "handout")
        self._accepting: asyncio.Task[None] | None = None
        self._clients: set[asyncio.Task[None]] = set()
        self._numbers = itertools.count()
        self._making: set[asyncio.Task[ModelCopy]] = set()
        self._reading: set[Store] = set()

    @property
    def copied_bytes(self) -> int:
        """Memory that copies take, or will when they are made."""
        return sum(shared.num_bytes for shared in self._shared.values())

    @property
    def num_clients(self) -> int:
        return len(self._clients)

    def start(self) -> None:
        self._accepting = asyncio.create_task(self._accept())

    async def close(self) -> None:
        """Ends every lease; what clients have mapped stays theirs. The listener stays open."""
        tasks = [*self._clients, *([self._accepting] if self._accepting else [])]
        for task in tasks:
            task.cancel()
        for store in tuple(self._reading):
            await asyncio.to_thread(store.close)
        await asyncio.gather(*tasks, *self._making, return_exceptions=True)
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
            with contextlib.suppress(OSError, TimeoutError):  # the client is gone
                try:
                    async with self._copy(request.source) as copy:
                        await _send(sock, wire.Reply(call_id, wire.pack(copy.grant)), copy.fd)
                        await asyncio.get_running_loop().sock_recv(sock, 1)
                except FlashServeError as error:
                    await _send(sock, wire.Fault(call_id, error.code, error.message))

    @contextlib.asynccontextmanager
    async def _copy(self, source: str) -> AsyncIterator[ModelCopy]:
        """The copy of a model, made unless it is there, and kept as long as the context lasts."""
        if len(self._clients) > _MAX_CLIENTS:
            raise UnavailableError(f"{_MAX_CLIENTS} other processes have models of this node")
        models = self._models()
        snapshot = await self._run(lambda: self._inspect(source, models))
        shared = self._shared.get(snapshot.identity)
        if shared is None:
            self._check_room(snapshot)
            shared = _Shared(
                snapshot.arena_bytes, asyncio.create_task(self._make(snapshot, models))
            )
            self._shared[snapshot.identity] = shared
            self._making.add(shared.making)
        shared.num_users += 1
        try:
            yield await asyncio.shield(shared.making)
        finally:
            shared.num_users -= 1
            if not shared.num_users:
                del self._shared[snapshot.identity]
                shared.making.add_done_callback(self._drop)

    def _inspect(self, source: str, models: _Models) -> Snapshot:
        model = models.get(ModelId(source))
        if model is None and scheme_of(source) is None and not Path(source).is_absolute():
            raise SourceError(
                f"{shown(source)} is neither a directory nor a model that this node knows"
            )
        return self._store.inspect(source if model is None else model.source)

    def _check_room(self, snapshot: Snapshot) -> None:
        num_bytes, taken = snapshot.arena_bytes, self.copied_bytes
        what = f"a copy of {snapshot.uri} takes {num_bytes} bytes"
        if num_bytes > self._max_bytes:
            raise ModelTooLargeError(
                f"{what}, and all copies together may take {self._max_bytes}: raise "
                "store.handout_bytes"
            )
        if taken + num_bytes > self._max_bytes:
            raise UnavailableError(
                f"{what}, and {taken} of {self._max_bytes} are taken by other processes: end one, "
                "or raise store.handout_bytes"
            )

    async def _make(self, snapshot: Snapshot, models: _Models) -> ModelCopy:
        try:
            return await self._run(lambda: self._make_in_thread(snapshot, models))
        except FlashServeError:
            raise
        except Exception as error:
            _log.exception("handout_failed", source=snapshot.uri)
            raise InternalError(f"the copy failed: {one_line(error)}") from error

    def _make_in_thread(self, snapshot: Snapshot, models: _Models) -> ModelCopy:
        """From the arena if the bytes are there, else from the source: the arena's room belongs
        to who serves. What is remote passes through it, because the disk tier is behind it.
        """
        if lease := self._resident(snapshot.identity, models):
            with lease:
                return copy_lease(lease, self._store.arena)
        if open_source(snapshot.uri, self._data_dir, self._settings).lowest_tier is Tier.REMOTE:
            with contextlib.suppress(UnavailableError):  # it has no room now
                return self._through_arena(snapshot.uri)
        store = reading_store(self._data_dir, self._settings)
        self._reading.add(store)
        try:
            return read_copy(store, snapshot.uri)
        finally:
            self._reading.discard(store)
            store.close()

    def _through_arena(self, uri: str) -> ModelCopy:
        model = ModelSpec(ModelId(f"#handout-{next(self._numbers)}"), uri, 0)  # nobody's name
        try:
            self._store.stage(model, Tier.DRAM)
            with self._store.lease(model.model_id) as lease:
                return copy_lease(lease, self._store.arena)
        finally:
            self._store.forget(model.model_id)

    def _resident(self, identity: str, models: _Models) -> Lease | None:
        for model_id in models:
            with contextlib.suppress(ConflictError):  # it is not in DRAM
                if self._store.snapshot(model_id).identity == identity:
                    return self._store.lease(model_id)
        return None

    def _drop(self, making: asyncio.Task[ModelCopy]) -> None:
        self._making.discard(making)
        if not making.cancelled() and making.exception() is None:
            making.result().close()


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


async def _send(sock: socket.socket, frame: wire.Frame, *fds: int) -> None:
    """The descriptors travel with the first byte, which the empty buffer of a socket takes."""
    data = memoryview(wire.encode(frame))
    async with asyncio.timeout(_ANSWER_TIMEOUT_S):
        sent = socket.send_fds(sock, [data], fds)
        await asyncio.get_running_loop().sock_sendall(sock, data[sent:])
