from __future__ import annotations

import typing

import pytest

from flashserve.errors import WireError
from flashserve.messages import wire
from flashserve.messages.commands import Evict, NodeCommand, Stage, StartReplica, StopReplica
from flashserve.messages.events import (
    Evicted,
    NodeEvent,
    ReplicaFailed,
    ReplicaLost,
    ReplicaReady,
    ReplicaStopped,
    Staged,
    StageFailed,
    WorkersChanged,
)
from flashserve.node.protocol import pack_tagged, unpack_command, unpack_event
from flashserve.types import ModelId, ModelSpec, NodeId, Phases, ReplicaId, Tier

N, M, R = NodeId("n"), ModelId("m"), ReplicaId("m#1")
MODEL = ModelSpec(M, "/dir", 10, Tier.REMOTE, 2.0, "Llama", 100, True)
COMMANDS: list[NodeCommand] = [
    StartReplica(N, 1, R, MODEL, "why"),
    StopReplica(N, 1, R, MODEL, "why"),
    Stage(N, 1, MODEL, Tier.DRAM, "why"),
    Evict(N, 1, MODEL, Tier.DISK, "why"),
]
EVENTS: list[NodeEvent] = [
    WorkersChanged(N, 2),
    ReplicaReady(N, R, M, Phases(place_s=1.0)),
    ReplicaFailed(N, R, M, "code", "message"),
    ReplicaLost(N, R, M, "why"),
    ReplicaStopped(N, R, M),
    Staged(N, M, Tier.DRAM, 5, 0.5),
    StageFailed(N, M, Tier.DISK, "code", "message"),
    Evicted(N, M, Tier.DRAM),
]


def test_every_kind_of_message_is_tried() -> None:
    assert {type(command) for command in COMMANDS} == set(typing.get_args(NodeCommand))
    assert {type(event) for event in EVENTS} == set(typing.get_args(NodeEvent))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda value: type(value).__name__)
def test_commands_come_back_as_they_were(command: NodeCommand) -> None:
    assert unpack_command(wire.pack(pack_tagged(command))) == command


@pytest.mark.parametrize("event", EVENTS, ids=lambda value: type(value).__name__)
def test_events_come_back_as_they_were(event: NodeEvent) -> None:
    assert unpack_event(wire.pack(pack_tagged(event))) == event


@pytest.mark.parametrize("body", [None, ["Sing", None], ["Stage", 3], "Stage"])
def test_other_bodies_are_refused(body: object) -> None:
    with pytest.raises(WireError):
        unpack_command(wire.pack(body))
