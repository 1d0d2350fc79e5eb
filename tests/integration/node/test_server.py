"""What only a node behind a socket can do: fall silent, be taken over, be spoken to badly."""

from __future__ import annotations

import asyncio
import contextlib
import pathlib
import socket
import struct
from collections.abc import AsyncIterator

import pytest
from tests.integration.node.nodes import (
    Bench,
    Recorder,
    fake_model,
    job,
    make_settings,
    run,
    running_agent,
)

from flashserve.errors import ForbiddenError, InputError, ReplicaError, UnavailableError
from flashserve.messages.events import NodeLost
from flashserve.node.channel import Channel, open_channel
from flashserve.node.client import RemoteNode
from flashserve.node.server import NodeServer
from flashserve.types import ReplicaId


@contextlib.asynccontextmanager
async def serving(tmp_path: pathlib.Path) -> AsyncIterator[tuple[Bench, tuple[str, int]]]:
    async with running_agent(make_settings(tmp_path)) as bench:
        server = NodeServer(bench.agent)
        listener = socket.create_server(("127.0.0.1", 0))
        await server.listen(listener)
        try:
            yield bench, listener.getsockname()
        finally:
            await server.close()


def test_the_loss_of_a_node_is_told_and_breaks_its_streams(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        lost: asyncio.Queue[NodeLost] = asyncio.Queue()
        async with serving(tmp_path) as (bench, address):
            node, events = RemoteNode(address, on_lost=lost.put_nowait), Recorder()
            await node.start(events)
            epoch = node.spec.epoch
            remote = Bench(node, bench.agent, events)
            await remote.started("m#1", fake_model(tmp_path, "m", step_s=0.001))
            batches = node.generate(ReplicaId("m#1"), job("s", 100_000))
            await anext(batches)
            other = RemoteNode(address)
            await other.start(Recorder())
            with pytest.raises(ReplicaError):
                async for _ in batches:
                    pass
            assert await lost.get() == NodeLost(node.spec.node_id, epoch)
            assert other.spec.epoch == epoch + 1
            await node.start(events)
            assert node.spec.epoch == epoch + 2
            await node.close(0.0)
            await other.close(0.0)
            assert lost.empty()

    run(check())


def test_a_peer_that_falls_silent_is_lost(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        lost: asyncio.Queue[NodeLost] = asyncio.Queue()
        async with serving(tmp_path) as (bench, address):
            node = RemoteNode(address, on_lost=lost.put_nowait, heartbeat_s=0.01)
            await node.start(Recorder())  # the server's own heartbeats come a second apart
            assert (await lost.get()).node_id == bench.agent.spec.node_id
            with pytest.raises(ReplicaError, match="missed 3 heartbeats"):
                await node.stats()
            await node.close(0.0)

    run(check())


def test_a_controller_that_falls_silent_is_let_go(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with running_agent(make_settings(tmp_path)) as bench:
            server = NodeServer(bench.agent, heartbeat_s=0.01)
            listener = socket.create_server(("127.0.0.1", 0))
            await server.listen(listener)
            silent, _ = await _open(listener.getsockname())
            await silent.call("join", None, object)
            await silent.wait_closed()
            await server.close()

    run(check())


def test_orders_of_a_controller_that_has_not_joined_are_ignored(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with serving(tmp_path) as (bench, address):
            stranger, _ = await _open(address)
            node = RemoteNode(address)
            await node.start(Recorder())
            node._channel, joined = stranger, node._channel
            remote = Bench(node, bench.agent, Recorder())
            remote.start("m#1", fake_model(tmp_path, "m"))
            await stranger.call("stats", None, object)  # answered after the order was read
            assert bench.agent._replicas == {}
            node._channel = joined
            await node.close(0.0)
            stranger.close()
            await stranger.wait_closed()

    run(check())


def test_unknown_methods_are_faults_and_garbage_ends_the_connection(
    tmp_path: pathlib.Path,
) -> None:
    async def check() -> None:
        async with serving(tmp_path) as (_, address):
            channel, transport = await _open(address)
            with pytest.raises(InputError, match="dance"):
                await channel.call("dance", None, object)
            transport.write(struct.pack(">I", 1) + b"\xc1")
            await channel.wait_closed()

    run(check())


def test_a_node_that_is_not_there_cannot_be_joined(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        with pytest.raises(UnavailableError, match="cannot be reached"):
            await RemoteNode(tmp_path / "nothing.sock").start(Recorder())

    run(check())


def test_a_node_server_does_not_listen_to_other_machines(tmp_path: pathlib.Path) -> None:
    async def check() -> None:
        async with running_agent(make_settings(tmp_path)) as bench:
            with socket.create_server(("0.0.0.0", 0)) as listener, pytest.raises(ForbiddenError):
                await NodeServer(bench.agent).listen(listener)

    run(check())


async def _open(address: tuple[str, int]) -> tuple[Channel, asyncio.Transport]:
    """A connection that sends only what the test sends."""
    channel = Channel("the node", lambda _: None)
    sock = socket.create_connection(address)
    await open_channel(sock, channel)
    assert channel._transport is not None
    return channel, channel._transport
