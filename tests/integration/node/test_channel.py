"""The asyncio end of a connection, against a peer that the test plays frame by frame."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator

import pytest
from tests.integration.node.nodes import run

from flashserve.errors import (
    CheckpointError,
    FlashServeError,
    InternalError,
    ReplicaError,
    UnavailableError,
    WireError,
)
from flashserve.messages import wire
from flashserve.messages.wire import Call, Cancel, Credit, End, Fault, Frame, Item, Notice, Reply
from flashserve.node.channel import Channel, ItemStream, open_channel


class Peer:
    """The other end of a channel."""

    def __init__(self, sock: socket.socket) -> None:
        self.channel = Channel("the peer", self._notice, self._closed)
        self.sock = sock
        self.has_notice = asyncio.Event()
        self.notices: list[Frame] = []
        self.closed: list[FlashServeError | None] = []
        self._decoder = wire.FrameDecoder()
        self._frames: list[Frame] = []

    def _notice(self, frame: Frame) -> None:
        self.notices.append(frame)
        self.has_notice.set()

    def _closed(self, error: FlashServeError | None) -> None:
        self.closed.append(error)

    async def send(self, *frames: Frame) -> None:
        await self.send_bytes(b"".join(wire.encode(frame) for frame in frames))

    async def send_bytes(self, data: bytes) -> None:
        await asyncio.get_running_loop().sock_sendall(self.sock, data)

    async def receive(self) -> Frame:
        while not self._frames:
            data = await asyncio.get_running_loop().sock_recv(self.sock, 1 << 16)
            assert data, "the channel was closed"
            self._frames += self._decoder.feed(data)
        return self._frames.pop(0)

    async def receive_call(self) -> Call:
        frame = await self.receive()
        assert isinstance(frame, Call)
        return frame

    def hang_up(self) -> None:
        self.sock.close()


@contextlib.asynccontextmanager
async def connected() -> AsyncIterator[Peer]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    peer = Peer(theirs)
    await open_channel(ours, peer.channel)
    try:
        yield peer
    finally:
        peer.channel.close()
        await peer.channel.wait_closed()
        theirs.close()


async def read(stream: ItemStream[int]) -> list[int]:
    return [number async for number in stream]


def test_calls_are_answered_by_id() -> None:
    async def check() -> None:
        async with connected() as peer:
            first = asyncio.create_task(peer.channel.call("add", [1, 2], int))
            second = asyncio.create_task(peer.channel.call("add", [3, 4], int))
            calls = [await peer.receive_call(), await peer.receive_call()]
            for call in reversed(calls):
                await peer.send(Reply(call.id, wire.pack(sum(wire.unpack(call.body, list)))))
            assert (await first, await second) == (3, 7)

    run(check())


def test_a_fault_becomes_the_error_of_its_code() -> None:
    async def check() -> None:
        async with connected() as peer:
            call = asyncio.create_task(peer.channel.call("load", None, int))
            await peer.send(
                Fault((await peer.receive_call()).id, "bad_checkpoint", "tensor x is odd")
            )
            with pytest.raises(CheckpointError, match="tensor x is odd"):
                await call
            call = asyncio.create_task(peer.channel.call("load", None, int))
            await peer.send(Fault((await peer.receive_call()).id, "never heard of", "odd"))
            with pytest.raises(InternalError, match="odd"):
                await call

    run(check())


def test_an_answer_of_another_kind_is_a_wire_error() -> None:
    async def check() -> None:
        async with connected() as peer:
            call = asyncio.create_task(peer.channel.call("load", None, int))
            await peer.send(Reply((await peer.receive_call()).id, wire.pack("text")))
            with pytest.raises(WireError, match="int"):
                await call

    run(check())


def test_a_late_answer_is_ignored_and_the_call_cancelled() -> None:
    async def check() -> None:
        async with connected() as peer:
            with pytest.raises(UnavailableError, match="did not answer load within 0 s"):
                await peer.channel.call("load", None, int, timeout_s=0)
            call = await peer.receive_call()
            assert await peer.receive() == Cancel(call.id)
            await peer.send(Reply(call.id, wire.pack(1)))
            again = asyncio.create_task(peer.channel.call("load", None, int))
            await peer.send(Reply((await peer.receive_call()).id, wire.pack(2)))
            assert await again == 2

    run(check())


def test_a_stream_gives_its_items_and_ends() -> None:
    async def check() -> None:
        async with connected() as peer:
            stream = peer.channel.stream("count", None, int)
            call = await peer.receive_call()
            await peer.send(*(Item(call.id, wire.pack(number)) for number in range(5)))
            await peer.send(End(call.id))
            assert await read(stream) == [0, 1, 2, 3, 4]

    run(check())


def test_credit_is_granted_only_for_what_was_consumed() -> None:
    async def check() -> None:
        async with connected() as peer:
            stream = peer.channel.stream("count", None, int)
            call = await peer.receive_call()
            await peer.send(*(Item(call.id, wire.pack(n)) for n in range(wire.INITIAL_CREDIT)))
            granted = 0
            for number in range(wire.INITIAL_CREDIT):
                assert await anext(stream) == number
            while granted < wire.INITIAL_CREDIT:
                credit = await peer.receive()
                assert isinstance(credit, Credit)
                granted += credit.num_items
            assert granted == wire.INITIAL_CREDIT
            await peer.send(Item(call.id, wire.pack(99)), End(call.id))
            assert await read(stream) == [99]

    run(check())


def test_more_items_than_credit_end_the_connection() -> None:
    async def check() -> None:
        async with connected() as peer:
            stream = peer.channel.stream("count", None, int)
            call = await peer.receive_call()
            await peer.send(*(Item(call.id, wire.pack(n)) for n in range(wire.INITIAL_CREDIT + 1)))
            with pytest.raises(ReplicaError, match="credit"):
                await read(stream)
            assert isinstance(peer.closed[0], WireError)

    run(check())


def test_a_closed_stream_tells_the_peer_and_drops_what_still_comes() -> None:
    async def check() -> None:
        async with connected() as peer:
            stream = peer.channel.stream("count", None, int)
            call = await peer.receive_call()
            await stream.aclose()
            await stream.aclose()
            assert await peer.receive() == Cancel(call.id)
            await peer.send(Item(call.id, wire.pack(1)), End(call.id), Notice("after"))
            assert await read(stream) == []
            await peer.has_notice.wait()

    run(check())


def test_cancelling_the_reader_cancels_the_stream() -> None:
    async def check() -> None:
        async with connected() as peer:
            stream = peer.channel.stream("count", None, int)
            reader = asyncio.create_task(anext(stream))
            call = await peer.receive_call()
            reader.cancel()
            assert await peer.receive() == Cancel(call.id)
            assert reader.cancelled()

    run(check())


def test_the_end_of_the_connection_ends_everything_after_what_had_arrived() -> None:
    async def check() -> None:
        async with connected() as peer:
            stream = peer.channel.stream("count", None, int)
            call = asyncio.create_task(peer.channel.call("load", None, int))
            stream_call = await peer.receive_call()
            await peer.receive_call()
            await peer.send(Item(stream_call.id, wire.pack(1)))
            peer.hang_up()
            with pytest.raises(ReplicaError, match="the peer"):
                await call
            assert await anext(stream) == 1
            with pytest.raises(ReplicaError):
                await anext(stream)
            with pytest.raises(ReplicaError):
                await peer.channel.call("load", None, int)
            with pytest.raises(ReplicaError):
                peer.channel.stream("count", None, int)
            peer.channel.notify("nobody hears it")
            assert len(peer.closed) == 1

    run(check())


def test_garbage_ends_the_connection() -> None:
    async def check() -> None:
        async with connected() as peer:
            call = asyncio.create_task(peer.channel.call("load", None, int))
            await peer.receive()
            await peer.send_bytes(struct.pack(">I", 3) + b"\xc1\xc1\xc1")
            with pytest.raises(ReplicaError, match="agreed form"):
                await call
            assert isinstance(peer.closed[0], WireError)

    run(check())


def test_frames_of_one_turn_leave_in_one_write() -> None:
    async def check() -> None:
        async with connected() as peer:
            for number in range(100):
                peer.channel.notify("count", number)
            data = await asyncio.get_running_loop().sock_recv(peer.sock, 1 << 20)
            assert len(wire.FrameDecoder().feed(data)) == 100

    run(check())


def test_closing_sends_what_was_queued() -> None:
    async def check() -> None:
        async with connected() as peer:
            peer.channel.notify("bye")
            peer.channel.close()
            assert await peer.receive() == Notice("bye")
            await peer.channel.wait_closed()
            assert peer.closed == [None]

    run(check())
