"""What travels between a controller and a node agent of another process.

| method           | kind                 | body            | answer           |
|------------------|----------------------|-----------------|------------------|
| join             | call                 | -               | NodeSpec         |
| describe         | call                 | str             | ModelFacts       |
| describe_adapter | call                 | DescribeAdapter | AdapterFacts     |
| stats            | call                 | -               | NodeStats        |
| generate         | stream               | GenerateOrder   | TokenBatch items |
| execute          | notice to the node   | tagged command  | -                |
| declare_adapter  | notice to the node   | AdapterSpec     | -                |
| retire_adapter   | notice to the node   | AdapterId       | -                |
| prefetch_adapter | notice to the node   | PrefetchAdapter | -                |
| event            | notice from the node | tagged event    | -                |
| heartbeat        | notice, both ways    | -               | -                |
"""

from __future__ import annotations

import asyncio
import dataclasses
import typing
from typing import Any

import msgspec

from flashserve.errors import UnavailableError, WireError
from flashserve.messages import wire
from flashserve.messages.commands import NodeCommand
from flashserve.messages.events import NodeEvent
from flashserve.messages.work import GenerateJob
from flashserve.node.channel import Channel
from flashserve.types import AdapterId, ModelSpec, ReplicaId

HEARTBEAT_INTERVAL_S = 1.0
MISSED_HEARTBEATS = 3


@dataclasses.dataclass(frozen=True, slots=True)
class GenerateOrder:
    replica_id: ReplicaId
    job: GenerateJob


@dataclasses.dataclass(frozen=True, slots=True)
class DescribeAdapter:
    """Can the adapter at this address be served on that model?"""

    uri: str
    base: ModelSpec


@dataclasses.dataclass(frozen=True, slots=True)
class PrefetchAdapter:
    """See Node.prefetch_adapter."""

    adapter_id: AdapterId
    into_pages: bool


class _Tagged(msgspec.Struct, frozen=True, array_like=True):
    name: str
    body: msgspec.Raw


def _by_name(union: Any) -> dict[str, type[Any]]:
    return {kind.__name__: kind for kind in typing.get_args(union)}


_COMMANDS = _by_name(NodeCommand)
_EVENTS = _by_name(NodeEvent)


def pack_tagged(value: NodeCommand | NodeEvent) -> _Tagged:
    """The value with the name of its class, as a frame's body."""
    return _Tagged(type(value).__name__, wire.pack(value))


def unpack_command(body: msgspec.Raw) -> NodeCommand:
    """Raises WireError when it is no command to a node."""
    command: NodeCommand = _unpack_tagged(body, _COMMANDS)
    return command


def unpack_event(body: msgspec.Raw) -> NodeEvent:
    """Raises WireError when it is no event of a node."""
    event: NodeEvent = _unpack_tagged(body, _EVENTS)
    return event


def _unpack_tagged(body: msgspec.Raw, kinds: dict[str, type[Any]]) -> Any:
    tagged = wire.unpack(body, _Tagged)
    if tagged.name not in kinds:
        raise WireError(f"{tagged.name[:40]} is not one of {', '.join(kinds)}")
    return wire.unpack(tagged.body, kinds[tagged.name])


class Heartbeat:
    """Sends a sign of life at an interval, and ends the connection when none comes back.

    What counts is intervals without any frame, so that a stall of this process alone, after which
    frames are waiting, loses nobody.
    """

    def __init__(self, channel: Channel, interval_s: float = HEARTBEAT_INTERVAL_S) -> None:
        self._channel = channel
        self._interval_s = interval_s
        self._num_missed = 0

    def heard(self) -> None:
        self._num_missed = 0

    async def run(self) -> None:
        """Until the connection ends."""
        while self._channel.is_open:
            self._channel.notify("heartbeat")
            await asyncio.sleep(self._interval_s)
            self._num_missed += 1
            if self._num_missed >= MISSED_HEARTBEATS:
                error = f"{self._channel.peer} missed {self._num_missed} heartbeats"
                self._channel.abort(UnavailableError(error))
