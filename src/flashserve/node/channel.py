"""The asyncio end of a connection that carries wire frames: calls, streams, notices.

A `Channel` is the caller's side (see messages/wire.py). What a callee receives (Call, Credit,
Cancel) and notices are handed to `on_frame`, so node/server.py answers through the same class.
"""

from __future__ import annotations

import asyncio
import collections
import itertools
import socket
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar, cast

import msgspec

from flashserve.errors import (
    FlashServeError,
    ReplicaError,
    UnavailableError,
    WireError,
    error_from_code,
)
from flashserve.messages import wire
from flashserve.messages.wire import Call, Cancel, Credit, End, Fault, Frame, Item, Notice, Reply

T = TypeVar("T")
_GRANT_ITEMS = wire.INITIAL_CREDIT // 2


class ItemStream(Generic[T]):
    """The items of one stream, in order; memory is bounded by the credit granted.

    Iteration raises what the callee reported as a Fault, or a ReplicaError when the connection
    ended; items that had arrived before are delivered first.
    """

    def __init__(self, channel: Channel, stream_id: int, kind: type[T]) -> None:
        self._channel = channel
        self._id = stream_id
        self._kind = kind
        self._items: collections.deque[msgspec.Raw] = collections.deque()
        self._waiter: asyncio.Future[None] | None = None
        self._end: FlashServeError | None = None
        self._ended = False
        self._consumed = 0

    def __aiter__(self) -> ItemStream[T]:
        return self

    async def __anext__(self) -> T:
        while not self._items:
            if self._end is not None:
                raise self._end
            if self._ended:
                raise StopAsyncIteration
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            except asyncio.CancelledError:
                self.cancel()
                raise
            finally:
                self._waiter = None
        item = self._items.popleft()
        self._grant()
        return wire.unpack(item, self._kind)

    async def aclose(self) -> None:
        self.cancel()

    def cancel(self) -> None:
        """The callee is told to stop, unless it has ended; nothing more is delivered."""
        if not self._ended:
            self._channel.cancel_stream(self._id)
        self._ended = True
        self._items.clear()
        self._wake()

    def push(self, item: msgspec.Raw) -> None:
        """Raises WireError when the callee sends more than it was granted."""
        if len(self._items) + self._consumed >= wire.INITIAL_CREDIT:
            raise WireError("a peer sent more items than it had credit for")
        self._items.append(item)
        self._wake()

    def finish(self, error: FlashServeError | None) -> None:
        self._ended = True
        self._end = error
        self._wake()

    def _grant(self) -> None:
        self._consumed += 1
        if self._consumed >= _GRANT_ITEMS and not self._ended:
            self._channel.send(Credit(self._id, self._consumed))
            self._consumed = 0

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Channel(asyncio.Protocol):
    """One connection. Everything runs on the event loop's thread.

    Args:
        peer: how errors name the other side.
        on_frame: gets every frame that is not an answer to this side.
        on_closed: called once when the connection has ended; None means that it was closed here
            or by the peer in good order.
    """

    def __init__(
        self,
        peer: str,
        on_frame: Callable[[Frame], None],
        on_closed: Callable[[FlashServeError | None], None] | None = None,
    ) -> None:
        self.peer = peer
        self._on_frame = on_frame
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._decoder = wire.FrameDecoder()
        self._ids = itertools.count(1)
        self._calls: dict[int, asyncio.Future[msgspec.Raw]] = {}
        self._streams: dict[int, ItemStream[Any]] = {}
        self._out: list[bytes] = []
        self._error: FlashServeError | None = None
        self._closed = self._loop.create_future()

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    @property
    def is_quiet(self) -> bool:
        """The peer owes no answer and no item."""
        return self.is_open and not self._calls and not self._streams

    async def call(
        self, method: str, body: object, kind: type[T], timeout_s: float | None = None
    ) -> T:
        """The callee's answer.

        Raises:
            UnavailableError: no answer within timeout_s.
            ReplicaError: the connection has ended.
            FlashServeError: what the callee reported.
        """
        return await self.ask(method, body, kind, timeout_s)

    def ask(
        self, method: str, body: object, kind: type[T], timeout_s: float | None = None
    ) -> Coroutine[Any, Any, T]:
        """A call that is sent at once, and its answer, which must be awaited; see `call`.

        Raises:
            ReplicaError: the connection has ended.
        """
        self._require_open()
        call_id = next(self._ids)
        self._calls[call_id] = self._loop.create_future()
        self.send(Call(call_id, method, wire.pack(body)))
        return self._answer(call_id, method, kind, timeout_s)

    async def _answer(self, call_id: int, method: str, kind: type[T], timeout_s: float | None) -> T:
        answer = self._calls[call_id]
        try:
            async with asyncio.timeout(timeout_s):
                reply = await answer
        except TimeoutError:
            self.send(Cancel(call_id))
            raise UnavailableError(
                f"{self.peer} did not answer {method} within {timeout_s:g} s"
            ) from None
        finally:
            del self._calls[call_id]
        return wire.unpack(reply, kind)

    def stream(self, method: str, body: object, kind: type[T]) -> ItemStream[T]:
        """Starts a stream at once.

        Raises:
            ReplicaError: the connection has ended.
        """
        self._require_open()
        stream_id = next(self._ids)
        self.send(Call(stream_id, method, wire.pack(body)))
        stream = ItemStream(self, stream_id, kind)
        self._streams[stream_id] = stream
        return stream

    def notify(self, method: str, body: object = None) -> None:
        self.send(Notice(method, wire.pack(body)))

    def send(self, frame: Frame) -> None:
        """Queues a frame; all frames of one turn of the loop leave in one write.

        A frame for a connection that has ended is dropped: its end has been or will be reported.
        """
        if not self.is_open:
            return
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(wire.encode(frame))

    def cancel_stream(self, stream_id: int) -> None:
        """Tells the callee to stop; what it still sends for the stream is dropped."""
        if self._streams.pop(stream_id, None) is not None:
            self.send(Cancel(stream_id))

    def close(self, error: FlashServeError | None = None) -> None:
        """Sends what is queued and closes; `error` becomes the reason that waiters see."""
        self._error = self._error or error
        if self._transport is not None:
            self._flush()
            self._transport.close()

    def abort(self, error: FlashServeError) -> None:
        """Ends the connection without waiting for the peer to take what is queued."""
        self._error = self._error or error
        if self._transport is not None:
            self._transport.abort()

    async def wait_closed(self) -> None:
        await asyncio.shield(self._closed)

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        try:
            for frame in self._decoder.feed(data):
                self._receive(frame)
        except WireError as error:
            self.abort(error)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._error is None and exc is not None:
            self._error = ReplicaError(f"{self.peer}: {exc}")
        self._transport = None
        ended = self._ended_error()
        for answer in self._calls.values():
            if not answer.done():
                answer.set_exception(ended)
        for stream in self._streams.values():
            stream.finish(ended)
        self._streams.clear()
        self._closed.set_result(None)
        if self._on_closed is not None:
            self._on_closed(self._error)

    def _receive(self, frame: Frame) -> None:
        match frame:
            case Reply(call_id, body):
                if (answer := self._calls.get(call_id)) and not answer.done():
                    answer.set_result(body)
            case Item(stream_id, body):
                if stream := self._streams.get(stream_id):
                    stream.push(body)
            case End(stream_id):
                if stream := self._streams.pop(stream_id, None):
                    stream.finish(None)
            case Fault(frame_id, code, message):
                self._fault(frame_id, error_from_code(code, message))
            case _:
                self._on_frame(frame)

    def _fault(self, frame_id: int, error: FlashServeError) -> None:
        if stream := self._streams.pop(frame_id, None):
            stream.finish(error)
        elif (answer := self._calls.get(frame_id)) and not answer.done():
            answer.set_exception(error)

    def _flush(self) -> None:
        if self._out and self._transport is not None:
            self._transport.write(b"".join(self._out))
        self._out.clear()

    def _require_open(self) -> None:
        if not self.is_open:
            raise self._ended_error()

    def _ended_error(self) -> ReplicaError:
        reason = f": {self._error.message}" if self._error else ""
        return ReplicaError(f"{self.peer}: the connection has ended{reason}")


async def open_channel(sock: socket.socket, channel: Channel) -> None:
    """Puts `channel` over a connected stream socket, which belongs to it from here on."""
    loop = asyncio.get_running_loop()
    sock.setblocking(False)
    if sock.family == socket.AF_UNIX:
        await loop.create_unix_connection(lambda: channel, sock=sock)
    else:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await loop.create_connection(lambda: channel, sock=sock)
