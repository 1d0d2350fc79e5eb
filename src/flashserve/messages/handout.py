"""What a process that is no worker asks of a node's store, and what it gets beside a descriptor.

One `Call("hand_out", HandoutRequest)` per connection, in the frames of wire.py; the answer is a
`Reply` with a `HandoutGrant`, whose first byte carries the descriptor, or a `Fault`. From then on
neither side sends anything: the open connection is the lease.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flashserve.types import TensorSlice

METHOD = "hand_out"
MAX_REQUEST_BYTES = 64 << 10
"""A request is one path or name; a longer one is nobody's."""


@dataclasses.dataclass(frozen=True, slots=True)
class HandoutRequest:
    """source: a directory (absolute), a uri, or the name of a model that the node knows."""

    source: str


@dataclasses.dataclass(frozen=True, slots=True)
class HandoutGrant:
    """A model's bytes lie in [offset, offset + num_bytes) of the descriptor; nobody can write them.

    offset is a multiple of the page size; those of `tensors` count from it. directory holds the
    checkpoint's config and tokenizer files on this machine.
    """

    uri: str
    identity: str
    directory: str
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tensors: tuple[TensorSlice, ...]
    offset: int
    num_bytes: int
