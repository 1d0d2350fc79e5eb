"""Copies on disk of remote checkpoints: made behind their loads, out of what is in DRAM."""

from __future__ import annotations

import collections
import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

from flashserve.errors import FlashServeError, UnavailableError
from flashserve.store.arrival import Arrival
from flashserve.store.behind import WriteBehind
from flashserve.store.disk.incoming import Incoming
from flashserve.store.dram.arena import Arena
from flashserve.store.images import Claimant, FileImage, Image
from flashserve.store.origin import Origin, Origins
from flashserve.store.shelf import Shelf
from flashserve.types import ModelId

_log = logging.getLogger(__name__)

OnDisk = Callable[[ModelId, int, float], None]


class DiskCopy:
    """One checkpoint on its way from DRAM to disk. A disk that fails ends it, and nothing else."""

    def __init__(
        self,
        incoming: Incoming,
        writer: WriteBehind,
        files: Mapping[str, FileImage | None],
    ) -> None:
        """Args:
        files: its weights by name, pinned until the writer has ended; None for one that has gone.
        """
        self.incoming = incoming
        self._writer = writer
        self.files = files
        self._written: dict[str, dict[int, int]] = {}
        self._is_given_up = False

    def written(self, name: str) -> dict[int, int]:
        """Checksums by index of the chunks that are on disk, or on their way there. Who finds one
        damaged takes it out, and so has it written again.
        """
        if name not in self._written:
            try:
                self._written[name] = self.incoming.done(name)
            except FlashServeError as error:
                self._written[name] = {}
                self._give_up(error)
        return self._written[name]

    def put(self, name: str, index: int, data: memoryview, checksum: int) -> bool:
        """Has a chunk written that is in its place in DRAM, unless it is written already."""
        written = self.written(name)
        if written.get(index) == checksum:
            return False
        written[index] = checksum
        self._writer.put(name, index, data, checksum)
        return True

    def finish(self, arena: Arena) -> None:
        """Adds what was in DRAM before, or is brought there by somebody else's load, and returns
        when everything is on disk, or writing has ended otherwise.
        """
        is_whole = False
        try:
            is_whole = all(self._add(name, file, arena) for name, file in self.files.items())
        except FlashServeError as error:
            self._give_up(error)
        finally:
            self._writer.end(is_whole=is_whole and not self._is_given_up)
            self._writer.join()

    def interrupt(self, *, at_once: bool) -> None:
        """The rest will not come; what came is written, unless at once, and can be resumed."""
        if at_once:
            self._writer.stop()
        self._writer.end(is_whole=False)
        self._writer.join()

    def _add(self, name: str, file: FileImage | None, arena: Arena) -> bool:
        if file is None:
            return False
        _wait_landed(file)
        with arena.memory(file.extent) as memory:
            for index, checksum in enumerate(file.checksums):
                with file.chunk(memory, index) as data:
                    self.put(name, index, data, checksum)
        return True

    def _give_up(self, error: FlashServeError) -> None:
        if not self._is_given_up:
            self._is_given_up = True
            self._writer.give_up(error)


class Keeper:
    """The copies that are being made."""

    def __init__(self, shelf: Shelf, origins: Origins, on_disk: OnDisk) -> None:
        """on_disk: told of a model that has come to disk, its bytes, and what that took."""
        self._shelf = shelf
        self._origins = origins
        self._on_disk = on_disk
        # By the identity of what is on its way to disk. Told when one ends.
        self._writing: dict[str, WriteBehind | None] = {}
        self._fetching: set[str] = set()
        self._pinned: collections.Counter[FileImage] = collections.Counter()
        self._changed = threading.Condition()
        self._is_closed = False

    def close(self) -> None:
        """Writes no more, and returns when nobody looks at any memory; no load runs any more."""
        with self._changed:
            self._is_closed = True
            for writer in self._writing.values():
                if writer:
                    writer.stop()
            self._changed.wait_for(lambda: not self._writing)

    def begin(self, claimant: Claimant) -> DiskCopy | None:
        """Starts to write a remote checkpoint to disk; None where it is there, or cannot be."""
        origin = claimant.origin
        identity, began = origin.listing.identity, time.monotonic()
        with self._changed:
            if not origin.is_remote or self._is_busy(identity) or self._is_closed:
                return None
            self._writing[identity] = None
        files: dict[str, FileImage | None] = {}
        incoming: Incoming | None = None
        writer: WriteBehind | None = None

        def ended(is_on_disk: bool) -> None:
            self._ended(identity, filter(None, files.values()))
            if is_on_disk:
                num_bytes = sum(file.num_bytes for file in origin.listing.files)
                self._on_disk(claimant.model_id, num_bytes, time.monotonic() - began)

        try:
            incoming = self._origins.begin(origin)
            if incoming is not None:
                files = self._pin(claimant.image)
                writer = WriteBehind(origin.listing.uri, incoming, ended)
        except FlashServeError as error:
            _log.warning("%s is not kept on disk: %s", origin.listing.uri, error.message)
        finally:
            if writer is None:
                self._ended(identity, filter(None, files.values()))
        if incoming is None or writer is None:
            return None
        self._began(identity, writer)
        return DiskCopy(incoming, writer, files)

    @contextlib.contextmanager
    def fetching(self, origin: Origin, stopping: threading.Event) -> Iterator[Incoming | None]:
        """A place on disk for a remote checkpoint, when nobody else writes it any more; None where
        it is there by then.

        Raises:
            UnavailableError: the disk has no room, or is not available.
        """
        identity, disk = origin.listing.identity, self._origins.disk
        with self._changed:
            self._changed.wait_for(lambda: not self._is_busy(identity) or stopping.is_set())
            if disk is None or stopping.is_set():
                raise UnavailableError("the disk tier is not available to this process")
            self._fetching.add(identity)
        try:
            if disk.find(identity):
                yield None
                return
            incoming = self._origins.begin(origin)
            if incoming is None:
                raise UnavailableError(f"{origin.listing.uri} is being written by somebody else")
            with contextlib.closing(incoming):
                yield incoming
        finally:
            with self._changed:
                self._fetching.discard(identity)
                self._changed.notify_all()

    def wait(self, files: Iterable[FileImage]) -> None:
        """Returns when none of the files is kept in DRAM only to be written to disk."""
        wanted = set(files)
        with self._changed:
            self._changed.wait_for(lambda: not any(self._pinned[file] for file in wanted))

    def _is_busy(self, identity: str) -> bool:
        return identity in self._writing or identity in self._fetching

    def _pin(self, image: Image) -> dict[str, FileImage | None]:
        """The files of an image as its own listing names them, those that have gone as None."""
        names = (file.name for file in image.snapshot.layout.files)
        files = {
            name: file if self._shelf.try_pin(file) else None
            for name, file in zip(names, image.files, strict=True)
        }
        with self._changed:
            self._pinned.update(filter(None, files.values()))
        return files

    def _began(self, identity: str, writer: WriteBehind) -> None:
        with self._changed:
            self._writing[identity] = writer
            if self._is_closed:
                writer.stop()

    def _ended(self, identity: str, files: Iterable[FileImage]) -> None:
        pinned = tuple(files)
        for file in pinned:
            self._shelf.unpin(file)
        with self._changed:
            del self._writing[identity]
            self._pinned.subtract(pinned)
            self._changed.notify_all()


def _wait_landed(file: FileImage) -> None:
    """Raises FlashServeError when the file will not come."""
    num_events = file.file.num_chunks + 1
    arrival = Arrival([num_events])
    file.watch(arrival, (0,) * num_events)
    arrival.wait()
