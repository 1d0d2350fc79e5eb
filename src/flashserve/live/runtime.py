"""Drives the controller with real events: one task, one queue, one timer.

Every fact becomes an event of the queue; one task hands them to `Controller.handle` in order and
carries out the commands: orders go to their node, answers to the mailbox of the waiting request.
Nothing here decides anything.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol, assert_never

import structlog

from flashserve.control.controller import Controller
from flashserve.errors import InternalError
from flashserve.live.requests import Decision
from flashserve.messages.commands import (
    Command,
    Dispatch,
    Evict,
    Hold,
    Reject,
    RequestCommand,
    Stage,
    StartReplica,
    StopReplica,
)
from flashserve.messages.events import (
    Event,
    NodeJoined,
    NodeLost,
    RequestArrived,
    Tick,
    WorkersChanged,
)
from flashserve.node.client import Node
from flashserve.types import ModelId, NodeId, RequestId

Mailbox = asyncio.Queue[RequestCommand]
Watch = asyncio.Queue[tuple[Event, list[Command]]]
Observer = Callable[[Event, Sequence[Command], float], None]

_MAX_DECISIONS = 1000
_MIN_TIMER_S = 0.001  # timers round to milliseconds: one that fires early must not spin
_log = structlog.get_logger(__name__)


class Timer(Protocol):
    """A call that was asked for and may be called off."""

    def cancel(self) -> None: ...


class Clock(Protocol):
    """The time that the controller sees. Tests drive one by hand."""

    def now(self) -> float: ...

    def call_at(self, when: float, call: Callable[[], None]) -> Timer: ...


class MonotonicClock:
    """Real time; the clock that workers stamp their tokens with."""

    def now(self) -> float:
        return time.monotonic()

    def call_at(self, when: float, call: Callable[[], None]) -> Timer:
        delay_s = max(when - self.now(), _MIN_TIMER_S)
        return asyncio.get_running_loop().call_later(delay_s, call)


class Runtime:
    """Owns the controller and the nodes from `start` to `close`.

    is_healthy turns False for good when handling an event raised: the server goes on with what it
    has (streams may end, the other models serve), but reports that it should be replaced.
    """

    def __init__(
        self,
        controller: Controller,
        nodes: Sequence[Node],
        *,
        clock: Clock | None = None,
        unix_time: Callable[[], float] = time.time,
        observe: Observer | None = None,
    ) -> None:
        """Args: observe: is told every event with its commands and its time; does not raise."""
        self.controller = controller
        self.clock = clock or MonotonicClock()
        self.is_healthy = True
        self._unix_time = unix_time
        self._observe = observe
        self._nodes = list(nodes)
        self._node_by_id: dict[NodeId, Node] = {}
        self._num_workers: dict[NodeId, int] = {}
        self._events: asyncio.Queue[tuple[Event, asyncio.Future[list[Command]] | None]]
        self._events = asyncio.Queue()
        self._mailboxes: dict[RequestId, tuple[ModelId, Mailbox]] = {}
        self._watchers: list[Watch] = []
        self._decisions: collections.deque[Decision] = collections.deque(maxlen=_MAX_DECISIONS)
        self._task: asyncio.Task[None] | None = None
        self._timer: Timer | None = None
        self._wakeup: float | None = None

    async def start(self) -> None:
        """Start handling events, then every node; each joins once it has said what it offers."""
        self._task = asyncio.create_task(self._run(), name="runtime")
        for node in self._nodes:
            await self._join(node)

    async def close(self, grace_s: float = 0.0) -> None:
        """Stop the nodes, then the handling of events. Idempotent."""
        for node in self._nodes:
            await node.close(grace_s)
        self._nodes.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        while not self._events.empty():
            _, done = self._events.get_nowait()
            if done is not None:
                done.cancel()

    @property
    def num_ready_workers(self) -> int:
        return sum(self._num_workers.values())

    @property
    def nodes(self) -> Sequence[Node]:
        return tuple(self._nodes)

    def node(self, node_id: NodeId) -> Node:
        return self._node_by_id[node_id]

    def post(self, event: Event) -> None:
        """Tell the controller a fact; returns before it is handled."""
        self._events.put_nowait((event, None))

    async def apply(self, event: Event) -> list[Command]:
        """Tell the controller a fact and wait until it has been handled; what it caused.

        Raises:
            InternalError: the controller could not handle it.
        """
        done: asyncio.Future[list[Command]] = asyncio.get_running_loop().create_future()
        self._events.put_nowait((event, done))
        return await done

    def open_mailbox(self, request_id: RequestId, model_id: ModelId) -> Mailbox:
        """Where the controller's answers to a request arrive, until the mailbox is closed."""
        mailbox: Mailbox = asyncio.Queue()
        self._mailboxes[request_id] = model_id, mailbox
        return mailbox

    def close_mailbox(self, request_id: RequestId) -> None:
        self._mailboxes.pop(request_id, None)

    @contextlib.contextmanager
    def watch(self) -> Iterator[Watch]:
        """Every event from now on with its commands, once they have been carried out."""
        watcher: Watch = asyncio.Queue()
        self._watchers.append(watcher)
        try:
            yield watcher
        finally:
            self._watchers.remove(watcher)

    def decisions(self, limit: int) -> list[Decision]:
        """The latest orders and refusals, newest first."""
        return list(self._decisions)[: -limit - 1 : -1] if limit > 0 else []

    async def _join(self, node: Node) -> None:
        """Events of a node that is still starting come after its NodeJoined."""
        early: list[Event] = []
        receive = early.append

        def on_event(event: Event) -> None:
            receive(event)

        await node.start(on_event)
        self._node_by_id[node.spec.node_id] = node
        self.post(NodeJoined(node.spec))
        receive = self.post
        for event in early:
            self.post(event)

    async def _run(self) -> None:
        while True:
            event, done = await self._events.get()
            commands = self._handle(event)
            if done is not None and not done.cancelled():
                if commands is None:
                    done.set_exception(InternalError(f"{type(event).__name__} was not handled"))
                else:
                    done.set_result(commands)

    def _handle(self, event: Event) -> list[Command] | None:
        """One event and its commands; None when it could not be handled."""
        now = self.clock.now()
        try:
            commands = self.controller.handle(event, now)
            for command in commands:
                self._execute(command)
            self._set_timer()
        except Exception:
            self._fail(event)
            return None
        if self._observe is not None:
            self._observe(event, commands, now)
        if isinstance(event, WorkersChanged):
            self._num_workers[event.node_id] = event.num_ready
        elif isinstance(event, NodeLost):
            self._num_workers.pop(event.node_id, None)
        if commands or not isinstance(event, Tick):
            _log.debug("event", event_name=type(event).__name__, fact=event, commands=commands)
        for watcher in self._watchers:
            watcher.put_nowait((event, commands))
        return commands

    def _fail(self, event: Event) -> None:
        """A fault of ours: say so loudly, and let nobody wait for an answer that cannot come."""
        self.is_healthy = False
        _log.exception("event not handled; the server is unhealthy", fact=event)
        if isinstance(event, RequestArrived):
            message = "the controller failed on this request"
            self._deliver(Reject(event.request_id, InternalError.code, message))

    def _execute(self, command: Command) -> None:
        match command:
            case StartReplica() | StopReplica() | Stage() | Evict():
                self._decide(command)
                self._node_by_id[command.node_id].execute(command)
            case Reject():
                self._decide(command)
                self._deliver(command)
            case Hold() | Dispatch():
                self._deliver(command)
            case _:
                assert_never(command)

    def _deliver(self, command: RequestCommand) -> None:
        """To the request's mailbox; a request that has gone away has none."""
        if entry := self._mailboxes.get(command.request_id):
            _, mailbox = entry
            mailbox.put_nowait(command)

    def _decide(self, command: StartReplica | StopReplica | Stage | Evict | Reject) -> None:
        """Log an order or a refusal, and keep it with its reason for whoever asks."""
        action = type(command).__name__
        if isinstance(command, Reject):
            model_id, _ = self._mailboxes.get(command.request_id, (None, None))
            node_id, reason = None, command.message
        else:
            model_id, node_id, reason = command.model.model_id, command.node_id, command.reason
        self._decisions.append(Decision(self._unix_time(), action, model_id, node_id, reason))
        _log.info(action, model_id=model_id, node_id=node_id, reason=reason)

    def _set_timer(self) -> None:
        """A Tick at the time that the controller next has something to do."""
        wakeup = self.controller.next_wakeup()
        if wakeup == self._wakeup and self._timer is not None:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._wakeup = wakeup
        self._timer = None if wakeup is None else self.clock.call_at(wakeup, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.post(Tick())
