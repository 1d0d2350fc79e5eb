"""A modelled node: it carries out orders in no time of ours, and says when each result is due.

What is modelled: bytes move at one rate per tier, each move by itself (moves do not slow each
other down); a start takes the move, a free worker, the bind and a fixed rest; a request takes a
fixed prefill and a fixed time per token, however many run beside it; a worker that is lost is
replaced after a fixed time. Nothing is drawn at random.
"""

from __future__ import annotations

import dataclasses
import heapq

from flashserve.messages.commands import (
    Dispatch,
    Evict,
    NodeCommand,
    Stage,
    StartReplica,
    StopReplica,
)
from flashserve.messages.events import (
    Event,
    Evicted,
    NodeJoined,
    NodeLost,
    ReplicaFailed,
    ReplicaLost,
    ReplicaReady,
    ReplicaStopped,
    RequestFinished,
    Staged,
    StageFailed,
    WorkersChanged,
)
from flashserve.policy.cost import extent_bytes
from flashserve.types import ModelId, ModelSpec, NodeSpec, Phases, ReplicaId, Tier


@dataclasses.dataclass(frozen=True, slots=True)
class Speeds:
    """Rates and times of a modelled node. The defaults are of a two-core machine without a GPU."""

    remote_bytes_per_s: float = 300e6
    disk_bytes_per_s: float = 1.5e9
    dram_bytes_per_s: float = 10e9
    init_s: float = 0.1
    stop_s: float = 0.02
    worker_start_s: float = 2.0
    prefill_s: float = 0.3
    token_s: float = 0.07
    num_tokens: int = 64


@dataclasses.dataclass(frozen=True, slots=True)
class Report:
    """Something that the node will say at `at`, unless the replica it is about is gone by then."""

    at: float
    event: Event
    epoch: int
    replica_id: ReplicaId | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class _Move:
    """Bytes on their way to DRAM, or there."""

    ends_at: float
    fetch_s: float
    dram_s: float
    num_bytes: int


class ModelledNode:
    """Everything a node keeps: bytes, workers, replicas."""

    def __init__(self, spec: NodeSpec, speeds: Speeds) -> None:
        self.spec = spec
        self._speeds = speeds
        self._reset(0.0)

    def _reset(self, now: float) -> None:
        self._is_up = True
        self._on_disk: set[ModelId] = set()
        self._in_dram: dict[ModelId, _Move] = {}
        self._replicas: set[ReplicaId] = set()
        self._free_at = [now] * self.spec.num_workers
        self._num_live = self.spec.num_workers

    def join(self, now: float) -> list[Report]:
        """The node comes up with all its workers started."""
        self._reset(now)
        return [
            self._report(now, NodeJoined(self.spec)),
            self._report(now, WorkersChanged(self.spec.node_id, self._num_live)),
        ]

    def holds(self, report: Report) -> bool:
        """Whether a report that is due now is still true."""
        if not self._is_up or report.epoch != self.spec.epoch:
            return False
        if isinstance(report.event, Staged) and report.event.tier is Tier.DRAM:
            move = self._in_dram.get(report.event.model_id)
            return move is not None and move.ends_at <= report.at
        return report.replica_id is None or report.replica_id in self._replicas

    def execute(self, command: NodeCommand, now: float) -> list[Report]:
        """Carry out an order; one of another epoch is ignored."""
        if command.epoch != self.spec.epoch or not self._is_up:
            return []
        model_id = command.model.model_id
        match command:
            case StartReplica():
                return self._start(command, now)
            case StopReplica():
                if command.replica_id in self._replicas:
                    self._replicas.remove(command.replica_id)
                    heapq.heappush(self._free_at, now + self._speeds.stop_s)
                stopped = ReplicaStopped(command.node_id, command.replica_id, model_id)
                return [self._report(now + self._speeds.stop_s, stopped)]
            case Stage():
                return self._stage(command, now)
            case Evict():
                self._in_dram.pop(model_id, None)
                if command.tier is Tier.DISK:
                    self._on_disk.discard(model_id)
                return [self._report(now, Evicted(command.node_id, model_id, command.tier))]

    def generate(self, command: Dispatch, now: float) -> list[Report]:
        """Answer a request: the time of its last token."""
        if command.replica_id not in self._replicas:
            return []
        speeds = self._speeds
        ends_at = now + speeds.prefill_s + speeds.token_s * speeds.num_tokens
        finished = RequestFinished(command.request_id, speeds.prefill_s)
        return [Report(ends_at, finished, self.spec.epoch, command.replica_id)]

    def suffer(self, event: Event, now: float) -> list[Report]:
        """A fault from the script, which the controller is told as well."""
        match event:
            case NodeLost(epoch=self.spec.epoch):
                self._is_up = False
            case NodeJoined():
                self.spec = event.node
                self._reset(now)
                return [self._report(now, WorkersChanged(self.spec.node_id, self._num_live))]
            case ReplicaLost() if event.replica_id in self._replicas:
                self._replicas.remove(event.replica_id)
                return self._replace_worker(now)
            case ReplicaFailed() if event.replica_id in self._replicas:
                self._replicas.remove(event.replica_id)
                heapq.heappush(self._free_at, now)
            case _:
                pass
        return []

    def _replace_worker(self, now: float) -> list[Report]:
        ready_at = now + self._speeds.worker_start_s
        heapq.heappush(self._free_at, ready_at)
        fewer = WorkersChanged(self.spec.node_id, self._num_live - 1)
        return [
            self._report(now, fewer),
            self._report(ready_at, WorkersChanged(self.spec.node_id, self._num_live)),
        ]

    def _start(self, command: StartReplica, now: float) -> list[Report]:
        assert self._free_at, "more replicas were ordered than the node has workers"
        move, reports = self._move(command.model, now)
        if move is None:
            message = f"{self.spec.node_id} has no room for {command.model.model_id}"
            model_id = command.model.model_id
            failed = ReplicaFailed(
                command.node_id, command.replica_id, model_id, "unavailable", message
            )
            return [self._report(now, failed)]
        loading_at = max(now, move.ends_at, heapq.heappop(self._free_at))
        self._replicas.add(command.replica_id)
        device_s = command.model.size_bytes / self._speeds.dram_bytes_per_s
        moved_s = max(0.0, move.ends_at - now)
        dram_s = min(move.dram_s, moved_s)
        phases = Phases(
            place_s=loading_at - max(now, move.ends_at),
            fetch_s=moved_s - dram_s,
            dram_s=dram_s,
            device_s=device_s,
            init_s=self._speeds.init_s,
        )
        ready_at = loading_at + device_s + self._speeds.init_s
        ready = ReplicaReady(command.node_id, command.replica_id, command.model.model_id, phases)
        return [*reports, Report(ready_at, ready, self.spec.epoch, command.replica_id)]

    def _stage(self, command: Stage, now: float) -> list[Report]:
        model = command.model
        if command.tier is Tier.DISK:
            fetch_s = self._fetch_s(model)
            self._on_disk.add(model.model_id)
            num_bytes = model.size_bytes if fetch_s else 0
            staged = Staged(command.node_id, model.model_id, Tier.DISK, num_bytes, fetch_s)
            return [self._report(now + fetch_s, staged)]
        move, reports = self._move(model, now)
        if move is None:
            message = f"{self.spec.node_id} has no room for {model.model_id}"
            failed = StageFailed(command.node_id, model.model_id, Tier.DRAM, "unavailable", message)
            return [self._report(now, failed)]
        if not reports:  # the bytes were there, or on their way
            hit = Staged(command.node_id, model.model_id, Tier.DRAM, 0, 0.0)
            return [self._report(max(now, move.ends_at), hit)]
        return reports

    def _move(self, model: ModelSpec, now: float) -> tuple[_Move | None, list[Report]]:
        """Bring a model's bytes to DRAM; None when they do not fit."""
        if move := self._in_dram.get(model.model_id):
            return move, []
        num_bytes = extent_bytes(model.size_bytes)
        if sum(m.num_bytes for m in self._in_dram.values()) + num_bytes > self.spec.dram_bytes:
            return None, []
        fetch_s = self._fetch_s(model)
        dram_s = model.size_bytes / self._speeds.disk_bytes_per_s
        move = _Move(now + fetch_s + dram_s, fetch_s, dram_s, num_bytes)
        self._in_dram[model.model_id] = move
        self._on_disk.add(model.model_id)
        node_id, size = self.spec.node_id, model.size_bytes
        reports = [
            self._report(move.ends_at, Staged(node_id, model.model_id, Tier.DRAM, size, dram_s))
        ]
        if fetch_s:
            fetched = Staged(node_id, model.model_id, Tier.DISK, size, fetch_s)
            reports.insert(0, self._report(now + fetch_s, fetched))
        return move, reports

    def _fetch_s(self, model: ModelSpec) -> float:
        if model.lowest_tier >= Tier.DISK or model.model_id in self._on_disk:
            return 0.0
        return model.size_bytes / self._speeds.remote_bytes_per_s

    def _report(self, at: float, event: Event) -> Report:
        return Report(at, event, self.spec.epoch)
