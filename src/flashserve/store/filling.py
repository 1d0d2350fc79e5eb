"""Carries out reads: origin to DRAM, disk behind, each in a thread of its own."""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable

from flashserve.errors import CheckpointError, FlashServeError, UnavailableError
from flashserve.store.behind import WriteBehind
from flashserve.store.checkpoint.files import is_small
from flashserve.store.disk.incoming import Incoming
from flashserve.store.dram.arena import Arena
from flashserve.store.images import FileImage, Fill, Image
from flashserve.store.origin import Origin, Origins
from flashserve.store.pipeline import FileLoad, checksum, load
from flashserve.store.proof import Proof
from flashserve.store.shelf import Shelf
from flashserve.store.transfers import Transfer, Transfers
from flashserve.types import ModelId, Tier

_log = logging.getLogger(__name__)

OnDisk = Callable[[ModelId, int, float], None]


class Filler:
    """Reads that run, and checkpoints that are written behind them.

    Args:
        on_disk: told of a model that has come to disk, its bytes, and what that took.
    """

    def __init__(
        self,
        shelf: Shelf,
        arena: Arena,
        origins: Origins,
        proof: Proof,
        on_disk: OnDisk,
    ) -> None:
        self._shelf = shelf
        self._arena = arena
        self._origins = origins
        self._proof = proof
        self._on_disk = on_disk
        self.transfers = Transfers()
        # By the identity of what is on its way to disk. Told when one ends.
        self._writing: dict[str, WriteBehind | None] = {}
        self._pinned: collections.Counter[FileImage] = collections.Counter()
        self._changed = threading.Condition()

    def close(self) -> None:
        """Writes no more; call it when no fill runs any more."""
        with self._changed:
            behind = [each for each in self._writing.values() if each]
        for each in behind:
            each.stop()
        for each in behind:
            each.join()

    def start(self, origin: Origin, image: Image, fill: Fill, model_id: ModelId) -> None:
        """Begins a fill that was claimed, and returns."""
        run = lambda: self._run(origin, image, fill, model_id)  # noqa: E731
        threading.Thread(target=run, name="store-fill", daemon=True).start()

    def fetch(self, origin: Origin, model_id: ModelId, stopping: threading.Event) -> int:
        """Brings a remote checkpoint to disk, unless it is there; how many bytes it has then.

        Raises:
            FlashServeError: it cannot be fetched or written.
        """
        if not origin.is_remote or origin.stored is not None:
            return 0
        identity = origin.listing.identity
        with self._changed:
            self._changed.wait_for(lambda: identity not in self._writing or stopping.is_set())
            if self._origins.disk is None or stopping.is_set():
                raise UnavailableError("the disk tier is not available to this process")
            if self._origins.disk.find(identity):
                return 0
            self._writing[identity] = None
        try:
            incoming = self._origins.begin(origin)
            if incoming is None:
                raise UnavailableError(f"{origin.listing.uri} is being written by somebody else")
            weights = (file for file in origin.listing.files if not is_small(file.name))
            num_bytes = sum(file.num_bytes for file in weights)
            transfer = Transfer(origin.listing.uri, model_id, Tier.REMOTE, Tier.DISK, num_bytes)
            with contextlib.closing(incoming), self.transfers.running(transfer):
                self._origins.fetch(origin, incoming, stopping, transfer)
        finally:
            self._written(identity)
        return sum(file.num_bytes for file in origin.listing.files)

    def wait_written(self, files: Iterable[FileImage]) -> None:
        """Returns when none of the files is kept in DRAM only to be written to disk."""
        wanted = set(files)
        with self._changed:
            self._changed.wait_for(lambda: not any(self._pinned[file] for file in wanted))

    def _run(self, origin: Origin, image: Image, fill: Fill, model_id: ModelId) -> None:
        error: BaseException | None = None
        writer = None
        try:
            writer = self._read(origin, image, fill, model_id)
        except FlashServeError as failure:
            error = failure
        except BaseException as failure:
            _log.exception("reading %s failed", origin.listing.uri)
            error = failure
        if error is None:
            self._shelf.landed(fill)
            for file in fill.files:
                file.land()
        else:
            self._shelf.failed(fill)
            for file in fill.files:
                file.fail(error)
        fill.ended.set()
        if error is None:
            if writer is not None:
                writer.join()  # a copy on disk that turns out to be damaged must be found there
            for file in fill.files:
                self._proof.submit(origin, file)

    def _read(
        self, origin: Origin, image: Image, fill: Fill, model_id: ModelId
    ) -> WriteBehind | None:
        """Who writes to disk behind, if anybody."""
        behind = self._write_behind(origin, fill, model_id)
        is_whole = False
        from_tier = Tier.REMOTE if origin.is_fetched else Tier.DISK
        transfer = Transfer(origin.listing.uri, model_id, from_tier, Tier.DRAM, fill.num_bytes)
        try:
            with (
                self._origins.pinned(origin),
                self.transfers.running(transfer),
                contextlib.ExitStack() as stack,
            ):
                loads = [self._load(origin, file, behind, transfer, stack) for file in fill.files]
                threads = max((each.reader.preferred_threads for each in loads), default=1)
                load(loads, fill.order, num_threads=threads, stopping=fill.stopping)
                self._check_unchanged(origin)
                for number, file in enumerate(fill.files):
                    if self._proof.comes_first(origin, file):
                        self._prove(origin, file, loads[number], fill.stopping, stack)
            if not origin.is_remote:
                for file in fill.files:
                    self._origins.remember(file.file, file.checksums)
            is_whole = set(image.files) <= set(fill.files)
        finally:
            if behind:
                self._end_writing(behind[1], fill, is_whole=is_whole)
        return behind[1] if behind else None

    def _end_writing(self, writer: WriteBehind, fill: Fill, *, is_whole: bool) -> None:
        """What came of a read that failed is written to the end, so that it can be resumed."""
        if fill.stopping.is_set():
            writer.stop()
        writer.end(is_whole=is_whole)
        if not is_whole:
            writer.join()

    def _load(
        self,
        origin: Origin,
        file: FileImage,
        behind: tuple[Incoming, WriteBehind] | None,
        transfer: Transfer,
        stack: contextlib.ExitStack,
    ) -> FileLoad:
        incoming, writer = behind or (None, None)
        memory = stack.enter_context(self._arena.memory(file.extent))
        written = incoming.done(file.file.name) if incoming else {}
        is_open = not self._proof.comes_first(origin, file)

        def on_chunk(index: int, data: memoryview, checksum: int) -> None:
            if writer and written.get(index) != checksum:
                writer.put(file.file.name, index, data, checksum)
                written[index] = checksum
                transfer.read(len(data))
            elif writer:
                transfer.found(len(data))
            else:
                transfer.read(len(data))
            if is_open:
                file.chunk_done(index, checksum)

        return self._origins.file_load(origin, file.file, memory, on_chunk, incoming, stack)

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
                origin, file.file, loaded.memory, loaded.on_chunk, None, stack
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

    def _write_behind(
        self, origin: Origin, fill: Fill, model_id: ModelId
    ) -> tuple[Incoming, WriteBehind] | None:
        """Starts to write a remote checkpoint to disk; None where it is there, or cannot be."""
        identity, began = origin.listing.identity, time.monotonic()
        with self._changed:
            if not origin.is_remote or identity in self._writing:
                return None
            self._writing[identity] = None
        incoming = None
        try:
            incoming = self._origins.begin(origin)
        except FlashServeError as error:
            _log.warning("%s is not kept on disk: %s", origin.listing.uri, error.message)
        if incoming is None:
            self._written(identity)
            return None

        def ended(is_on_disk: bool) -> None:
            for file in fill.files:
                self._shelf.unpin(file)
            self._written(identity, fill.files)
            if is_on_disk:
                num_bytes = sum(file.num_bytes for file in origin.listing.files)
                self._on_disk(model_id, num_bytes, time.monotonic() - began)

        for file in fill.files:
            self._shelf.pin(file)
        with self._changed:
            self._pinned.update(fill.files)
            writer = WriteBehind(origin.listing.uri, incoming, ended)
            self._writing[identity] = writer
        return incoming, writer

    def _written(self, identity: str, files: Iterable[FileImage] = ()) -> None:
        with self._changed:
            del self._writing[identity]
            self._pinned.subtract(files)
            self._changed.notify_all()
