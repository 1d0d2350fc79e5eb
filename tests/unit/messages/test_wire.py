from __future__ import annotations

import contextlib
import struct

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashserve.errors import WireError
from flashserve.messages import wire
from flashserve.messages.commands import StartReplica
from flashserve.messages.wire import Call, Cancel, Credit, End, Fault, FrameDecoder, Item, Notice
from flashserve.messages.work import GenerateJob, TokenBatch
from flashserve.types import (
    ModelId,
    ModelSpec,
    NodeId,
    ReplicaId,
    SamplingParams,
    Tier,
    TokenOutput,
)

FRAMES: list[wire.Frame] = [
    Call(1, "generate", wire.pack({"a": [1, 2.5, None, "é"]})),
    wire.Reply(2),
    Item(1, wire.pack([1, 2, 3])),
    End(1),
    Fault(2**40, "internal_error", "why"),
    Credit(1, 16),
    Cancel(1),
    Notice("heartbeat"),
]
STREAM = b"".join(wire.encode(frame) for frame in FRAMES)


@pytest.mark.parametrize("cut", range(len(STREAM) + 1))
def test_frames_survive_a_cut_at_every_byte(cut: int) -> None:
    decoder = FrameDecoder()
    assert decoder.feed(STREAM[:cut]) + decoder.feed(STREAM[cut:]) == FRAMES


def test_frames_survive_arriving_byte_by_byte() -> None:
    decoder = FrameDecoder()
    frames = [frame for byte in STREAM for frame in decoder.feed(bytes([byte]))]
    assert frames == FRAMES


def test_an_oversize_length_is_refused_before_its_bytes_arrive() -> None:
    with pytest.raises(WireError, match="over the limit"):
        FrameDecoder().feed(struct.pack(">I", wire.MAX_FRAME_BYTES + 1))


def test_a_frame_of_the_largest_size_passes_and_one_byte_more_does_not() -> None:
    room = wire.MAX_FRAME_BYTES - len(wire.encode(Item(1, wire.pack(b"")))) - 10
    encoded = wire.encode(Item(1, wire.pack(bytes(room))))
    assert len(FrameDecoder().feed(encoded)) == 1
    with pytest.raises(WireError, match="over the limit"):
        wire.encode(Item(1, wire.pack(bytes(wire.MAX_FRAME_BYTES))))


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b"\xc1",
        b"\x93\x01\x02\x03",
        b"[]",
        msgspec.msgpack.encode(["reply"]),
        msgspec.msgpack.encode(["call", "one", "method", None]),
        msgspec.msgpack.encode(["unheard of", 1]),
        msgspec.msgpack.encode(["end", 1])[:-1],
        b"\x91" * 5000,
        b"\x93\xa4call\x01\xa2\xff\xfe",
        b"\x93\xa4item\x01" + b"\x91" * 100_000,
    ],
)
def test_garbage_is_refused(payload: bytes) -> None:
    with pytest.raises(WireError, match="agreed form"):
        FrameDecoder().feed(struct.pack(">I", len(payload)) + payload)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_nothing_but_wire_errors(data: bytes) -> None:
    with contextlib.suppress(WireError):
        FrameDecoder().feed(struct.pack(">I", len(data)) + data)


def test_values_come_back_as_they_were() -> None:
    job = GenerateJob("s", (1, 2), SamplingParams(seed=3, stop_token_ids=(4,)), (5,), "salt", False)
    model = ModelSpec(ModelId("m"), "/dir", 7, Tier.REMOTE, 1.5)
    order = StartReplica(NodeId("n"), 3, ReplicaId("m#1"), model, "why")
    batch = TokenBatch((TokenOutput(0, 9, -0.5, ((9, -0.5), (8, -1.0)), "stop", 1.25),), 0.5)
    for value in (job, order, batch):
        assert wire.unpack(wire.pack(value), type(value)) == value


@pytest.mark.parametrize("body", [b"\xa2\xff\xfe", b"\x91" * 100_000])
def test_a_malformed_body_is_refused(body: bytes) -> None:
    with pytest.raises(WireError):
        wire.unpack(msgspec.Raw(body), object)


def test_a_body_of_another_kind_is_refused_by_name() -> None:
    with pytest.raises(WireError, match="GenerateJob"):
        wire.unpack(wire.pack({"sequence_id": 3}), GenerateJob)
