"""Starts nodes for tests, in this process or behind a socket, and records what they report."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import gc
import json
import os
import pathlib
import socket
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

import numpy as np
import pytest
import safetensors.numpy
import uvloop

from flashserve.config import EngineSettings, NodeSettings, Settings
from flashserve.messages.commands import Evict, Stage, StartReplica, StopReplica
from flashserve.messages.events import NodeEvent, ReplicaReady, WorkersChanged
from flashserve.messages.work import GenerateJob, TokenBatch
from flashserve.node.agent import Agent
from flashserve.node.client import Node, RemoteNode
from flashserve.node.server import NodeServer
from flashserve.node.sockets import bind_unix_socket
from flashserve.store.store import Store
from flashserve.types import (
    ModelId,
    ModelSpec,
    NodeId,
    ReplicaId,
    SamplingParams,
    Tier,
    TokenOutput,
)

FAKE_WORKER = (sys.executable, "-P", str(pathlib.Path(__file__).with_name("fake_worker.py")))
TIMEOUT_S = 60.0
MIB = 1 << 20
E = TypeVar("E")


def run(check: Coroutine[Any, Any, None]) -> None:
    """Runs a test's coroutine, which must leave no task, child process or descriptor."""

    async def watched() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await check
        assert asyncio.all_tasks() == {asyncio.current_task()}

    uvloop.new_event_loop().close()  # the first one opens a pipe that the process keeps
    gc.collect()  # what earlier tests left in cycles is not to be closed during this one
    before = _descriptors()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as the server does
        runner.run(watched())
    after = _descriptors()
    assert after == before, f"opened: {after - before}, closed: {before - after}"
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def _descriptors() -> collections.Counter[str]:
    """What this process has open; /proc/self/fd itself shows up as another number each time."""
    links = pathlib.Path("/proc/self/fd")
    found = []
    for entry in os.listdir(links):  # noqa: PTH208
        with contextlib.suppress(FileNotFoundError):
            target = os.readlink(links / entry)  # noqa: PTH115
            found.append(target.split(":")[0])
    return collections.Counter(found)


class Recorder:
    """Every event of a node, in order; each is waited for at most once."""

    def __init__(self) -> None:
        self.events: list[NodeEvent] = []
        self._seen = 0
        self._changed = asyncio.Event()

    def __call__(self, event: NodeEvent) -> None:
        self.events.append(event)
        self._changed.set()

    async def next(self, kind: type[E], **fields: object) -> E:
        """The next event of this kind and these fields; the ones before it are passed over."""
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                while self._seen < len(self.events):
                    event = self.events[self._seen]
                    self._seen += 1
                    if isinstance(event, kind) and all(
                        getattr(event, name) == value for name, value in fields.items()
                    ):
                        return event
                self._changed.clear()
                await self._changed.wait()

    def of(self, kind: type[E]) -> list[E]:
        return [event for event in self.events if isinstance(event, kind)]


class Bench:
    """A node under test with its recorder, and short forms of the orders."""

    def __init__(self, node: Node, agent: Agent, events: Recorder) -> None:
        self.node = node
        self.agent = agent
        self.events = events

    @property
    def names(self) -> tuple[NodeId, int]:
        return self.node.spec.node_id, self.node.spec.epoch

    def start(self, replica: str, model: ModelSpec, *, epochs_ago: int = 0) -> None:
        node_id, epoch = self.names
        order = StartReplica(node_id, epoch - epochs_ago, ReplicaId(replica), model, "test")
        self.node.execute(order)

    def stop(self, replica: str, model: ModelSpec) -> None:
        self.node.execute(StopReplica(*self.names, ReplicaId(replica), model, "test"))

    def stage(self, model: ModelSpec, tier: Tier = Tier.DRAM) -> None:
        self.node.execute(Stage(*self.names, model, tier, "test"))

    def evict(self, model: ModelSpec, tier: Tier = Tier.DRAM) -> None:
        self.node.execute(Evict(*self.names, model, tier, "test"))

    async def started(self, replica: str, model: ModelSpec) -> ReplicaReady:
        self.start(replica, model)
        return await self.events.next(ReplicaReady, replica_id=replica)

    async def ready(self, num_workers: int) -> None:
        if self.agent._pool.num_ready != num_workers:
            await self.events.next(WorkersChanged, num_ready=num_workers)

    async def tokens(self, replica: str, job: GenerateJob) -> list[int]:
        async with asyncio.timeout(TIMEOUT_S):
            batches = [batch async for batch in self.node.generate(ReplicaId(replica), job)]
        return [token.token_id for batch in batches for token in batch.tokens]

    async def until(self, fact: Callable[[], bool]) -> None:
        """For what no event tells."""
        while not fact():  # noqa: ASYNC110
            await asyncio.sleep(0)

    def worker_pids(self) -> set[int]:
        return {worker.process.pid for worker in self.agent._pool._all}

    def num_leases(self) -> int:
        return sum(one.num_leases for one in self.agent._store.residents().values())


async def read(batches: AsyncIterator[TokenBatch], tokens: list[TokenOutput]) -> None:
    """Adds to `tokens` what a stream gives until its end."""
    async for batch in batches:
        tokens += batch.tokens


def job(sequence_id: str, max_tokens: int = 5, *, prompt: Sequence[int] = (1, 2, 3)) -> GenerateJob:
    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
    return GenerateJob(sequence_id, tuple(prompt), params)


def make_settings(
    data_dir: pathlib.Path,
    num_workers: int = 1,
    arena_bytes: int = 8 * MIB,
    adapter_bytes: int = 0,
    **engine: Any,
) -> Settings:
    return Settings(
        data_dir=data_dir,
        node=NodeSettings(
            num_workers=num_workers,
            dram_bytes=arena_bytes,
            adapter_bytes=adapter_bytes,
            prefault=False,
            threads_per_worker=1,
        ),
        engine=EngineSettings(**engine),
    )


def fake_model(
    directory: pathlib.Path, name: str, num_bytes: int = 100, **script: Any
) -> ModelSpec:
    """A checkpoint of so many bytes, for the fake worker; script: see fake_worker.py."""
    path = directory / name
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"name": name, "fake": script}))
    weights = {"weight": np.zeros(num_bytes, np.uint8)}
    safetensors.numpy.save_file(weights, path / "model.safetensors")
    return ModelSpec(ModelId(name), str(path), num_bytes)


@contextlib.asynccontextmanager
async def running_agent(
    settings: Settings,
    worker_command: Sequence[str] = FAKE_WORKER,
    store: Store | None = None,
) -> AsyncIterator[Bench]:
    agent = Agent(settings, store=store, worker_command=worker_command)
    events = Recorder()
    await agent.start(events)
    try:
        yield Bench(agent, agent, events)
    finally:
        await agent.close(grace_s=5.0)


@contextlib.asynccontextmanager
async def running_node(
    kind: str, settings: Settings, worker_command: Sequence[str] = FAKE_WORKER
) -> AsyncIterator[Bench]:
    """kind: in-process, unix or tcp."""
    async with contextlib.AsyncExitStack() as stack:
        bench = await stack.enter_async_context(running_agent(settings, worker_command))
        if kind == "in-process":
            yield bench
            return
        server = NodeServer(bench.agent)
        address: pathlib.Path | tuple[str, int]
        if kind == "unix":
            address = settings.data_dir / "run" / "node.sock"
            listener = bind_unix_socket(address)
            stack.callback(listener.close)
            listening = listener.socket
        else:
            listening = socket.create_server(("127.0.0.1", 0))
            address = listening.getsockname()
        await server.listen(listening)
        stack.push_async_callback(server.close)
        remote, events = RemoteNode(address), Recorder()
        await remote.start(events)
        stack.push_async_callback(remote.close, 0.0)
        yield Bench(remote, bench.agent, events)
