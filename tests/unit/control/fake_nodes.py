"""Nodes that carry out the controller's orders when told to, and check what they are ordered.

`Fleet` keeps the truth that the controller must agree with: which request waits where, which
replica is ready, which bytes are in DRAM.
"""

from __future__ import annotations

import dataclasses
from collections import deque

import msgspec

from flashserve.config import PolicySettings
from flashserve.control.controller import Controller
from flashserve.messages import commands, events
from flashserve.messages.events import Event, NodeEvent
from flashserve.policy.cost import EXTENT_BYTES, extent_bytes
from flashserve.policy.plans import Policy
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

_MAX_TICKS = 50
PHASES = Phases(place_s=0.01, dram_s=0.5, device_s=0.1, init_s=0.2)


def model(name: str, extents: int = 1, **changes: object) -> ModelSpec:
    spec = ModelSpec(ModelId(name), f"/models/{name}", extents * EXTENT_BYTES)
    return dataclasses.replace(spec, **changes)  # type: ignore[arg-type]


def node(
    name: str = "n1",
    workers: int = 1,
    extents: int = 8,
    *,
    epoch: int = 1,
    max_sequences: int = 32,
) -> NodeSpec:
    return NodeSpec(NodeId(name), epoch, workers, extents * EXTENT_BYTES, max_sequences)


class FakeNode:
    def __init__(self, spec: NodeSpec) -> None:
        self.spec = spec
        self.replicas: dict[ReplicaId, ModelSpec] = {}
        self.ready: set[ReplicaId] = set()
        self.dram: dict[ModelId, int] = {}
        self.answers: dict[ModelId, deque[NodeEvent]] = {}
        """Per model in order, across models in any order."""

    def execute(self, command: commands.NodeCommand) -> None:
        assert command.epoch == self.spec.epoch
        assert command.reason
        model_id, name = command.model.model_id, self.spec.node_id
        match command:
            case commands.StartReplica():
                assert len(self.replicas) < self.spec.num_workers, "no slot is free"
                assert command.replica_id not in self.replicas
                self.replicas[command.replica_id] = command.model
                self._bring(command.model)
                self.answer(events.ReplicaReady(name, command.replica_id, model_id, PHASES))
            case commands.StopReplica():
                assert command.replica_id in self.replicas, "it was stopped before"
                self.forget(command.replica_id)
                self.answer(events.ReplicaStopped(name, command.replica_id, model_id))
            case commands.Stage(tier=Tier.DRAM):
                self._bring(command.model)
            case commands.Stage():
                self.answer(events.Staged(name, model_id, command.tier, 0, 0.0))
            case commands.Evict():
                under = {spec.model_id for spec in self.replicas.values()}
                assert model_id not in under, "bytes were to go from under a replica"
                self.dram.pop(model_id, None)
                self.answer(events.Evicted(name, model_id, command.tier))

    def _bring(self, spec: ModelSpec) -> None:
        name, need = self.spec.node_id, extent_bytes(spec.size_bytes)
        if spec.model_id in self.dram:
            self.answer(events.Staged(name, spec.model_id, Tier.DRAM, 0, 0.0))
        elif sum(self.dram.values()) + need <= self.spec.dram_bytes:
            self.dram[spec.model_id] = need
            self.answer(events.Staged(name, spec.model_id, Tier.DRAM, spec.size_bytes, 0.5))
        else:
            assert not any(s.model_id == spec.model_id for s in self.replicas.values()), (
                "a start was ordered without room for its bytes"
            )
            failed = events.StageFailed(name, spec.model_id, Tier.DRAM, "unavailable", "no room")
            self.answer(failed)

    def answer(self, event: NodeEvent) -> None:
        assert not isinstance(event, events.WorkersChanged)
        self.answers.setdefault(event.model_id, deque()).append(event)

    def forget(self, replica_id: ReplicaId) -> None:
        del self.replicas[replica_id]
        self.ready.discard(replica_id)

    def cancel(self, replica_id: ReplicaId) -> None:
        """The replica will never say that it is ready."""
        self.answers = {
            model_id: kept
            for model_id, queue in self.answers.items()
            if (kept := deque(event for event in queue if not _is_ready_of(event, replica_id)))
        }


def _is_ready_of(event: NodeEvent, replica_id: ReplicaId) -> bool:
    return isinstance(event, events.ReplicaReady) and event.replica_id == replica_id


@dataclasses.dataclass
class Sent:
    """What has become of a request."""

    model_id: ModelId
    state: str = "waiting"
    replica_id: ReplicaId | None = None
    losses: int = 0
    was_told: bool = False


class Fleet:
    """A controller with fake nodes, a clock that only moves when told to, and the truth."""

    def __init__(self, settings: PolicySettings, policy: Policy | None = None) -> None:
        self.controller = Controller(settings, policy=policy)
        self.settings = settings
        self.now = 0.0
        self.nodes: dict[NodeId, FakeNode] = {}
        self.requests: dict[RequestId, Sent] = {}
        self.log: list[commands.Command] = []

    def waiting(self) -> list[RequestId]:
        return [r for r, sent in self.requests.items() if sent.state == "waiting"]

    def running(self, replica_id: ReplicaId | None = None) -> list[RequestId]:
        return [
            request_id
            for request_id, sent in self.requests.items()
            if sent.state == "running" and replica_id in (None, sent.replica_id)
        ]

    def tell(self, event: Event) -> list[commands.Command]:
        """Give the controller an event, carry out what it answers, and compare with the truth."""
        if isinstance(event, events.ReplicaReady) and event.replica_id in self.replicas():
            self.nodes[event.node_id].ready.add(event.replica_id)
        caused = self.controller.handle(event, self.now)
        for command in caused:
            self._carry_out(command)
        self.log += caused
        for request_id in self.waiting():
            assert self.requests[request_id].was_told, "a request waits and was not told so"
        assert self.controller.num_in_flight == len(self.running())
        assert self.controller.num_waiting == len(self.waiting())
        return caused

    def replicas(self) -> dict[ReplicaId, ModelSpec]:
        return {r: spec for fake in self.nodes.values() for r, spec in fake.replicas.items()}

    def _carry_out(self, command: commands.Command) -> None:
        match command:
            case commands.Hold():
                sent = self.requests[command.request_id]
                assert sent.state == "waiting"
                assert command.reason
                assert command.predicted.total_s >= 0
                sent.was_told = True
            case commands.Dispatch():
                sent = self.requests[command.request_id]
                assert sent.state == "waiting", "a request was dispatched twice"
                fake = self.nodes[command.node_id]
                assert command.replica_id in fake.ready, "dispatched to what is not ready"
                assert fake.replicas[command.replica_id].model_id == sent.model_id
                assert len(self.running(command.replica_id)) < fake.spec.max_sequences
                sent.state, sent.replica_id, sent.was_told = "running", command.replica_id, True
            case commands.Reject():
                sent = self.requests[command.request_id]
                assert sent.state == "waiting"
                assert command.message
                sent.state = f"rejected: {command.code}"
            case _:
                if isinstance(command, commands.StopReplica):
                    assert not self.running(command.replica_id), "stopped under a request"
                self.nodes[command.node_id].execute(command)

    # What may happen

    def join(self, spec: NodeSpec) -> list[commands.Command]:
        if old := self.nodes.get(spec.node_id):
            self._interrupt(list(old.replicas))
        self.nodes[spec.node_id] = FakeNode(spec)
        caused = self.tell(events.NodeJoined(spec))
        return caused + self.tell(events.WorkersChanged(spec.node_id, spec.num_workers))

    def lose_node(self, node_id: NodeId) -> list[commands.Command]:
        fake = self.nodes.pop(node_id)
        self._interrupt(list(fake.replicas))
        return self.tell(events.NodeLost(node_id, fake.spec.epoch))

    def lose_replica(self, replica_id: ReplicaId) -> list[commands.Command]:
        fake, spec = self._find(replica_id)
        fake.cancel(replica_id)
        fake.forget(replica_id)
        self._interrupt([replica_id])
        lost = events.ReplicaLost(fake.spec.node_id, replica_id, spec.model_id, "killed")
        return self.tell(lost)

    def fail_replica(self, replica_id: ReplicaId, code: str) -> list[commands.Command]:
        fake, spec = self._find(replica_id)
        fake.cancel(replica_id)
        fake.forget(replica_id)
        self._interrupt([replica_id])
        failed = events.ReplicaFailed(
            fake.spec.node_id, replica_id, spec.model_id, code, "it is broken"
        )
        return self.tell(failed)

    def arrive(
        self, request_id: str, model_id: str, deadline_s: float | None = None
    ) -> list[commands.Command]:
        self.requests[RequestId(request_id)] = Sent(ModelId(model_id))
        arrived = events.RequestArrived(
            RequestId(request_id), ModelId(model_id), deadline_s=deadline_s
        )
        return self.tell(arrived)

    def finish(self, request_id: str, prefill_s: float | None = 0.3) -> list[commands.Command]:
        self.requests[RequestId(request_id)].state = "finished"
        return self.tell(events.RequestFinished(RequestId(request_id), prefill_s))

    def answer_one(self, node_id: NodeId, model_id: ModelId) -> list[commands.Command]:
        queue = self.nodes[node_id].answers[model_id]
        event = queue.popleft()
        if not queue:
            del self.nodes[node_id].answers[model_id]
        return self.tell(event)

    def answer_phases(self, phases: Phases) -> None:
        """Let replicas whose start is a node's next answer be ready with such phases."""
        for fake in self.nodes.values():
            for queue in list(fake.answers.values()):
                if queue and isinstance(event := queue[0], events.ReplicaReady):
                    queue[0] = msgspec.structs.replace(event, phases=phases)

    def answer_all(self) -> list[commands.Command]:
        """Let the nodes answer everything, and what follows from it."""
        caused: list[commands.Command] = []
        while pending := [(n, m) for n, fake in self.nodes.items() for m in fake.answers]:
            caused += self.answer_one(*pending[0])
        return caused

    def tick(self, now: float) -> list[commands.Command]:
        """As many as there is something to do for at that time."""
        self.now = max(self.now, now)
        caused: list[commands.Command] = []
        for _ in range(_MAX_TICKS):
            caused += self.tell(events.Tick())
            wakeup = self.controller.next_wakeup()
            if wakeup is None or wakeup > self.now:
                return caused
        raise AssertionError("a wakeup in the past: a busy loop")

    def _find(self, replica_id: ReplicaId) -> tuple[FakeNode, ModelSpec]:
        fake = next(f for f in self.nodes.values() if replica_id in f.replicas)
        return fake, fake.replicas[replica_id]

    def _interrupt(self, replica_ids: list[ReplicaId]) -> None:
        for sent in self.requests.values():
            if sent.state == "running" and sent.replica_id in replica_ids:
                sent.state, sent.replica_id = "waiting", None
                sent.losses += 1
                sent.was_told = False
