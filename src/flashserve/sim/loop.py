"""Drives the controller by a virtual clock, with modelled nodes that answer."""

from __future__ import annotations

import collections
import heapq
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, TypeVar

from flashserve.control.controller import Controller
from flashserve.errors import InputError
from flashserve.messages.commands import Command, Dispatch, Hold, Reject
from flashserve.messages.events import (
    Event,
    NodeJoined,
    NodeLost,
    ReplicaFailed,
    ReplicaLost,
    RequestArrived,
    RequestFinished,
    Tick,
)
from flashserve.sim.ledger import Ledger
from flashserve.sim.nodes import ModelledNode
from flashserve.sim.records import Records
from flashserve.sim.steps import Job
from flashserve.types import ModelId, NodeId, NodeSpec, RequestId

Arrivals = Iterable[tuple[float, RequestArrived, Job]]
Script = Iterable[tuple[float, Event]]
Observer = Callable[[float, Event, Sequence[Command]], None]
"""Told of each event that the controller has handled, and the commands that it gave."""

_DEFAULT_PROMPT = 100
_DEFAULT_OUTPUT = 64


class CommandLog:
    """An observer that keeps every command, with the time at which it was given."""

    def __init__(self) -> None:
        self.commands: list[tuple[float, Command]] = []

    def __call__(self, at: float, _event: Event, commands: Sequence[Command]) -> None:
        self.commands += [(at, command) for command in commands]


class Simulation:
    """One run of a controller over modelled nodes.

    What happens at one time is handled in the order in which it became known, a script before all
    else, and all of it before a Tick.

    Args:
        observer: told of every event; nothing else keeps the commands.
        records: gets a row for each request that comes with a job of an index.
        ledger: the nodes' own; sampled each `sample_s` of a run that has an end.
        output_tokens: of the answers to requests in a script, which have no job.
        models: numbers the models in `records`.
    """

    def __init__(
        self,
        controller: Controller,
        nodes: Iterable[ModelledNode],
        *,
        observer: Observer | None = None,
        records: Records | None = None,
        ledger: Ledger | None = None,
        sample_s: float = 60.0,
        output_tokens: int = _DEFAULT_OUTPUT,
        models: Sequence[ModelId] = (),
    ) -> None:
        self.controller = controller
        self.now = 0.0
        self.num_events = 0
        self.num_commands: collections.defaultdict[type[Command], int] = collections.defaultdict(
            int
        )
        self._nodes: dict[NodeId, ModelledNode] = {node.spec.node_id: node for node in nodes}
        self._observer = observer
        self._records = records
        self._ledger = ledger
        self._sample_s = sample_s
        self._output_tokens = output_tokens
        self._numbers = {model_id: number for number, model_id in enumerate(models)}
        self._heap: list[tuple[float, int, Callable[[float], None]]] = []
        self._num_planned = 0
        self._said: collections.deque[Event] = collections.deque()
        self._jobs: dict[RequestId, Job] = {}

    def run(self, script: Script = (), *, arrivals: Arrivals = (), until: float = math.inf) -> None:
        """Play (time, event) pairs and arrivals, each in order of time, until nothing more happens.

        Both may be generators: the next of each is asked for only when the last has happened.
        Every node joins at 0 with all its workers started. Faults in the script (ReplicaFailed,
        ReplicaLost, NodeLost, and NodeJoined with a new epoch) befall the modelled node as well.
        """
        for node in self._nodes.values():
            node.attach(self.call_at, self._said.append)
            node.join()
        if self._ledger is not None and until < math.inf:
            self._sample(0.0)
        self._handle_said()
        self._play(_Feed(iter(script)), _Feed(iter(arrivals)), until)
        self._settle(until)

    def call_at(self, at: float, call: Callable[[float], None]) -> None:
        assert at >= self.now, "nothing happens in the past"
        self._num_planned += 1
        heapq.heappush(self._heap, (at, self._num_planned, call))

    def _play(
        self,
        script: _Feed[tuple[float, Event]],
        arrivals: _Feed[tuple[float, RequestArrived, Job]],
        until: float,
    ) -> None:
        heap, next_wakeup = self._heap, self.controller.next_wakeup
        while True:
            at = min(arrivals.at, script.at)
            if heap and heap[0][0] < at:
                at = heap[0][0]
            wakeup = next_wakeup(at)
            if wakeup is not None and wakeup < at:
                at = max(wakeup, self.now)
                if at > until:
                    return
                self.now = at
                self._handle(Tick())
            elif at > until or at == math.inf:
                return
            else:
                self.now = at
                if at == script.at:
                    (_, event) = script.take()
                    self._befall(event)
                    self._handle(event)
                elif at == arrivals.at:
                    (_, arrived, job) = arrivals.take()
                    self._arrive(arrived, job)
                else:
                    heapq.heappop(heap)[2](at)
            if self._said:
                self._handle_said()

    def _handle_said(self) -> None:
        said = self._said
        while said:
            self._handle(said.popleft())

    def _handle(self, event: Event) -> None:
        if type(event) is RequestFinished:
            self._finished(event)
        elif type(event) is RequestArrived and event.request_id not in self._jobs:
            prompt = event.num_prompt_tokens or _DEFAULT_PROMPT
            job = Job(event.request_id, prompt, self._output_tokens, event.adapter, event.prefix)
            self._jobs[event.request_id] = job
        commands = self.controller.handle(event, self.now)
        self.num_events += 1
        if self._observer is not None:
            self._observer(self.now, event, commands)
        for command in commands:
            self._carry_out(command)

    def _arrive(self, event: RequestArrived, job: Job) -> None:
        self._jobs[event.request_id] = job
        if self._records is not None:
            self._records.arrived(job, self._numbers[event.model_id], self.now)
        self._handle(event)

    def _carry_out(self, command: Command) -> None:
        self.num_commands[type(command)] += 1
        if isinstance(command, Dispatch):
            job = self._jobs[command.request_id]
            if self._records is not None and job.index >= 0:
                self._records.dispatched(job, command, self.now)
            self._nodes[command.node_id].generate(command, job, self.now)
        elif isinstance(command, Reject):
            job = self._jobs.pop(command.request_id)
            if self._records is not None and job.index >= 0:
                self._records.rejected(job)
        elif not isinstance(command, Hold):
            self._nodes[command.node_id].execute(command, self.now)

    def _finished(self, event: RequestFinished) -> None:
        job = self._jobs.pop(event.request_id, None)
        if job is not None and self._records is not None and job.index >= 0:
            self._records.finished(job, self.now)

    def _befall(self, event: Event) -> None:
        """A fault in the script is the node's before it is the controller's."""
        match event:
            case NodeJoined(node=NodeSpec(node_id=node_id)):
                pass
            case NodeLost(node_id=node_id) | ReplicaLost(node_id=node_id):
                pass
            case ReplicaFailed(node_id=node_id):
                pass
            case _:
                return
        self._nodes[node_id].suffer(event, self.now)

    def _sample(self, now: float) -> None:
        assert self._ledger is not None
        self._ledger.sample(now)
        self.call_at(now + self._sample_s, self._sample)

    def _settle(self, until: float) -> None:
        """The end: what goes on is counted until now, first tokens included."""
        if until < math.inf:
            self.now = max(self.now, until)
        for node in self._nodes.values():
            node.settle(self.now)
        if self._records is not None:
            for job in self._jobs.values():
                if job.index >= 0 and job.first_token_at <= self.now:
                    self._records.first_token(job)


T = TypeVar("T", bound=tuple[Any, ...])


class _Feed(Generic[T]):
    """An iterator of tuples that begin with a time; `at` is the next one's, infinite after all."""

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self.at = -math.inf
        self._next: T | None = None
        self.take()

    def take(self) -> T:
        """The next one; the one after it is fetched.

        Raises:
            InputError: that one comes before it.
        """
        taken = self._next
        self._next = next(self._items, None)
        at = math.inf if self._next is None else self._next[0]
        if not at >= self.at:
            raise InputError(f"an event at {at} follows one at {self.at}: order them by time")
        self.at = at
        return taken  # type: ignore[return-value]
