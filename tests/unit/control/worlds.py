"""A controller on one large node whose starts and answers take known times."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Sequence

from tests.unit.control.fake_nodes import model, node

from flashserve.config import PolicySettings
from flashserve.control.controller import Controller
from flashserve.messages.commands import Command, Dispatch, StartReplica, StopReplica
from flashserve.messages.events import (
    Event,
    ModelDeployed,
    NodeJoined,
    ReplicaReady,
    RequestArrived,
    RequestFinished,
    Tick,
)
from flashserve.policy.plans import Policy
from flashserve.types import ModelSpec, Phases, ReplicaId, RequestId

Observer = Callable[[Event, Sequence[Command], float], None]
INIT_S = 2.0


class World:
    """Tells every event with its commands to the observers, in order of time."""

    def __init__(self, policy: Policy, observers: Sequence[Observer], limit: int = 4) -> None:
        settings = PolicySettings(queue_limit=100_000, deadline_s=1e6, max_replicas=8)
        self.controller = Controller(settings, policy=policy)
        self.settings = settings
        self.now = 0.0
        self.num_dispatched = 0
        self._observers = observers
        self._due: list[tuple[float, int, Event]] = []
        self._order = itertools.count()
        self._service_s: dict[RequestId, float] = {}
        self._started: dict[ReplicaId, float] = {}
        self._held_s = 0.0
        self.post(NodeJoined(node(workers=64, extents=1000, max_sequences=limit)), 0.0)

    def deploy(self, *specs: ModelSpec) -> None:
        for spec in specs:
            self.post(ModelDeployed(spec), self.now)

    def request(self, name: str, spec: ModelSpec, at: float, service_s: float) -> None:
        request_id = RequestId(name)
        self._service_s[request_id] = service_s
        self.post(RequestArrived(request_id, spec.model_id, tenant=name[:1]), at)

    def post(self, event: Event, at: float) -> None:
        heapq.heappush(self._due, (at, next(self._order), event))

    def run(self, until: float) -> None:
        while True:
            wakeup = self.controller.next_wakeup()
            due = self._due[0][0] if self._due else float("inf")
            when = min(due, float("inf") if wakeup is None else wakeup)
            if when > until:
                break
            self.now = max(self.now, when)
            if due <= when:
                self._handle(heapq.heappop(self._due)[2])
            else:
                self._handle(Tick())
        self.now = until

    def held_s(self) -> float:
        """Seconds of all replicas, from their orders to their stops; starts under way apart."""
        return self._held_s + sum(self.now - since for since in self._started.values())

    def play_random(self, seed: int, num_requests: int = 60) -> None:
        """Some models with bursts and gaps, and time for all that began to end."""
        draw = random.Random(seed)
        specs = [model(f"m{i}") for i in range(3)]
        self.deploy(*specs)
        at = 1.0
        for i in range(num_requests):
            at += draw.expovariate(draw.choice([5.0, 0.2, 0.02]))
            self.request(f"{draw.choice('ab')}{i}", draw.choice(specs), at, draw.uniform(0.1, 20.0))
        self.run(at + 200.0)

    def _handle(self, event: Event) -> None:
        commands = self.controller.handle(event, self.now)
        for command in commands:
            match command:
                case StartReplica():
                    self._started[command.replica_id] = self.now
                    ready = ReplicaReady(
                        command.node_id,
                        command.replica_id,
                        command.model.model_id,
                        Phases(device_s=1e-9 * command.model.size_bytes, init_s=INIT_S),
                    )
                    self.post(ready, self.now + ready.phases.startup_s)
                case StopReplica():
                    self._held_s += self.now - self._started.pop(command.replica_id)
                case Dispatch():
                    self.num_dispatched += 1
                    finished = RequestFinished(command.request_id, 0.1)
                    self.post(finished, self.now + self._service_s[command.request_id])
                case _:
                    pass
        for observe in self._observers:
            observe(event, commands, self.now)
