"""Carries out reads: origin to DRAM, disk behind, each in a thread of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
from collections.abc import Callable, Iterable, Sequence

from flashserve.config import StoreSettings
from flashserve.errors import CheckpointError, FlashServeError, SourceError, UnavailableError
from flashserve.store.checkpoint.files import is_small
from flashserve.store.checkpoint.listing import SourceFile
from flashserve.store.dram.arena import Arena
from flashserve.store.images import Claimant, FileImage, Fill
from flashserve.store.keeping import DiskCopy, Keeper, OnDisk
from flashserve.store.mending import Mender
from flashserve.store.origin import Origin, Origins
from flashserve.store.pipeline import FileLoad, load
from flashserve.store.proof import Proof
from flashserve.store.shelf import Shelf
from flashserve.store.transfers import Transfer, Transfers
from flashserve.types import ModelId, Tier

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class _Reading:
    """A file that a fill brings, as the fill's own source calls it.

    unproved are checksums of chunks that nobody may use before the whole file is proved; damaged
    are chunks that were damaged on disk, and came from the source.
    """

    file: FileImage
    source: SourceFile
    unproved: dict[int, int] = dataclasses.field(default_factory=dict)
    damaged: set[int] = dataclasses.field(default_factory=set)


class Filler:
    """Reads that run, and what follows them: copies on disk, their repair, proofs.

    Args:
        on_disk: told of a model that has come to disk, its bytes, and what that took.
        left_disk: told of a model whose copy on disk is damaged for good.
    """

    def __init__(
        self,
        shelf: Shelf,
        arena: Arena,
        origins: Origins,
        proof: Proof,
        settings: StoreSettings,
        on_disk: OnDisk,
        left_disk: Callable[[ModelId], None],
    ) -> None:
        self._shelf = shelf
        self._arena = arena
        self._origins = origins
        self._proof = proof
        self.transfers = Transfers()
        self._keeper = Keeper(shelf, origins, on_disk)
        self._mender = Mender(shelf, origins, settings, left_disk)

    def close(self) -> None:
        """Ends reads under way, lets the shelf begin no other, and writes no more."""
        for fill in self._shelf.close():
            fill.ended.wait()
        self._keeper.close()
        self._mender.close()

    def start(self, claimant: Claimant, fill: Fill | None) -> None:
        """Begins what is to be done for an image that was claimed, and returns.

        fill: what must be read for it; None when everything is there, or on its way.
        """
        if fill is not None:
            self._start(lambda: self._run(fill))
        elif claimant.origin.is_fetched:
            self._start(lambda: self._keep(claimant))

    def _start(self, run: Callable[[], None]) -> None:
        threading.Thread(target=run, name="store-fill", daemon=True).start()

    def fetch(self, origin: Origin, model_id: ModelId, stopping: threading.Event) -> int:
        """Brings a remote checkpoint to disk, unless it is there; how many bytes it has then.

        Raises:
            FlashServeError: it cannot be fetched or written.
        """
        if not origin.is_fetched:
            return 0
        weights = (file for file in origin.listing.files if not is_small(file.name))
        num_bytes = sum(file.num_bytes for file in weights)
        transfer = Transfer(origin.listing.uri, model_id, Tier.REMOTE, Tier.DISK, num_bytes)
        with self._keeper.fetching(origin, stopping) as incoming:
            if incoming is None:
                return 0
            with self.transfers.running(transfer):
                self._origins.fetch(origin, incoming, stopping, transfer)
        return sum(file.num_bytes for file in origin.listing.files)

    def wait_left(self, files: Iterable[FileImage]) -> None:
        """Returns when nobody reads or writes any more what was evicted: reads that were stopped
        with it have ended, and nothing is done to the copies of the files on disk.
        """
        wanted = set(files)
        for fill in self._shelf.fills(wanted):
            if fill.stopping.is_set():
                fill.ended.wait()
        self._keeper.wait(wanted)
        self._mender.wait(wanted)
        self._shelf.wait_unpinned(wanted)

    def _run(self, fill: Fill) -> None:
        copy = None
        readings = [_Reading(file, fill.claimant.source_file(file)) for file in fill.files]
        try:
            copy = self._keeper.begin(fill.claimant)
            self._read(fill, copy, readings)
        except FlashServeError as error:
            self._failed(fill, copy, error)
        except BaseException as error:
            _log.exception("reading %s failed", fill.claimant.origin.listing.uri)
            self._failed(fill, copy, error)
        else:
            self._landed(fill, copy, readings)

    def _landed(self, fill: Fill, copy: DiskCopy | None, readings: Sequence[_Reading]) -> None:
        claimant = fill.claimant
        self._shelf.landed(fill)
        for each in readings:
            self._mender.submit(
                claimant.origin, each.file, each.source.name, each.damaged, claimant.model_id
            )
        for file in fill.files:
            file.land()
        fill.ended.set()
        self._finish(claimant, copy, readings)

    def _failed(self, fill: Fill, copy: DiskCopy | None, error: BaseException) -> None:
        """Others who need the files go on with them, each from its own source."""
        if copy:
            copy.interrupt(at_once=fill.stopping.is_set())
        is_damaged = not isinstance(error, SourceError | UnavailableError)
        successors = self._shelf.failed(fill, is_damaged=is_damaged)
        for each in successors:
            _log.warning(
                "%s goes on from %s: %s",
                ", ".join(file.path for file in each.files),
                each.claimant.origin.listing.uri,
                error,
            )
        kept = {file for each in successors for file in each.files}
        for file in fill.files:
            if file not in kept:
                file.fail(error)
        fill.ended.set()
        for each in successors:
            self.start(each.claimant, each)

    def _keep(self, claimant: Claimant) -> None:
        """Makes the copy on disk of a checkpoint of which everything was in DRAM."""
        self._finish(claimant, self._keeper.begin(claimant), ())

    def _finish(
        self, claimant: Claimant, copy: DiskCopy | None, readings: Iterable[_Reading]
    ) -> None:
        """Completes the copy on disk; only then are files proved, those that were read and those
        that are shared, as a copy of what turns out to be damaged must be found there.
        """
        to_prove = {each.file: each.source.name for each in readings}
        if copy is not None:
            copy.finish(self._arena)
            to_prove |= {file: name for name, file in copy.files.items() if file}
        for file, name in to_prove.items():
            self._proof.submit(claimant.origin, file, name)

    def _read(self, fill: Fill, copy: DiskCopy | None, readings: Sequence[_Reading]) -> None:
        origin, model_id = fill.claimant.origin, fill.claimant.model_id
        from_tier = Tier.REMOTE if origin.is_fetched else Tier.DISK
        transfer = Transfer(origin.listing.uri, model_id, from_tier, Tier.DRAM, fill.num_bytes)
        with (
            self._origins.pinned(origin),
            self.transfers.running(transfer),
            contextlib.ExitStack() as stack,
        ):
            loads = [self._load(origin, each, copy, transfer, stack) for each in readings]
            threads = max((each.reader.preferred_threads for each in loads), default=1)
            load(loads, fill.order, num_threads=threads, stopping=fill.stopping)
            self._check_unchanged(origin)
            for each, loaded in zip(readings, loads, strict=True):
                if self._proof.comes_first(origin, each.file):
                    self._prove(origin, each, loaded, fill.stopping, stack)
        if not origin.is_remote:
            for file in fill.files:
                self._origins.remember(file.file, file.checksums)

    def _load(
        self,
        origin: Origin,
        reading: _Reading,
        copy: DiskCopy | None,
        transfer: Transfer,
        stack: contextlib.ExitStack,
    ) -> FileLoad:
        file, name = reading.file, reading.source.name
        memory = stack.enter_context(self._arena.memory(file.extent))
        is_open = not self._proof.comes_first(origin, file)

        def on_chunk(index: int, data: memoryview, checksum: int) -> None:
            if copy is None or copy.put(name, index, data, checksum):
                transfer.read(len(data))
            else:
                transfer.found(len(data))
            if is_open:
                file.chunk_done(index, checksum)
            else:
                reading.unproved[index] = checksum

        return self._origins.file_load(
            origin,
            reading.source,
            memory,
            on_chunk,
            stack,
            resumed=(copy.incoming, copy.written(name)) if copy else None,
            on_damage=reading.damaged.add,
        )

    def _prove(
        self,
        origin: Origin,
        reading: _Reading,
        loaded: FileLoad,
        stopping: threading.Event,
        stack: contextlib.ExitStack,
    ) -> None:
        """Opens a file that was read, if it is what was promised; else reads it once more.

        Raises:
            CheckpointError: it still is not.
        """
        file = reading.file
        if difference := self._proof.mismatch(file):
            _log.warning("%s was damaged on its way here: %s; fetched again", file.path, difference)
            again = self._origins.file_load(
                origin, reading.source, loaded.memory, loaded.on_chunk, stack
            )
            order = [(0, index) for index in range(file.file.num_chunks)]
            num_threads = again.reader.preferred_threads
            load([again], order, num_threads=num_threads, stopping=stopping)
            if difference := self._proof.mismatch(file):
                raise CheckpointError(
                    f"{file.path} is damaged on its way here, twice: {difference}"
                )
        for index, checksum in reading.unproved.items():
            file.chunk_done(index, checksum)

    def _check_unchanged(self, origin: Origin) -> None:
        """Of files of this machine, which have no version that a read could insist on."""
        identity = origin.listing.identity
        if not origin.is_remote and origin.source.listing().identity != identity:
            raise CheckpointError(f"{origin.listing.uri} changed while it was read")
