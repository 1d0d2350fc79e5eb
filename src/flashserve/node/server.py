"""Serves a node agent to a controller of another process, over a Unix socket or loopback TCP."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import ipaddress
import socket
from collections.abc import Callable

import msgspec
import structlog

from flashserve.errors import (
    FlashServeError,
    ForbiddenError,
    InputError,
    InternalError,
    UnavailableError,
    WireError,
)
from flashserve.messages import wire
from flashserve.messages.events import NodeEvent
from flashserve.messages.wire import Call, Cancel, Credit, End, Fault, Frame, Item, Notice, Reply
from flashserve.node.channel import Channel
from flashserve.node.client import Node
from flashserve.node.protocol import (
    DescribeAdapter,
    GenerateOrder,
    Heartbeat,
    PrefetchAdapter,
    pack_tagged,
    unpack_command,
)
from flashserve.types import AdapterId, AdapterSpec

_log = structlog.get_logger()


class NodeServer:
    """One agent, one controller at a time: whoever joins last has the node.

    The agent belongs to the caller, who starts it before and closes it afterwards.
    """

    def __init__(self, agent: Node, *, heartbeat_s: float = 1.0) -> None:
        self._agent = agent
        self._heartbeat_s = heartbeat_s
        self._joining = asyncio.Lock()
        self._sessions: set[_Session] = set()
        self._controller: _Session | None = None
        self._server: asyncio.Server | None = None

    async def listen(self, listener: socket.socket) -> None:
        """Takes connections from now on.

        Raises:
            ForbiddenError: the socket can be reached from other machines, which nothing guards.
        """
        loop = asyncio.get_running_loop()
        if listener.family == socket.AF_UNIX:
            self._server = await loop.create_unix_server(self._accept, sock=listener)
            return
        host = listener.getsockname()[0]
        if not ipaddress.ip_address(host).is_loopback:
            raise ForbiddenError(f"a node server takes no keys, so it may not listen on {host}")
        self._server = await loop.create_server(self._accept, sock=listener)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for session in list(self._sessions):
            await session.close()
        if self._server is not None:
            await self._server.wait_closed()

    async def join(self, session: _Session) -> object:
        """The agent's slots are emptied, its epoch grows, its events go to this session."""
        async with self._joining:
            if self._controller is not None and self._controller is not session:
                error = UnavailableError("another controller has joined the node")
                self._controller.channel.close(error)
            self._controller = session
            await self._agent.start(session.send_event)
            return self._agent.spec

    def _accept(self) -> Channel:
        session = _Session(self, self._agent, self._heartbeat_s, self._ended)
        self._sessions.add(session)
        return session.channel

    def _ended(self, session: _Session) -> None:
        self._sessions.discard(session)
        if self._controller is session:
            self._controller = None

    def has_joined(self, session: _Session) -> bool:
        return self._controller is session


class _Credit:
    """How many items a stream may still send."""

    def __init__(self) -> None:
        self._left = wire.INITIAL_CREDIT
        self._some = asyncio.Event()
        self._some.set()

    def grant(self, num_items: int) -> None:
        self._left += num_items
        if self._left > 0:
            self._some.set()

    async def take(self) -> None:
        await self._some.wait()
        self._left -= 1
        if self._left <= 0:
            self._some.clear()


class _Session:
    """One connection. Streams end with it; orders that it has given stay."""

    def __init__(
        self,
        server: NodeServer,
        agent: Node,
        heartbeat_s: float,
        on_ended: Callable[[_Session], None],
    ) -> None:
        self.channel = Channel("controller", self._receive, self._closed)
        self._server = server
        self._agent = agent
        self._on_ended = on_ended
        self._heartbeat = Heartbeat(self.channel, heartbeat_s)
        self._credits: dict[int, _Credit] = {}
        self._answers: dict[int, asyncio.Task[None]] = {}
        self._beating: asyncio.Task[None] | None = None

    def send_event(self, event: NodeEvent) -> None:
        self.channel.notify("event", pack_tagged(event))

    async def close(self) -> None:
        self.channel.close()
        await self.channel.wait_closed()
        await asyncio.gather(*self._answers.values(), return_exceptions=True)
        if self._beating is not None:
            self._beating.cancel()
            await asyncio.wait((self._beating,))

    def _receive(self, frame: Frame) -> None:
        if self._beating is None:
            self._beating = asyncio.create_task(self._heartbeat.run())
        self._heartbeat.heard()
        match frame:
            case Notice("heartbeat"):
                pass
            case Notice(method, body):
                self._take_order(method, body)
            case Call(call_id, method, body):
                self._start_answer(call_id, method, body)
            case Credit(call_id, num_items):
                if credit := self._credits.get(call_id):
                    credit.grant(num_items)
            case Cancel(call_id):
                if answer := self._answers.get(call_id):
                    answer.cancel()
            case _:
                raise WireError(f"a controller sent an unexpected {type(frame).__name__}")

    def _take_order(self, method: str, body: msgspec.Raw) -> None:
        """What a controller tells its node; from one that has not joined it counts for nothing."""
        match method:
            case "execute":
                order = functools.partial(self._agent.execute, unpack_command(body))
            case "declare_adapter":
                spec = wire.unpack(body, AdapterSpec)
                order = functools.partial(self._agent.declare_adapter, spec)
            case "retire_adapter":
                adapter_id = AdapterId(wire.unpack(body, str))
                order = functools.partial(self._agent.retire_adapter, adapter_id)
            case "prefetch_adapter":
                wanted = wire.unpack(body, PrefetchAdapter)
                order = functools.partial(
                    self._agent.prefetch_adapter,
                    wanted.adapter_id,
                    into_pages=wanted.into_pages,
                )
            case _:
                raise WireError(f"a controller sent the unknown notice {method[:40]}")
        if self._server.has_joined(self):
            order()

    def _start_answer(self, call_id: int, method: str, body: msgspec.Raw) -> None:
        if call_id in self._answers:
            raise WireError(f"call {call_id} is already running")
        if method == "generate":
            self._credits[call_id] = _Credit()
        task = asyncio.create_task(self._answered(call_id, method, body))
        self._answers[call_id] = task
        task.add_done_callback(lambda task: self._ended(call_id, task))

    async def _answered(self, call_id: int, method: str, body: msgspec.Raw) -> None:
        """A call that is not cancelled ends with one Reply, End or Fault."""
        try:
            last = await self._answer(call_id, method, body)
        except FlashServeError as error:
            last = Fault(call_id, error.code, error.message)
        except Exception as error:
            _log.exception("node_call_failed")
            last = Fault(call_id, InternalError.code, f"{type(error).__name__}: {error}")
        self.channel.send(last)

    async def _answer(self, call_id: int, method: str, body: msgspec.Raw) -> Frame:
        match method:
            case "join":
                return Reply(call_id, wire.pack(await self._server.join(self)))
            case "describe":
                facts = await self._agent.describe(wire.unpack(body, str))
                return Reply(call_id, wire.pack(facts))
            case "describe_adapter":
                order = wire.unpack(body, DescribeAdapter)
                found = await self._agent.describe_adapter(order.uri, order.base)
                return Reply(call_id, wire.pack(found))
            case "stats":
                return Reply(call_id, wire.pack(await self._agent.stats()))
            case "generate":
                return await self._generate(call_id, wire.unpack(body, GenerateOrder))
            case _:
                raise InputError(f"a node has no method {method[:40]}")

    async def _generate(self, call_id: int, order: GenerateOrder) -> Frame:
        batches = self._agent.generate(order.replica_id, order.job)
        async with contextlib.aclosing(batches):
            async for batch in batches:
                await self._credits[call_id].take()
                self.channel.send(Item(call_id, wire.pack(batch)))
        return End(call_id)

    def _ended(self, call_id: int, task: asyncio.Task[None]) -> None:
        del self._answers[call_id]
        self._credits.pop(call_id, None)
        if task.cancelled():
            self.channel.send(End(call_id))

    def _closed(self, error: FlashServeError | None) -> None:
        if error is not None:
            _log.warning("controller_connection_failed", error=error.message)
        for answer in self._answers.values():
            answer.cancel()
        if self._beating is not None:
            self._beating.cancel()
        self._on_ended(self)
