"""Carries out reads: origin to DRAM, disk behind, each in a thread of its own."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterable

from flashserve.config import StoreSettings
from flashserve.errors import CheckpointError, FlashServeError
from flashserve.store.checkpoint.files import is_small
from flashserve.store.dram.arena import Arena
from flashserve.store.images import FileImage, Fill, Image
from flashserve.store.keeping import DiskCopy, Keeper, OnDisk
from flashserve.store.mending import Mender
from flashserve.store.origin import Origin, Origins
from flashserve.store.pipeline import FileLoad, checksum, load
from flashserve.store.proof import Proof
from flashserve.store.shelf import Shelf
from flashserve.store.transfers import Transfer, Transfers
from flashserve.types import ModelId, Tier

_log = logging.getLogger(__name__)


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
        """Writes no more; call it when no fill runs any more."""
        self._keeper.close()
        self._mender.close()

    def start(self, origin: Origin, image: Image, fill: Fill | None, model_id: ModelId) -> None:
        """Begins what is to be done for an image that was claimed, and returns."""
        if fill is not None:
            run = lambda: self._run(origin, image, fill, model_id)  # noqa: E731
        elif origin.is_fetched:
            run = lambda: self._keep(origin, image, model_id)  # noqa: E731
        else:
            return
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

    def wait_written(self, files: Iterable[FileImage]) -> None:
        """Returns when nothing is done to the copies of any of the files on disk."""
        wanted = set(files)
        self._keeper.wait(wanted)
        self._mender.wait(wanted)

    def _run(self, origin: Origin, image: Image, fill: Fill, model_id: ModelId) -> None:
        error: BaseException | None = None
        copy = None
        damaged: dict[FileImage, set[int]] = {file: set() for file in fill.files}
        try:
            copy = self._keeper.begin(origin, image, model_id)
            self._read(origin, fill, copy, damaged, model_id)
        except FlashServeError as failure:
            error = failure
        except BaseException as failure:
            _log.exception("reading %s failed", origin.listing.uri)
            error = failure
        if error is None:
            self._shelf.landed(fill)
            for file, chunks in damaged.items():
                self._mender.submit(origin, file, chunks, model_id)
            for file in fill.files:
                file.land()
        else:
            if copy:
                copy.interrupt(at_once=fill.stopping.is_set())
            self._shelf.failed(fill)
            for file in fill.files:
                file.fail(error)
            copy = None
        fill.ended.set()
        if error is None:
            self._finish(origin, copy, fill.files)

    def _keep(self, origin: Origin, image: Image, model_id: ModelId) -> None:
        """Makes the copy on disk of a checkpoint of which everything was in DRAM."""
        self._finish(origin, self._keeper.begin(origin, image, model_id), ())

    def _finish(self, origin: Origin, copy: DiskCopy | None, files: Iterable[FileImage]) -> None:
        """Completes the copy on disk; only then are files proved, those that were read and those
        that are shared, as a copy of what turns out to be damaged must be found there.
        """
        to_prove = {file: file.file.name for file in files}
        if copy is not None:
            copy.finish(self._arena)
            to_prove |= {file: name for name, file in copy.files.items() if file}
        for file, name in to_prove.items():
            self._proof.submit(origin, file, name)

    def _read(
        self,
        origin: Origin,
        fill: Fill,
        copy: DiskCopy | None,
        damaged: dict[FileImage, set[int]],
        model_id: ModelId,
    ) -> None:
        from_tier = Tier.REMOTE if origin.is_fetched else Tier.DISK
        transfer = Transfer(origin.listing.uri, model_id, from_tier, Tier.DRAM, fill.num_bytes)
        with (
            self._origins.pinned(origin),
            self.transfers.running(transfer),
            contextlib.ExitStack() as stack,
        ):
            loads = [
                self._load(origin, file, copy, damaged[file], transfer, stack)
                for file in fill.files
            ]
            threads = max((each.reader.preferred_threads for each in loads), default=1)
            load(loads, fill.order, num_threads=threads, stopping=fill.stopping)
            self._check_unchanged(origin)
            for number, file in enumerate(fill.files):
                if self._proof.comes_first(origin, file):
                    self._prove(origin, file, loads[number], fill.stopping, stack)
        if not origin.is_remote:
            for file in fill.files:
                self._origins.remember(file.file, file.checksums)

    def _load(
        self,
        origin: Origin,
        file: FileImage,
        copy: DiskCopy | None,
        damaged: set[int],
        transfer: Transfer,
        stack: contextlib.ExitStack,
    ) -> FileLoad:
        name = file.file.name
        memory = stack.enter_context(self._arena.memory(file.extent))
        is_open = not self._proof.comes_first(origin, file)

        def on_chunk(index: int, data: memoryview, checksum: int) -> None:
            if copy is None or copy.put(name, index, data, checksum):
                transfer.read(len(data))
            else:
                transfer.found(len(data))
            if is_open:
                file.chunk_done(index, checksum)

        return self._origins.file_load(
            origin,
            file.file,
            memory,
            on_chunk,
            stack,
            resumed=(copy.incoming, copy.written(name)) if copy else None,
            on_damage=damaged.add,
        )

    def _prove(
        self,
        origin: Origin,
        file: FileImage,
        loaded: FileLoad,
        stopping: threading.Event,
        stack: contextlib.ExitStack,
    ) -> None:
        """Opens a file that was read, if it is what was promised; else reads it once more.

        Raises:
            CheckpointError: it still is not.
        """
        if difference := self._proof.mismatch(file):
            _log.warning("%s was damaged on its way here: %s; fetched again", file.path, difference)
            again = self._origins.file_load(
                origin, file.file, loaded.memory, loaded.on_chunk, stack
            )
            order = [(0, index) for index in range(file.file.num_chunks)]
            num_threads = again.reader.preferred_threads
            load([again], order, num_threads=num_threads, stopping=stopping)
            if difference := self._proof.mismatch(file):
                raise CheckpointError(
                    f"{file.path} is damaged on its way here, twice: {difference}"
                )
        with self._arena.memory(file.extent) as memory:
            for index in range(file.file.num_chunks):
                with file.chunk(memory, index) as data:
                    file.chunk_done(index, checksum(data))

    def _check_unchanged(self, origin: Origin) -> None:
        """Of files of this machine, which have no version that a read could insist on."""
        identity = origin.listing.identity
        if not origin.is_remote and origin.source.listing().identity != identity:
            raise CheckpointError(f"{origin.listing.uri} changed while it was read")
