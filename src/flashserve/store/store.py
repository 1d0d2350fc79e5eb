"""The node's checkpoints: brought into DRAM once, shared by every replica and every equal source.

Everything here blocks and is thread-safe; an asyncio caller uses asyncio.to_thread.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from pathlib import Path
from types import TracebackType

from flashserve.errors import (
    CheckpointError,
    ConflictError,
    InputError,
    ModelTooLargeError,
    SourceError,
    UnavailableError,
)
from flashserve.store import disk
from flashserve.store.disk import Progress
from flashserve.store.dram import Arena, ArenaUsage
from flashserve.store.files import DirectoryFiles
from flashserve.store.images import Flight, Image
from flashserve.store.local import DirectorySource, LocalSource
from flashserve.store.snapshot import Snapshot, read_snapshot
from flashserve.store.source import open_source
from flashserve.types import ModelId, ModelSpec, TensorSlice, Tier


@dataclasses.dataclass(frozen=True, slots=True)
class StageReport:
    """What a call of `stage` did itself: num_bytes is 0 for a hit, and for who waited for another.

    fetch_s: until the files were on this machine; dram_s: from there until they were in DRAM.
    """

    num_bytes: int = 0
    fetch_s: float = 0.0
    dram_s: float = 0.0


class Lease:
    """Keeps a model's bytes where they are until it is released. A context manager."""

    def __init__(self, store: Store, image: Image, model_id: ModelId) -> None:
        self.model_id = model_id
        self.snapshot = image.snapshot
        self.offset = image.extent.offset
        self.num_bytes = image.extent.num_bytes
        self.tensors = image.tensors()
        self._store = store
        self.image: Image | None = image  # None once released; written under the store's lock

    def release(self) -> None:
        """Ends the lease; more than once does no harm."""
        self._store._release(self)  # noqa: SLF001

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()


class Store:
    """Sources, snapshots and the DRAM arena of one node."""

    def __init__(self, data_dir: Path, dram_bytes: int, prefault: bool) -> None:
        """Makes an arena of `dram_bytes`, rounded down to whole 2 MiB.

        Raises:
            InputError: the arena cannot be made.
        """
        self.arena = Arena(dram_bytes, prefault=prefault)
        self._data_dir = data_dir
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        # By source identity: an image is entered whole, and leaves when its last model does.
        self._images: dict[str, Image] = {}
        self._flights: dict[str, Flight] = {}
        self._models: dict[ModelId, Image] = {}

    def close(self) -> None:
        """Ends reads under way, then gives all memory, threads and descriptors back."""
        with self._lock:
            self._stopping.set()
            flights = tuple(self._flights.values())
        for flight in flights:
            flight.landed.wait()
        self.arena.close()

    def inspect(self, uri: str) -> Snapshot:
        """Reads and checks a source that is to be served here; moves no weights.

        Raises:
            DeployError: it cannot be served; one line that says which file and why.
        """
        snapshot = _read_snapshot(_open_local(uri, self._data_dir))
        if snapshot.arena_bytes > self.arena.num_bytes:
            raise ModelTooLargeError(
                f"{snapshot.directory} holds {snapshot.size_bytes} bytes of weights and needs "
                f"{snapshot.arena_bytes} of memory; the arena has {self.arena.num_bytes}: raise "
                "node.dram_bytes"
            )
        return snapshot

    def stage(self, model: ModelSpec, tier: Tier, progress: Progress | None = None) -> StageReport:
        """Brings a model's bytes up to `tier`, DISK or DRAM, unless they are there.

        Calls for the same bytes share one read. A source that changed since it was last staged is
        read again; a replica that still leases the old bytes keeps them.

        Args:
            model: source and id; the id names the bytes from here on.
            tier: how near they shall be.
            progress: told bytes done and bytes in all, from another thread.

        Raises:
            SourceError, CheckpointError, UnsupportedModelError: the source cannot be read.
            ModelTooLargeError: the whole arena is too small.
            UnavailableError: the arena has no room now, or the store is closed.
        """
        if tier not in {Tier.DISK, Tier.DRAM}:
            raise InputError(f"a model is staged to disk or dram, not to {tier.label}")
        began = time.monotonic()
        source = _open_local(model.source, self._data_dir)
        source.directory()
        fetched = time.monotonic()
        if tier is Tier.DISK:
            return StageReport(fetch_s=fetched - began)
        identity = source.identity()
        with self._lock:
            self._check_open()
            if image := self._images.get(identity):
                self._attach(model.model_id, image)
                return StageReport()
            self._detach(model.model_id)
            flight, leads = self._flights.get(identity), False
            if flight is None:
                flight, leads = self._flights.setdefault(identity, Flight()), True
            flight.models.add(model.model_id)
            if progress:
                flight.listeners.append(progress)
        num_bytes = 0
        if leads:
            num_bytes = self._read(source, identity, flight)
        else:
            flight.wait()
        return StageReport(num_bytes, fetched - began, time.monotonic() - fetched)

    def lease(self, model_id: ModelId) -> Lease:
        """Keeps a staged model's bytes in place until the lease is released.

        Raises:
            ConflictError: the model is not in DRAM.
        """
        with self._lock:
            image = self._staged(model_id)
            self.arena.lease(image.extent)
            image.leases[model_id] += 1
            return Lease(self, image, model_id)

    def tensors(self, model_id: ModelId) -> tuple[TensorSlice, ...]:
        """Where each tensor lies in the arena; holds only as long as the model is leased.

        Raises:
            ConflictError: the model is not in DRAM.
        """
        with self._lock:
            return self._staged(model_id).tensors()

    def extent(self, model_id: ModelId) -> tuple[int, int]:
        """Offset and bytes of the model's memory; holds only as long as the model is leased.

        Raises:
            ConflictError: the model is not in DRAM.
        """
        with self._lock:
            extent = self._staged(model_id).extent
            return extent.offset, extent.num_bytes

    def snapshot(self, model_id: ModelId) -> Snapshot:
        """Config and layout as they were when the model's bytes were read.

        Raises:
            ConflictError: the model is not in DRAM.
        """
        with self._lock:
            return self._staged(model_id).snapshot

    def verify(self, model_id: ModelId) -> None:
        """Compares the bytes in DRAM with the checksums taken when they were read.

        Raises:
            CheckpointError: they differ; names the file and the place.
            ConflictError: the model is not in DRAM.
        """
        with self.lease(model_id):
            with self._lock:
                image = self._staged(model_id)
            layout = image.snapshot.layout
            with self.arena.memory(image.extent) as memory:
                for chunk, wanted in zip(disk.chunks(layout), image.checksums, strict=True):
                    with memory[chunk.offset : chunk.offset + chunk.num_bytes] as data:
                        found = disk.checksum(data)
                    if found != wanted:
                        path = image.snapshot.directory / layout.files[chunk.file_index].name
                        raise CheckpointError(
                            f"the copy of {path} in DRAM is damaged between its bytes "
                            f"{chunk.begin} and {chunk.begin + chunk.num_bytes}"
                        )

    def evict(self, model_id: ModelId, tier: Tier) -> int:
        """Takes a model out of `tier` and those above it; how many bytes that freed.

        Bytes that another model shares stay, and so do files: sources are not ours to remove.

        Raises:
            ConflictError: the model is leased, or is being staged.
        """
        if tier > Tier.DRAM:
            return 0
        with self._lock:
            if any(model_id in flight.models for flight in self._flights.values()):
                raise ConflictError(f"model {model_id} is being staged")
            image = self._models.get(model_id)
            if image and image.leases[model_id]:
                raise ConflictError(f"model {model_id} is in use")
            return self._detach(model_id)

    def forget(self, model_id: ModelId) -> None:
        """The model was deleted: its bytes go as soon as nobody leases or shares them."""
        with self._lock:
            for flight in self._flights.values():
                flight.models.discard(model_id)
            self._detach(model_id)

    def tier(self, model: ModelSpec) -> Tier:
        """The highest tier of the store that holds the model's bytes."""
        with self._lock:
            image = self._models.get(model.model_id)
        is_staged = image is not None and image.snapshot.uri == model.source
        return Tier.DRAM if is_staged else model.lowest_tier

    def usage(self) -> ArenaUsage:
        return self.arena.usage()

    def dram_bytes(self, model_id: ModelId) -> int:
        """Bytes of the arena that the model takes, alone or with others; 0 when it is not there."""
        with self._lock:
            image = self._models.get(model_id)
            return image.extent.num_bytes if image else 0

    def _read(self, source: LocalSource, identity: str, flight: Flight) -> int:
        """Reads a source into a new extent and publishes it; how many bytes that moved."""
        try:
            image = self._fill(source, identity, flight)
            self._publish(image, flight)
            return image.snapshot.size_bytes
        except BaseException as error:
            flight.error = error
            raise
        finally:
            with self._lock:
                del self._flights[identity]
            flight.landed.set()

    def _fill(self, source: LocalSource, identity: str, flight: Flight) -> Image:
        snapshot = _read_snapshot(source)
        extent = self.arena.allocate(snapshot.layout.image_bytes)
        try:
            with self.arena.memory(extent) as memory:
                checksums = disk.read_image(
                    snapshot.directory,
                    snapshot.layout,
                    memory,
                    stopping=self._stopping,
                    progress=flight.report,
                )
            if snapshot.identity != identity or source.identity() != identity:
                raise CheckpointError(f"{snapshot.directory} changed while it was read")
        except BaseException:
            self.arena.free(extent)
            raise
        self.arena.seal(extent)
        return Image(identity, snapshot, extent, checksums)

    def _publish(self, image: Image, flight: Flight) -> None:
        with self._lock:
            self._images[image.identity] = image
            for model_id in flight.models:
                self._attach(model_id, image)
            if not image.models:
                self._drop(image)
                raise ConflictError("the model was deleted while it was staged")

    def _attach(self, model_id: ModelId, image: Image) -> None:
        if self._models.get(model_id) is not image:
            self._detach(model_id)
            self._models[model_id] = image
            image.models.add(model_id)

    def _detach(self, model_id: ModelId) -> int:
        image = self._models.pop(model_id, None)
        if image is None:
            return 0
        image.models.discard(model_id)
        return self._drop(image)

    def _drop(self, image: Image) -> int:
        """Frees an image that no model names and nobody leases; how many bytes that freed."""
        if image.models or image.leases.total():
            return 0
        del self._images[image.identity]
        self.arena.free(image.extent)
        return image.extent.num_bytes

    def _release(self, lease: Lease) -> None:
        with self._lock:
            image, lease.image = lease.image, None
            if image is not None:
                self.arena.release(image.extent)
                image.leases[lease.model_id] -= 1
                self._drop(image)

    def _staged(self, model_id: ModelId) -> Image:
        self._check_open()
        image = self._models.get(model_id)
        if image is None:
            raise ConflictError(f"model {model_id} is not in DRAM")
        return image

    def _check_open(self) -> None:
        if self._stopping.is_set():
            raise UnavailableError("the store is closed")


def _read_snapshot(source: LocalSource) -> Snapshot:
    files = DirectoryFiles(source.directory())
    return read_snapshot(files, source.uri, source.identity())


def _open_local(uri: str, data_dir: Path) -> LocalSource:
    source = open_source(uri, data_dir)
    if not isinstance(source, DirectorySource):
        raise SourceError(f"source {uri} is remote, which is not available in this version")
    return source
