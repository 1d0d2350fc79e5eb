"""What the live side asks of a node, whether it runs in this process or elsewhere."""

from __future__ import annotations

import asyncio
import dataclasses
import pathlib
import socket
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

import structlog

from flashserve.errors import FlashServeError, UnavailableError, WireError
from flashserve.messages.commands import NodeCommand
from flashserve.messages.events import NodeEvent, NodeLost
from flashserve.messages.wire import Frame, Notice
from flashserve.messages.work import AdapterFacts, GenerateJob, ModelFacts, TokenBatch, WorkerStats
from flashserve.node.channel import Channel, open_channel
from flashserve.node.protocol import (
    DescribeAdapter,
    GenerateOrder,
    Heartbeat,
    PrefetchAdapter,
    pack_tagged,
    unpack_event,
)
from flashserve.store.dram.arena import ArenaUsage
from flashserve.store.reporting import StoreReport
from flashserve.types import AdapterId, AdapterSpec, ModelId, ModelSpec, NodeSpec, ReplicaId, Tier

_log = structlog.get_logger()

Address = pathlib.Path | tuple[str, int]
"""Of a node server: the path of its Unix socket, or host and port."""


@dataclasses.dataclass(frozen=True, slots=True)
class ModelResidence:
    """Where a model's bytes are on a node, replicas apart.

    dram_bytes and disk_bytes: what it takes of the arena and of the disk tier, alone or with
    others; num_leases: how many replicas and readers keep its bytes in DRAM, and other processes
    their copy of them.
    """

    tier: Tier
    dram_bytes: int
    disk_bytes: int = 0
    num_leases: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class AdapterResidence:
    """Where an adapter's bytes are on a node, what it takes of the arena, and who uses it now."""

    tier: Tier
    dram_bytes: int
    num_users: int


@dataclasses.dataclass(frozen=True, slots=True)
class NodeStats:
    """models: those with an order to this node and none to leave it since; replicas: those that
    answered in time; store: None of a node that keeps no bytes; adapters: those declared.
    """

    dram: ArenaUsage
    models: dict[ModelId, ModelResidence]
    replicas: dict[ReplicaId, WorkerStats]
    store: StoreReport | None = None
    adapters: dict[AdapterId, AdapterResidence] = dataclasses.field(default_factory=dict)


class Node(Protocol):
    """A node agent. All of it runs on the event loop's thread.

    An in-process node is node.agent.Agent; one behind a socket is `RemoteNode`.
    """

    spec: NodeSpec

    async def start(self, on_event: Callable[[NodeEvent], None]) -> None:
        """Joins the node: its slots are empty, `spec.epoch` is new, events follow.

        Workers become ready later; WorkersChanged tells.
        """

    def execute(self, command: NodeCommand) -> None:
        """Takes an order. Never raises: failures come as events; an old epoch is ignored."""

    def generate(self, replica_id: ReplicaId, job: GenerateJob) -> AsyncGenerator[TokenBatch, None]:
        """The tokens of one sequence. Closing it, or cancelling whoever waits, aborts it.

        Raises (at the first item or later):
            ReplicaError: the replica is gone.
            FlashServeError: the engine refuses the job.
        """

    async def describe(self, uri: str) -> ModelFacts:
        """Checks a source and says what it holds, without moving its bytes.

        Raises:
            DeployError: it cannot be served.
        """

    async def describe_adapter(self, uri: str, base: ModelSpec) -> AdapterFacts:
        """Reads an adapter, its values too, and checks that it can be served on `base`.

        Raises:
            DeployError: it cannot be served.
            UnavailableError: there is no room for it now.
        """

    def declare_adapter(self, spec: AdapterSpec) -> None:
        """Jobs may name it from now on. Reads nothing; a new `start` forgets it."""

    def retire_adapter(self, adapter_id: AdapterId) -> None:
        """Jobs that name it end undisturbed, and it leaves with the last."""

    def prefetch_adapter(self, adapter_id: AdapterId, *, into_pages: bool = False) -> None:
        """Brings it into DRAM ahead of a job. A failure comes with the job.

        Args:
            into_pages: into the device's memory too, of every replica of its base that is ready
                and has room that no sequence wants.
        """

    async def stats(self) -> NodeStats: ...

    async def close(self, grace_s: float) -> None:
        """Ends everything that the node has started; what runs is cut off."""


class RemoteNode:
    """The agent of another process, behind a node server (node/server.py).

    Args:
        on_lost: told once when the connection ended or fell silent, unless it was closed here.
            Another `start` joins the node again, with a new epoch.
        heartbeat_s: see `Heartbeat`.
    """

    spec: NodeSpec

    def __init__(
        self,
        address: Address,
        *,
        on_lost: Callable[[NodeLost], None] | None = None,
        heartbeat_s: float = 1.0,
    ) -> None:
        self._address = address
        self._on_lost = on_lost
        self._heartbeat_s = heartbeat_s
        self._on_event: Callable[[NodeEvent], None]
        self._channel: Channel | None = None
        self._heartbeat: Heartbeat
        self._beating: asyncio.Task[None]

    async def start(self, on_event: Callable[[NodeEvent], None]) -> None:
        """Raises UnavailableError when the node cannot be reached."""
        await self.close(0.0)
        self._on_event = on_event
        channel = Channel(f"node {self._address}", self._receive, self._closed)
        self._heartbeat = Heartbeat(channel, self._heartbeat_s)
        await open_channel(await self._connect(), channel)
        self._beating = asyncio.create_task(self._heartbeat.run())
        try:
            self.spec = await channel.call("join", None, NodeSpec)
        except BaseException:
            await self._leave(channel)
            raise
        self._channel = channel

    def execute(self, command: NodeCommand) -> None:
        """An order to a node that is lost is dropped: `on_lost` has told."""
        self._require_channel().notify("execute", pack_tagged(command))

    async def generate(
        self, replica_id: ReplicaId, job: GenerateJob
    ) -> AsyncGenerator[TokenBatch, None]:
        order = GenerateOrder(replica_id, job)
        stream = self._require_channel().stream("generate", order, TokenBatch)
        try:
            async for batch in stream:
                yield batch
        finally:
            stream.cancel()

    async def describe(self, uri: str) -> ModelFacts:
        return await self._require_channel().call("describe", uri, ModelFacts)

    async def describe_adapter(self, uri: str, base: ModelSpec) -> AdapterFacts:
        order = DescribeAdapter(uri, base)
        return await self._require_channel().call("describe_adapter", order, AdapterFacts)

    def declare_adapter(self, spec: AdapterSpec) -> None:
        self._require_channel().notify("declare_adapter", spec)

    def retire_adapter(self, adapter_id: AdapterId) -> None:
        self._require_channel().notify("retire_adapter", adapter_id)

    def prefetch_adapter(self, adapter_id: AdapterId, *, into_pages: bool = False) -> None:
        order = PrefetchAdapter(adapter_id, into_pages)
        self._require_channel().notify("prefetch_adapter", order)

    async def stats(self) -> NodeStats:
        return await self._require_channel().call("stats", None, NodeStats)

    async def close(self, grace_s: float) -> None:  # noqa: ARG002 - the node itself lives on
        """Leaves the node; its next controller finds it empty."""
        channel, self._channel = self._channel, None
        if channel is not None:
            await self._leave(channel)

    async def _leave(self, channel: Channel) -> None:
        channel.close()
        await channel.wait_closed()
        self._beating.cancel()
        await asyncio.wait((self._beating,))

    async def _connect(self) -> socket.socket:
        address = self._address
        target: str | tuple[str, int]
        if isinstance(address, pathlib.Path):
            sock, target = socket.socket(socket.AF_UNIX), str(address)
        else:
            sock, target = socket.socket(socket.AF_INET), address
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_connect(sock, target)
        except OSError as error:
            sock.close()
            raise UnavailableError(f"node {address} cannot be reached: {error}") from None
        return sock

    def _receive(self, frame: Frame) -> None:
        self._heartbeat.heard()
        match frame:
            case Notice("heartbeat"):
                pass
            case Notice("event", body):
                self._on_event(unpack_event(body))
            case _:
                raise WireError(f"a node sent an unexpected {type(frame).__name__}")

    def _closed(self, error: FlashServeError | None) -> None:
        if self._channel is None:
            return
        _log.warning("node_lost", address=str(self._address), error=error and error.message)
        if self._on_lost is not None:
            self._on_lost(NodeLost(self.spec.node_id, self.spec.epoch))

    def _require_channel(self) -> Channel:
        if self._channel is None:
            raise UnavailableError(f"node {self._address} has not been joined")
        return self._channel
