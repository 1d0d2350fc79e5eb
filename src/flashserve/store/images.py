"""What the store keeps count of: checkpoints in DRAM, and those on their way there."""

from __future__ import annotations

import collections
import dataclasses
import threading

from flashserve.errors import FlashServeError, InternalError, error_from_code
from flashserve.store.disk import Progress
from flashserve.store.dram import Extent
from flashserve.store.snapshot import Snapshot
from flashserve.types import ModelId, TensorSlice


@dataclasses.dataclass(slots=True, eq=False)
class Image:
    """A checkpoint in DRAM. It lives while a model names it or anybody leases it.

    checksums are those of `disk.chunks`, in their order.
    """

    identity: str
    snapshot: Snapshot
    extent: Extent
    checksums: tuple[int, ...]
    models: set[ModelId] = dataclasses.field(default_factory=set)
    leases: collections.Counter[ModelId] = dataclasses.field(default_factory=collections.Counter)

    def tensors(self) -> tuple[TensorSlice, ...]:
        """Where the tensors lie in the arena just now."""
        layout = self.snapshot.layout
        starts = [self.extent.offset + offset for offset in layout.file_offsets]
        return tuple(
            TensorSlice(
                tensor.name,
                tensor.dtype,
                tensor.shape,
                starts[tensor.file_index] + tensor.begin,
                tensor.end - tensor.begin,
            )
            for tensor in layout.tensors
        )


class Flight:
    """One read of one source, awaited by everybody who wants the same bytes meanwhile."""

    def __init__(self) -> None:
        self.models: set[ModelId] = set()
        self.listeners: list[Progress] = []
        self.landed = threading.Event()
        self.error: BaseException | None = None

    def report(self, num_done: int, num_bytes: int) -> None:
        for listener in tuple(self.listeners):
            listener(num_done, num_bytes)

    def wait(self) -> None:
        """Returns when the bytes are there; raises what the reader raised."""
        self.landed.wait()
        if isinstance(self.error, FlashServeError):
            raise error_from_code(self.error.code, self.error.message)
        if self.error is not None:
            raise InternalError(f"reading the checkpoint failed: {self.error!r}")
