"""What the store keeps count of: files in DRAM, models made of them, reads that bring them."""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Iterable

from flashserve.errors import CheckpointError
from flashserve.store.arrival import Arrival, StageReport
from flashserve.store.checkpoint.listing import CHUNK_BYTES, SourceFile
from flashserve.store.checkpoint.order import ChunkPlace, chunk_order
from flashserve.store.checkpoint.order import groups as groups_of
from flashserve.store.checkpoint.snapshot import Snapshot
from flashserve.store.dram.arena import Extent
from flashserve.store.origin import Origin
from flashserve.types import ModelId, TensorSlice


class FileImage:
    """One file of a checkpoint, in DRAM or on its way there; models that have it share it.

    num_users are the models' images, and the work, that need the bytes; num_leases are those who
    need them to stay in place. Both are written under the shelf's lock only. is_fetched: its bytes
    come from far away.
    """

    def __init__(
        self, file: SourceFile, path: str, extent: Extent, *, is_fetched: bool = False
    ) -> None:
        self.file = file
        self.path = path
        self.extent = extent
        self.is_fetched = is_fetched
        self.num_users = 0
        self.num_leases = 0
        self.is_whole = False
        self.digest: str | None = None
        self._checksums: dict[int, int] = {}
        self._watchers: list[tuple[Arrival, tuple[int, ...]]] = []
        self._has_landed = False
        self._error: BaseException | None = None
        self._lock = threading.Lock()

    @property
    def checksums(self) -> tuple[int, ...]:
        """Of all chunks, in order; of a whole file only."""
        return tuple(self._checksums[index] for index in range(self.file.num_chunks))

    def has(self, index: int) -> bool:
        """Whether a chunk is in place, and verified."""
        return index in self._checksums

    def chunk_bytes(self, index: int) -> int:
        return self.file.chunk_bytes(index)

    def chunk(self, memory: memoryview, index: int) -> memoryview:
        """The bytes of one chunk; `memory` is the extent's."""
        begin = index * CHUNK_BYTES
        return memory[begin : begin + self.chunk_bytes(index)]

    def watch(self, arrival: Arrival, groups: tuple[int, ...]) -> None:
        """Tells `arrival` of every chunk that is there or comes, and then of the landing, or that
        the rest will not come.

        groups: for each chunk the first group that needs it, and at last the one that waits for
        the landing.
        """
        with self._lock:
            self._watchers.append((arrival, groups))
            done, has_landed, error = tuple(self._checksums), self._has_landed, self._error
        if error is not None:
            arrival.fail(error)
            return
        for index in done:
            arrival.add(groups[index], self.chunk_bytes(index))
        if has_landed:
            arrival.add(groups[-1], 0)

    def chunk_done(self, index: int, checksum: int) -> None:
        """A verified chunk is in place, for the first time or again. Called by reading threads,
        without the shelf's lock.

        Raises:
            CheckpointError: it was there before, with other bytes.
        """
        with self._lock:
            is_new = index not in self._checksums
            before = self._checksums.setdefault(index, checksum)
            watchers = tuple(self._watchers) if is_new else ()
        if before != checksum:
            begin = index * CHUNK_BYTES
            raise CheckpointError(
                f"{self.path} is not what another model that has it read before, between its bytes "
                f"{begin} and {begin + self.chunk_bytes(index)}"
            )
        for arrival, groups in watchers:
            arrival.add(groups[index], self.chunk_bytes(index))

    def land(self) -> None:
        """All chunks are in place, and belong together. Called without the shelf's lock."""
        with self._lock:
            self._has_landed = True
            watchers, self._watchers = self._watchers, []
        for arrival, groups in watchers:
            arrival.add(groups[-1], 0)

    def fail(self, error: BaseException) -> None:
        """The rest will not come. Called without the shelf's lock."""
        with self._lock:
            self._error = error
            watchers, self._watchers = self._watchers, []
        for arrival, _ in watchers:
            arrival.fail(error)


@dataclasses.dataclass(slots=True, eq=False)
class Image:
    """A model's bytes: its snapshot and its files. It lives while a model names it or anybody
    leases it.
    """

    identity: str
    snapshot: Snapshot
    files: tuple[FileImage, ...]
    order: tuple[ChunkPlace, ...]
    num_groups: int
    models: set[ModelId] = dataclasses.field(default_factory=set)
    leases: collections.Counter[ModelId] = dataclasses.field(default_factory=collections.Counter)

    @classmethod
    def make(cls, snapshot: Snapshot, files: tuple[FileImage, ...]) -> Image:
        num_groups = len(groups_of(tensor.name for tensor in snapshot.layout.tensors))
        return cls(snapshot.identity, snapshot, files, chunk_order(snapshot.layout), num_groups)

    @property
    def is_whole(self) -> bool:
        return all(file.is_whole for file in self.files)

    @property
    def is_fetched(self) -> bool:
        """Whether bytes that it lacks come from far away."""
        return any(file.is_fetched and not file.is_whole for file in self.files)

    @property
    def num_bytes(self) -> int:
        """Of the arena."""
        return sum(file.extent.num_bytes for file in self.files)

    def extents(self) -> tuple[tuple[int, int], ...]:
        """Offset and bytes of each file's place in the arena just now."""
        return tuple((file.extent.offset, file.extent.num_bytes) for file in self.files)

    def tensors(self) -> tuple[TensorSlice, ...]:
        """Where the tensors lie in the arena just now."""
        return tuple(
            TensorSlice(
                tensor.name,
                tensor.dtype,
                tensor.shape,
                self.files[tensor.file_index].extent.offset + tensor.begin,
                tensor.end - tensor.begin,
            )
            for tensor in self.snapshot.layout.tensors
        )

    def arrived(self) -> Arrival:
        """Of an image that is whole."""
        return Arrival([0] * self.num_groups)

    def arrival(self, report: Callable[[float], StageReport]) -> Arrival:
        """Follows all chunks of all files from now on; `report` as for Arrival."""
        pending = [0] * self.num_groups
        group_of = [[0] * file.file.num_chunks for file in self.files]
        for place in self.order:
            pending[place.group] += 1
            group_of[place.file_index][place.index] = place.group
        pending[-1] += len(self.files)
        arrival = Arrival(
            pending,
            num_bytes=self.snapshot.size_bytes,
            report=report,
            is_fetched=self.is_fetched,
        )
        for file, of_chunks in zip(self.files, group_of, strict=True):
            file.watch(arrival, (*of_chunks, self.num_groups - 1))
        return arrival


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Claimant:
    """A model that needs files, and the origin that it would have them from."""

    model_id: ModelId
    image: Image
    origin: Origin

    def source_file(self, file: FileImage) -> SourceFile:
        """One of the image's files, as its own origin calls it."""
        files = self.origin.listing.files
        return next(each for each in files if each.identity == file.file.identity)


class Fill:
    """One read that brings new files into DRAM. `order` names them by index.

    heirs are those who wait for some of the files, and would read them from another place if this
    read fails; they change under the shelf's lock. tried are the sources that have failed.
    """

    def __init__(
        self,
        claimant: Claimant,
        files: tuple[FileImage, ...],
        order: tuple[tuple[int, int], ...],
        heirs: Iterable[Claimant] = (),
        tried: frozenset[str] = frozenset(),
    ) -> None:
        self.claimant = claimant
        self.files = files
        self.order = order
        self.heirs = list(heirs)
        self.tried = tried
        self.stopping = threading.Event()
        self.ended = threading.Event()

    @property
    def num_bytes(self) -> int:
        return sum(file.file.num_bytes for file in self.files)
