"""A worker's loop and host over a device that is memory of this process, asked over a socket."""

from __future__ import annotations

import contextlib
import pathlib
import socket
import threading
from collections.abc import Iterator

import pytest
import torch
from tests.integration.node.nodes import MIB, job
from tests.integration.node.test_device_hosting import Node
from tests.integration.node.tiny import Tiny, make_tiny
from tests.unit.store.device.fake_device import FakeRegion

from flashserve.messages import wire
from flashserve.messages.wire import Call, End, Fault, Frame, FrameDecoder, Item, Notice, Reply
from flashserve.messages.work import (
    LoadModel,
    LoadReport,
    ModelLost,
    Opened,
    TokenBatch,
    UnloadReport,
    WorkerReady,
)
from flashserve.node.link import Link
from flashserve.node.serving import Serving
from flashserve.store.device.loadplan import Copy
from flashserve.store.store import Store

torch.set_num_threads(1)

NUM_TOKENS = 8


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return make_tiny(tmp_path_factory.mktemp("models"), "tiny")


@pytest.fixture
def store(tmp_path: pathlib.Path) -> Iterator[Store]:
    store = Store(tmp_path, 8 * MIB, prefault=False)
    yield store
    store.close()


class Agent:
    """The other end of a worker's socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._decoder = FrameDecoder()
        self._frames: list[Frame] = []
        self._num_calls = 0

    def send(self, frame: Frame) -> None:
        self._sock.sendall(wire.encode(frame))

    def call(self, method: str, body: object = None) -> int:
        self._num_calls += 1
        self.send(Call(self._num_calls, method, wire.pack(body)))
        return self._num_calls

    def next(self) -> Frame:
        while not self._frames:
            data = self._sock.recv(1 << 16)
            assert data, "the worker has ended"
            self._frames += self._decoder.feed(data)
        return self._frames.pop(0)

    def load(self, order: LoadModel) -> LoadReport:
        self.call("load", order)
        reply = self.next()
        assert isinstance(reply, Reply)
        return wire.unpack(reply.body, LoadReport)

    def unload(self) -> UnloadReport:
        self.call("unload")
        reply = self.next()
        assert isinstance(reply, Reply)
        return wire.unpack(reply.body, UnloadReport)

    def tokens(self) -> list[int]:
        call_id = self.call("generate", job("s", NUM_TOKENS))
        tokens: list[int] = []
        while isinstance(frame := self.next(), Item):
            tokens += [token.token_id for token in wire.unpack(frame.body, TokenBatch).tokens]
        assert frame == End(call_id)
        return tokens

    def loses(self, call_id: int) -> ModelLost:
        """What the worker says of the model before it ends the stream; tokens are passed over."""
        while isinstance(notice := self.next(), Item):
            pass
        assert isinstance(notice, Notice)
        lost = wire.unpack(notice.body, ModelLost)
        fault = self.next()
        assert isinstance(fault, Fault)
        assert (fault.id, fault.code, fault.message) == (call_id, lost.code, lost.message)
        return lost


@contextlib.contextmanager
def serving(node: Node) -> Iterator[Agent]:
    ours, theirs = socket.socketpair()
    ours.settimeout(60)
    loop = Serving(Link(theirs), node.host, WorkerReady(1, "none", 1))

    def run() -> None:
        with contextlib.suppress(ConnectionError):
            loop.run()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        agent = Agent(ours)
        assert isinstance(agent.next(), Notice)
        yield agent
    finally:
        ours.close()
        thread.join()
        theirs.close()


def test_a_model_sleeps_wakes_and_is_checked_behind_its_first_token(store, tiny, tmp_path):
    node = Node(store, tmp_path / "references")
    expected = tiny.greedy([1, 2, 3], NUM_TOKENS)
    with serving(node) as agent:
        for turn in range(3):
            assert agent.load(node.order(tiny)).was_asleep == bool(turn)
            assert agent.tokens() == expected
            assert len(list((tmp_path / "references").iterdir())) == 1
            assert agent.unload().asleep == ("tiny",)
            assert node.device.mapped_bytes == 0


def test_bytes_come_while_a_step_waits_for_them(store, tiny):
    node = Node(store)
    with serving(node) as agent:
        order = node.order(tiny, num_groups=4, num_open=0)
        agent.load(order)
        agent.call("generate", job("s", NUM_TOKENS))
        for num_open in range(1, 5):
            agent.send(Notice("opened", wire.pack(Opened(order.model_id, num_open))))
        tokens: list[int] = []
        while isinstance(frame := agent.next(), Item):
            tokens += [token.token_id for token in wire.unpack(frame.body, TokenBatch).tokens]
        assert isinstance(frame, End)
        assert tokens == tiny.greedy([1, 2, 3], NUM_TOKENS)


def test_a_wake_that_computes_something_else_is_told_and_the_next_start_loads_anew(
    store, tiny, tmp_path
):
    node = Node(store, tmp_path / "references")
    expected = tiny.greedy([1, 2, 3], NUM_TOKENS)
    with serving(node) as agent:
        agent.load(node.order(tiny))
        assert agent.tokens() == expected
        agent.unload()
        agent.load(node.order(tiny, num_groups=4, num_open=0))
        move = node.device._move

        def damage(address: int, target: FakeRegion, copy: Copy) -> None:
            move(address, target, copy)
            target.bytes[copy.target : copy.target + copy.num_bytes][3::64] ^= 1

        node.device._move = damage
        call_id = agent.call("generate", job("s", 100))
        agent.send(Notice("opened", wire.pack(Opened(tiny.spec.model_id, 4))))
        lost = agent.loses(call_id)
        assert (lost.model_id, lost.code) == ("tiny", "self_check_failed")
        assert (node.device.regions, node.device.mapped_bytes) == ([], 0)
        assert agent.unload().asleep == ()
        node.device._move = move
        assert not agent.load(node.order(tiny)).was_asleep
        assert agent.tokens() == expected


def test_a_copy_that_is_refused_while_a_request_waits_gives_the_model_up(store, tiny):
    node = Node(store, copy=4)
    with serving(node) as agent:
        agent.load(node.order(tiny, num_groups=4, num_open=1))
        call_id = agent.call("generate", job("s", NUM_TOKENS))
        agent.send(Notice("opened", wire.pack(Opened(tiny.spec.model_id, 4))))
        lost = agent.loses(call_id)
        assert (lost.model_id, "no copy today" in lost.message) == ("tiny", True)
        assert (node.device.regions, agent.unload().asleep) == ([], ())
        agent.load(node.order(tiny))
        assert agent.tokens() == tiny.greedy([1, 2, 3], NUM_TOKENS)
