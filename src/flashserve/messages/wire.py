"""Frames between processes: a 4-byte big-endian length, then one msgpack-encoded `Frame`.

The same bytes travel over inherited socket pairs, Unix sockets and TCP. One connection carries
many exchanges at once, told apart by an id that the caller chooses:

    caller: Call(id, method, body) ────────────────▶ callee
    caller ◀──────────────── Reply(id, body) | Fault(id, code, message)          (a call)
    caller ◀──────────────── Item(id, body)* then End(id) | Fault(...)           (a stream)
    caller: Credit(id, num_items) ─────────────────▶ callee may send so many more items
    caller: Cancel(id) ────────────────────────────▶ callee stops; it still answers End or Fault
    either: Notice(method, body) ──────────────────▶ needs no answer (heartbeats, status)

A callee that is out of credit keeps what it has and coalesces it into its next item.
"""

from __future__ import annotations

import struct
from typing import Any, TypeVar

import msgspec

from flashserve.errors import WireError

MAX_FRAME_BYTES = 64 << 20
INITIAL_CREDIT = 32
"""Items that a callee may send on a new stream before the first Credit."""

_LENGTH = struct.Struct(">I")
# Bad UTF-8 is a ValueError, and nesting without end a RecursionError, of Python's own.
_MALFORMED = (msgspec.MsgspecError, ValueError, RecursionError)
T = TypeVar("T")


class Call(msgspec.Struct, frozen=True, tag="call", array_like=True):
    id: int
    method: str
    body: msgspec.Raw = msgspec.Raw(b"\xc0")


class Reply(msgspec.Struct, frozen=True, tag="reply", array_like=True):
    id: int
    body: msgspec.Raw = msgspec.Raw(b"\xc0")


class Item(msgspec.Struct, frozen=True, tag="item", array_like=True):
    id: int
    body: msgspec.Raw


class End(msgspec.Struct, frozen=True, tag="end", array_like=True):
    id: int


class Fault(msgspec.Struct, frozen=True, tag="fault", array_like=True):
    id: int
    code: str
    message: str


class Credit(msgspec.Struct, frozen=True, tag="credit", array_like=True):
    id: int
    num_items: int


class Cancel(msgspec.Struct, frozen=True, tag="cancel", array_like=True):
    id: int


class Notice(msgspec.Struct, frozen=True, tag="notice", array_like=True):
    method: str
    body: msgspec.Raw = msgspec.Raw(b"\xc0")


Frame = Call | Reply | Item | End | Fault | Credit | Cancel | Notice

_frame_encoder = msgspec.msgpack.Encoder()
_frame_decoder: msgspec.msgpack.Decoder[Frame] = msgspec.msgpack.Decoder(Frame)


def pack(value: Any) -> msgspec.Raw:
    """A value (dataclass, Struct or plain) as the body of a frame."""
    return msgspec.Raw(_frame_encoder.encode(value))


def unpack(body: msgspec.Raw, kind: type[T]) -> T:
    """The body of a frame as a `kind`.

    Raises:
        WireError: the bytes do not describe a `kind`.
    """
    try:
        return msgspec.msgpack.decode(body, type=kind)
    except _MALFORMED as error:
        raise WireError(f"a message is not a valid {kind.__name__}: {error}") from None


def encode(frame: Frame) -> bytes:
    """One frame with its length in front.

    Raises:
        WireError: the frame is larger than MAX_FRAME_BYTES.
    """
    payload = _frame_encoder.encode(frame)
    if len(payload) > MAX_FRAME_BYTES:
        raise WireError(f"a frame of {len(payload)} bytes is over the limit of {MAX_FRAME_BYTES}")
    return _LENGTH.pack(len(payload)) + payload


class FrameDecoder:
    """Turns the bytes of a connection, in whatever pieces they arrive, into frames."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes | memoryview) -> list[Frame]:
        """Every frame that is complete once `data` has been added.

        Raises:
            WireError: a length over MAX_FRAME_BYTES, or bytes that are no frame. The connection
                cannot be used any more.
        """
        self._buffer += data
        frames: list[Frame] = []
        start = 0
        while len(self._buffer) - start >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._buffer, start)
            if length > MAX_FRAME_BYTES:
                raise WireError(f"a frame of {length} bytes is over the limit of {MAX_FRAME_BYTES}")
            begin = start + _LENGTH.size
            if len(self._buffer) < begin + length:
                break
            frames.append(_decode(bytes(self._buffer[begin : begin + length])))
            start = begin + length
        if start:
            del self._buffer[:start]
        return frames


def _decode(payload: bytes) -> Frame:
    try:
        return _frame_decoder.decode(payload)
    except _MALFORMED as error:
        raise WireError(f"a frame does not have the agreed form: {error}") from None
