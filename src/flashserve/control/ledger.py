"""Who took how many seconds of the workers: an account of the events and commands that pass.

Every second of a worker with a model belongs to one model, adapter and tenant. Requests that run
side by side on a replica share its busy seconds equally. A start belongs, in equal parts, to the
requests that waited for it; one that nobody waited for was ahead of requests. A replica idles for
whoever used it last.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from flashserve.control.usage import WorkerUsage
from flashserve.messages.commands import Command, Dispatch, Reject, StartReplica, StopReplica
from flashserve.messages.events import (
    Event,
    NodeJoined,
    NodeLost,
    ReplicaFailed,
    ReplicaLost,
    ReplicaReady,
    ReplicaStopped,
    RequestArrived,
    RequestFinished,
)
from flashserve.types import ModelId, NodeId, ReplicaId, RequestId

AHEAD = "*"
"""Stands for a tenant where a replica was started ahead of requests; no tenant's name."""


class Series(NamedTuple):
    """What seconds are accounted for. adapter "": the base; tenant "": without a name."""

    model_id: ModelId
    adapter: str
    tenant: str


class _Request:
    __slots__ = ("arrived_at", "charged", "is_counted", "replica", "series")

    def __init__(self, series: Series, arrived_at: float) -> None:
        self.series, self.arrived_at = series, arrived_at
        self.replica: _Replica | None = None
        self.charged = 0.0
        """The replica's share_s up to which its seconds are in the account."""
        self.is_counted = False


class _Replica:
    __slots__ = ("is_ready", "last", "node_id", "running", "share_s", "since")

    def __init__(self, model_id: ModelId, node_id: NodeId, now: float) -> None:
        self.node_id = node_id
        self.since = now
        """Up to when its seconds are settled."""
        self.is_ready = False
        self.running: dict[RequestId, _Request] = {}
        self.share_s = 0.0
        """Busy seconds that a request would have had which had run on it from its start."""
        self.last = Series(model_id, "", AHEAD)
        """Whom its idle seconds belong to."""


class Ledger:
    """Give `observe` every event with the commands that it caused, in order.

    Each costs constant time; memory follows the requests and replicas that there are, and what was
    charged since the last `drain`.
    """

    def __init__(self, slo_s: float) -> None:
        self._slo_s = slo_s
        self._usage: collections.defaultdict[Series, WorkerUsage] = collections.defaultdict(
            WorkerUsage
        )
        self._requests: dict[RequestId, _Request] = {}
        self._replicas: dict[ReplicaId, _Replica] = {}
        self._nodes: dict[NodeId, dict[ReplicaId, None]] = {}
        self._epochs: dict[NodeId, int] = {}

    def observe(self, event: Event, commands: Sequence[Command], now: float) -> None:
        self._note_event(event, commands, now)
        for command in commands:
            self._note_command(command, now)

    def drain(self, now: float) -> dict[Series, WorkerUsage]:
        """What was charged since the last time, what still goes on included (starts apart)."""
        for replica in self._replicas.values():
            self._settle(replica, now)
            for request in replica.running.values():
                self._charge(request, replica)
        drained, self._usage = self._usage, collections.defaultdict(WorkerUsage)
        return drained

    def _note_event(self, event: Event, commands: Sequence[Command], now: float) -> None:
        match event:
            case RequestArrived():
                series = Series(event.model_id, event.adapter, event.tenant)
                self._requests.setdefault(event.request_id, _Request(series, now))
            case RequestFinished():
                self._finish(event.request_id, now)
            case ReplicaReady():
                self._ready(event.replica_id, commands, now)
            case ReplicaFailed() | ReplicaLost() | ReplicaStopped():
                self._end_replica(event.replica_id, now)
            case NodeJoined():
                self._end_replicas(event.node.node_id, now)
                self._epochs[event.node.node_id] = event.node.epoch
            case NodeLost() if event.epoch == self._epochs.get(event.node_id):
                self._end_replicas(event.node_id, now)
            case _:
                pass

    def _note_command(self, command: Command, now: float) -> None:
        match command:
            case StartReplica():
                replica = _Replica(command.model.model_id, command.node_id, now)
                self._replicas[command.replica_id] = replica
                self._nodes.setdefault(command.node_id, {})[command.replica_id] = None
            case StopReplica():
                self._end_replica(command.replica_id, now)
            case Dispatch():
                self._dispatch(command, now)
            case Reject():
                self._requests.pop(command.request_id, None)
            case _:
                pass

    def _dispatch(self, command: Dispatch, now: float) -> None:
        request = self._requests.get(command.request_id)
        replica = self._replicas.get(command.replica_id)
        if request is None or replica is None:
            return
        self._settle(replica, now)
        replica.running[command.request_id] = request
        request.replica, request.charged = replica, replica.share_s
        if not request.is_counted:  # it may have lost a replica before
            request.is_counted = True
            usage = self._usage[request.series]
            usage.requests += 1
            if command.startup is not None:
                usage.count_cold(now - request.arrived_at, self._slo_s)

    def _finish(self, request_id: RequestId, now: float) -> None:
        request = self._requests.pop(request_id, None)
        if request is not None and (replica := request.replica) is not None:
            self._settle(replica, now)
            self._charge(request, replica)
            del replica.running[request_id]
            replica.last = request.series

    def _ready(self, replica_id: ReplicaId, commands: Iterable[Command], now: float) -> None:
        """The start belongs to those who waited for it."""
        replica = self._replicas.get(replica_id)
        if replica is None or replica.is_ready:
            return
        waited = [
            request.series
            for command in commands
            if isinstance(command, Dispatch)
            and command.replica_id == replica_id
            and (request := self._requests.get(command.request_id))
        ] or [replica.last]
        for series in waited:
            self._usage[series].loading_s += (now - replica.since) / len(waited)
        replica.last = waited[-1]
        replica.since, replica.is_ready = now, True

    def _end_replicas(self, node_id: NodeId, now: float) -> None:
        for replica_id in list(self._nodes.get(node_id, ())):
            self._end_replica(replica_id, now)

    def _end_replica(self, replica_id: ReplicaId, now: float) -> None:
        replica = self._replicas.pop(replica_id, None)
        if replica is None:
            return
        self._nodes[replica.node_id].pop(replica_id)
        if replica.is_ready:
            self._settle(replica, now)
        else:
            self._usage[replica.last].loading_s += now - replica.since
        for request in replica.running.values():
            self._charge(request, replica)
            request.replica = None

    def _settle(self, replica: _Replica, now: float) -> None:
        """Account for the seconds since the last time; those of a start wait for its end."""
        if not replica.is_ready:
            return
        elapsed_s = now - replica.since
        replica.since = now
        if replica.running:
            replica.share_s += elapsed_s / len(replica.running)
        else:
            self._usage[replica.last].idle_s += elapsed_s

    def _charge(self, request: _Request, replica: _Replica) -> None:
        self._usage[request.series].busy_s += replica.share_s - request.charged
        request.charged = replica.share_s
