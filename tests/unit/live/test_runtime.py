"""The runtime: hands events to the controller in order and carries out what it says."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest
from tests.unit.live.script import ScriptClock, settle

from flashserve.errors import InternalError
from flashserve.live.runtime import MonotonicClock, Runtime
from flashserve.messages.commands import Command, Dispatch, Hold, Reject, StartReplica, StopReplica
from flashserve.messages.events import (
    DrainStarted,
    Event,
    ModelDeleted,
    NodeJoined,
    NodeLost,
    RequestArrived,
    Tick,
    WorkersChanged,
)
from flashserve.types import (
    ModelId,
    ModelSpec,
    NodeId,
    NodeSpec,
    Phases,
    ReplicaId,
    RequestId,
    Tier,
)

NODE = NodeSpec(NodeId("n"), epoch=3, num_workers=2, dram_bytes=1)
MODEL = ModelSpec(ModelId("m"), "/m", 1)
REQUEST = RequestId("r")
START = StartReplica(NODE.node_id, 3, ReplicaId("m#1"), MODEL, "a request waits")
STOP = StopReplica(NODE.node_id, 3, ReplicaId("m#1"), MODEL, "idle")
HOLD = Hold(REQUEST, Tier.DISK, Phases(), "starting")
DISPATCH = Dispatch(REQUEST, NODE.node_id, ReplicaId("m#1"), Tier.DISK, Phases(), None, "ready")


class FakeController:
    """Answers each event with what was scripted for its type, and records it."""

    def __init__(self) -> None:
        self.answers: dict[type[Event], list[Command]] = {}
        self.handled: list[tuple[Event, float]] = []
        self.wakeup: float | None = None

    def handle(self, event: Event, now: float) -> list[Command]:
        self.handled.append((event, now))
        assert not isinstance(event, ModelDeleted), "a bug"
        return self.answers.get(type(event), [])

    def next_wakeup(self) -> float | None:
        return self.wakeup

    @property
    def events(self) -> list[Event]:
        return [event for event, _ in self.handled]


class FakeNode:
    def __init__(self) -> None:
        self.spec = NODE
        self.executed: list[Command] = []
        self.num_closed = 0

    async def start(self, on_event: Callable[[Event], None]) -> None:
        on_event(WorkersChanged(NODE.node_id, 1))
        await asyncio.sleep(0)
        on_event(WorkersChanged(NODE.node_id, 2))
        self.emit = on_event

    def execute(self, command: Command) -> None:
        self.executed.append(command)

    async def close(self, grace_s: float) -> None:
        self.num_closed += 1


class Driven:
    def __init__(self) -> None:
        self.controller, self.node, self.clock = FakeController(), FakeNode(), ScriptClock(5.0)
        self.runtime = Runtime(
            self.controller,  # type: ignore[arg-type]
            [self.node],  # type: ignore[list-item]
            clock=self.clock,
            unix_time=lambda: 1.5e9,
        )


def drive(scenario: Callable[[Driven], Awaitable[None]]) -> None:
    async def run() -> None:
        driven = Driven()
        await driven.runtime.start()
        try:
            await settle()
            driven.controller.handled.clear()
            await scenario(driven)
        finally:
            await driven.runtime.close()

    asyncio.run(run())


def test_a_node_joins_before_anything_else_is_heard_of_it() -> None:
    async def scenario() -> None:
        driven = Driven()
        await driven.runtime.start()
        await settle()
        assert driven.controller.events == [
            NodeJoined(NODE),
            WorkersChanged(NODE.node_id, 1),
            WorkersChanged(NODE.node_id, 2),
        ]
        assert driven.runtime.num_ready_workers == 2
        driven.node.emit(WorkersChanged(NODE.node_id, 0))
        await settle()
        assert driven.runtime.num_ready_workers == 0
        driven.node.emit(WorkersChanged(NODE.node_id, 1))
        await driven.runtime.apply(NodeLost(NODE.node_id, NODE.epoch))
        assert driven.runtime.num_ready_workers == 0
        await driven.runtime.close()
        await driven.runtime.close()
        assert driven.node.num_closed == 1

    asyncio.run(scenario())


def test_events_are_handled_in_order_at_the_time_of_the_clock() -> None:
    async def scenario(driven: Driven) -> None:
        driven.runtime.post(Tick())
        driven.runtime.post(DrainStarted())
        await settle()
        await driven.clock.advance(9.0)
        driven.runtime.post(Tick())
        await settle()
        assert driven.controller.handled == [(Tick(), 5.0), (DrainStarted(), 5.0), (Tick(), 9.0)]

    drive(scenario)


def test_orders_go_to_the_node_and_answers_to_the_request() -> None:
    async def scenario(driven: Driven) -> None:
        driven.controller.answers[RequestArrived] = [HOLD, START, DISPATCH]
        mailbox = driven.runtime.open_mailbox(REQUEST, MODEL.model_id)
        commands = await driven.runtime.apply(RequestArrived(REQUEST, MODEL.model_id))
        assert commands == [HOLD, START, DISPATCH]
        assert driven.node.executed == [START]
        assert [mailbox.get_nowait() for _ in range(2)] == [HOLD, DISPATCH]

    drive(scenario)


def test_an_answer_to_a_request_that_went_away_is_dropped() -> None:
    async def scenario(driven: Driven) -> None:
        driven.controller.answers[Tick] = [DISPATCH, STOP]
        mailbox = driven.runtime.open_mailbox(REQUEST, MODEL.model_id)
        driven.runtime.close_mailbox(REQUEST)
        await driven.runtime.apply(Tick())
        assert mailbox.empty()
        assert driven.node.executed == [STOP]

    drive(scenario)


def test_a_tick_comes_when_the_controller_wants_one() -> None:
    async def scenario(driven: Driven) -> None:
        driven.controller.wakeup = 8.0
        await driven.runtime.apply(DrainStarted())
        await driven.clock.advance(7.9)
        assert driven.controller.events == [DrainStarted()]
        driven.controller.wakeup = 12.0
        await driven.clock.advance(11.0)
        assert driven.controller.handled[1:] == [(Tick(), 8.0)]
        driven.controller.wakeup = None
        await driven.clock.advance(20.0)
        await driven.clock.advance(99.0)
        assert driven.controller.handled[2:] == [(Tick(), 12.0)]

    drive(scenario)


def test_an_earlier_wakeup_takes_the_place_of_a_later_one() -> None:
    async def scenario(driven: Driven) -> None:
        driven.controller.wakeup = 100.0
        await driven.runtime.apply(DrainStarted())
        driven.controller.wakeup = 6.0
        await driven.runtime.apply(DrainStarted())
        driven.controller.wakeup = None
        await driven.clock.advance(200.0)
        assert driven.controller.handled[2:] == [(Tick(), 6.0)]

    drive(scenario)


def test_a_fault_in_the_controller_is_told_to_who_waits_and_the_rest_goes_on() -> None:
    async def scenario(driven: Driven) -> None:
        with pytest.raises(InternalError, match="ModelDeleted was not handled"):
            await driven.runtime.apply(ModelDeleted(MODEL.model_id))
        assert not driven.runtime.is_healthy
        assert await driven.runtime.apply(Tick()) == []
        assert not driven.runtime.is_healthy

    drive(scenario)


def test_a_request_whose_arrival_is_not_handled_gets_an_answer() -> None:
    async def scenario(driven: Driven) -> None:
        unknown = StartReplica(NodeId("other"), 1, ReplicaId("m#2"), MODEL, "no such node")
        driven.controller.answers[RequestArrived] = [unknown]
        mailbox = driven.runtime.open_mailbox(REQUEST, MODEL.model_id)
        driven.runtime.post(RequestArrived(REQUEST, MODEL.model_id))
        answer = await mailbox.get()
        assert isinstance(answer, Reject)
        assert answer.code == "internal_error"
        assert not driven.runtime.is_healthy

    drive(scenario)


def test_orders_and_refusals_are_kept_with_their_reasons_newest_first() -> None:
    async def scenario(driven: Driven) -> None:
        refusal = Reject(REQUEST, "queue_full", "the queue is full")
        driven.controller.answers[Tick] = [START, DISPATCH, refusal, STOP]
        driven.runtime.open_mailbox(REQUEST, MODEL.model_id)
        await driven.runtime.apply(Tick())
        decisions = driven.runtime.decisions(2)
        assert [(one.action, one.reason) for one in decisions] == [
            ("StopReplica", "idle"),
            ("Reject", "the queue is full"),
        ]
        assert decisions[1].model_id == MODEL.model_id
        assert (decisions[0].node_id, decisions[0].at) == (NODE.node_id, 1.5e9)
        assert len(driven.runtime.decisions(10)) == 3
        assert driven.runtime.decisions(0) == []

    drive(scenario)


def test_a_watcher_sees_events_once_they_are_handled() -> None:
    async def scenario(driven: Driven) -> None:
        with driven.runtime.watch() as events:
            driven.runtime.post(Tick())
            assert await events.get() == (Tick(), [])
            assert driven.controller.events == [Tick()]
        await driven.runtime.apply(Tick())
        assert events.empty()

    drive(scenario)


def test_what_was_not_handled_before_the_end_is_called_off() -> None:
    async def scenario() -> None:
        driven = Driven()
        await driven.runtime.start()
        waiting = asyncio.create_task(driven.runtime.apply(Tick()))
        driven.runtime._task.cancel()  # type: ignore[union-attr]
        await asyncio.sleep(0)
        await driven.runtime.close()
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(scenario())


def test_the_real_clock_calls_back_and_can_be_called_off() -> None:
    async def scenario() -> None:
        clock = MonotonicClock()
        called: asyncio.Queue[str] = asyncio.Queue()
        clock.call_at(clock.now(), lambda: called.put_nowait("off")).cancel()
        clock.call_at(clock.now() - 1.0, lambda: called.put_nowait("past"))
        assert await called.get() == "past"
        assert called.empty()

    asyncio.run(scenario())
