"""What is told of a model in the store: where it is, and who keeps it there."""

from __future__ import annotations

import dataclasses
import threading
from types import TracebackType

from flashserve.store.arrival import Arrival
from flashserve.store.images import Image
from flashserve.store.shelf import Shelf
from flashserve.types import ModelId, Tier


@dataclasses.dataclass(frozen=True, slots=True)
class Residence:
    """Where a model is, and what it takes there, alone or with others."""

    tier: Tier
    dram_bytes: int
    disk_bytes: int
    num_leases: int


class Lease:
    """Keeps a model's bytes where they are until it is released. A context manager.

    extents are the places of its files, (offset, bytes). `arrival` says which of them are there.
    """

    def __init__(self, shelf: Shelf, image: Image, model_id: ModelId, arrival: Arrival) -> None:
        self.model_id = model_id
        self.snapshot = image.snapshot
        self.extents = image.extents()
        self.num_bytes = image.num_bytes
        self.tensors = image.tensors()
        self.arrival = arrival
        self._shelf = shelf
        self._image: Image | None = image
        self._lock = threading.Lock()

    @property
    def offset(self) -> int:
        """Of the first extent."""
        return min(offset for offset, _ in self.extents)

    def release(self) -> None:
        """Ends the lease; more than once does no harm."""
        with self._lock:
            image, self._image = self._image, None
        if image is not None:
            self._shelf.release(image, self.model_id)

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()
