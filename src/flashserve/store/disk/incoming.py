"""A checkpoint on its way to disk: out of sight until it is whole, and resumable until then.

Beside the files, in `incoming/KEY`, lie `.NAME.part` (chunks as they come) and `.NAME.journal`
(which of them are there). `contents.settle` is the last step, and goes on where a crash cut it off.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import xxhash

from flashserve.errors import CheckpointError, ConflictError, InternalError
from flashserve.store.checkpoint.listing import CHUNK_BYTES, Listing, SourceFile
from flashserve.store.disk.chunks import ChunkWriter, chunk_bytes, good_chunks, pread_chunk
from flashserve.store.disk.contents import journal_name, part_name, settle
from flashserve.store.disk.folder import Folder, disk_errors
from flashserve.store.disk.journal import Journal
from flashserve.store.disk.manifest import Stored, write_manifest

_SYNC_BYTES = 256 << 20
"""So many bytes of a file may wait in the page cache before they are sent to the disk."""


class Incoming:
    """One checkpoint being written. Chunks may be written by several threads at once.

    Ended by `complete`, `abandon` or `close`; after that every call is a ConflictError, but
    `set_digest` goes on to the checkpoint on disk.
    """

    def __init__(
        self,
        root: Path,
        folder: Folder,
        listing: Listing,
        adopted: Mapping[str, tuple[int, ...]],
        *,
        publish: Callable[[Stored], Stored],
        release: Callable[[bool], None],
        set_digest: Callable[[str, str], None],
    ) -> None:
        """Owns `folder` from here on.

        adopted: chunk checksums of files in it that are another checkpoint's too: never written to.
        publish: makes the whole checkpoint visible; release: gives the place up, kept or not.
        """
        self.directory = folder.path
        self.listing = listing
        self._root = root
        self._folder = folder
        self._publish = publish
        self._release = release
        self._set_digest = set_digest
        self._lock = threading.RLock()
        self._idle = threading.Condition(self._lock)
        self._num_busy = 0
        self._files = {file.name: file for file in listing.files}
        self._adopted = adopted
        self._parts: dict[str, _Part] = {}
        self._digests: dict[str, str] = {}
        self._is_open = True

    def put(self, name: str, data: bytes) -> None:
        """Writes a small file whole; it can be read in `directory` at once.

        Raises:
            UnavailableError: the disk is full or fails.
            CheckpointError: the file is not listed with so many bytes.
        """
        file = self._file(name)
        if len(data) != file.num_bytes:
            raise CheckpointError(
                f"{name} has {len(data)} bytes, but was listed with {file.num_bytes}"
            )
        with self._lock, disk_errors(self._root):
            self._check_open()
            if old := self._parts.pop(name, None):
                old.close()
            for leftover in (part_name(name), journal_name(name)):
                self._folder.remove(leftover)
            self._folder.write(name, data, sync=False)
            part = self._part(name)
            for index in range(file.num_chunks):
                piece = data[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES]
                part.vouch(index, xxhash.xxh3_64_intdigest(piece))

    def done(self, name: str) -> dict[int, int]:
        """Checksums of the chunks that are on disk already, by index, compared with their bytes,
        but for a file that another checkpoint has too: that one is believed like any whole one.

        Raises:
            UnavailableError: the disk fails.
        """
        with disk_errors(self._root), self._using(name) as part:
            return dict(part.done)

    def read_chunk(self, name: str, index: int, target: memoryview) -> None:
        """Reads back a chunk that is done into `target`, which is as long as the chunk.

        Raises:
            CheckpointError: its bytes are no longer what they were; it is not done any more,
                unless the file is another checkpoint's too.
            UnavailableError: the disk fails.
        """
        with disk_errors(self._root), self._using(name) as part:
            wanted = part.done.get(index)
            if pread_chunk(part.fd, index, target) and xxhash.xxh3_64_intdigest(target) == wanted:
                return
            if not part.is_adopted:
                part.done.pop(index, None)
        raise CheckpointError(f"chunk {index} of {self.directory / name} is damaged on disk")

    def write_chunk(self, name: str, index: int, data: memoryview, checksum: int) -> None:
        """Writes a chunk, whose xxh3 is `checksum`, and then notes that it is there.

        Raises:
            UnavailableError: the disk is full or fails; what was written before can be resumed.
            CheckpointError: another checkpoint has the file too, with other bytes.
        """
        file = self._file(name)
        if not 0 <= index < file.num_chunks or len(data) != chunk_bytes(file, index):
            raise InternalError(f"chunk {index} of {name} cannot have {len(data)} bytes")
        with disk_errors(self._root), self._using(name) as part:
            if part.is_adopted:
                raise CheckpointError(
                    f"{self.directory / name} is another checkpoint's too, with other bytes"
                )
            part.write(index, data)
            part.vouch(index, checksum)

    def set_digest(self, name: str, digest: str) -> None:
        """The BLAKE3 (hex) of a whole file; after `complete` it goes to the checkpoint at once."""
        with self._lock:
            if self._is_open:
                self._digests[name] = digest
                return
        self._set_digest(name, digest)

    def complete(self) -> Stored:
        """Makes the checkpoint durable, then visible. Every chunk must have been written.

        Raises:
            ConflictError: chunks are missing; nothing is lost.
            UnavailableError: the disk is full or fails; the place can be resumed.
        """
        with self._lock, disk_errors(self._root):
            self._check_open()
            self._idle.wait_for(lambda: not self._num_busy)
            stored = Stored(
                self.directory,
                self.listing,
                {name: self._checksums(file) for name, file in self._files.items()},
                {},
            )
            for name in self._files:
                os.fsync(self._part(name).fd)
            write_manifest(self._folder, stored)
            settle(self._folder, stored)
            stored = self._publish(stored)
            self._end()
        for name, digest in self._digests.items():
            self._set_digest(name, digest)
        return stored

    def abandon(self, keep: bool) -> None:
        """Gives up: what is there waits to be resumed, or goes. After the end, does nothing."""
        with self._lock:
            if not self._is_open:
                return
            self._is_open = False
            self._idle.wait_for(lambda: not self._num_busy)
            self._end()
        self._release(keep)

    def close(self) -> None:
        """Ends without completing, and keeps what is there."""
        self.abandon(keep=True)

    def _end(self) -> None:
        self._is_open = False
        for part in self._parts.values():
            part.close()
        self._folder.close()

    @contextlib.contextmanager
    def _using(self, name: str) -> Iterator[_Part]:
        """Descriptors are not closed while somebody uses them: their numbers might be others'."""
        with self._lock:
            part = self._part(name)
            self._num_busy += 1
        try:
            yield part
        finally:
            with self._lock:
                self._num_busy -= 1
                self._idle.notify_all()

    def _checksums(self, file: SourceFile) -> tuple[int, ...]:
        done = self._part(file.name).done
        if len(done) != file.num_chunks:
            raise ConflictError(
                f"{file.name} is not whole: {file.num_chunks - len(done)} of {file.num_chunks} "
                "chunks are missing"
            )
        return tuple(done[index] for index in range(file.num_chunks))

    def _part(self, name: str) -> _Part:
        with self._lock:
            self._check_open()
            part = self._parts.get(name)
            if part is None:
                part = self._parts[name] = _Part(
                    self._folder, self._file(name), self._adopted.get(name)
                )
            return part

    def _file(self, name: str) -> SourceFile:
        try:
            return self._files[name]
        except KeyError:
            raise InternalError(f"{name} is not in the listing of {self.listing.uri}") from None

    def _check_open(self) -> None:
        if not self._is_open:
            raise ConflictError(f"writing {self.listing.uri} to disk has ended")


class _Part:
    """One file being written, or put already: its bytes, its journal, and what they agree on."""

    def __init__(self, folder: Folder, file: SourceFile, adopted: tuple[int, ...] | None) -> None:
        """adopted: chunk checksums of a file that is another checkpoint's too."""
        self.is_adopted = adopted is not None
        if not self.is_adopted and _is_shared(folder, file.name):
            folder.remove(file.name)  # adopted before a crash, from what has gone meanwhile
        is_put = folder.facts(file.name) is not None
        name = file.name if is_put else part_name(file.name)
        self.fd = folder.open(name, os.O_RDWR | (0 if is_put else os.O_CREAT))
        try:
            self._journal = Journal(folder, journal_name(file.name), file.identity, file.num_chunks)
        except BaseException:
            os.close(self.fd)
            raise
        self._writer: ChunkWriter | None = None
        self._lock = threading.Lock()
        self._unsynced = 0
        try:
            if adopted is None:
                os.ftruncate(self.fd, file.num_bytes)
                self.done = good_chunks(self.fd, file, self._journal.recorded)
                self._writer = ChunkWriter(self.fd)
            else:
                self.done = dict(enumerate(adopted))
        except BaseException:
            self.close()
            raise

    def write(self, index: int, data: memoryview) -> None:
        assert self._writer is not None
        self._writer.write(index, data)
        self._sync_after(len(data))

    def vouch(self, index: int, checksum: int) -> None:
        self._journal.append(index, checksum)
        self.done[index] = checksum

    def _sync_after(self, num_bytes: int) -> None:
        """Sends written bytes to the disk now and then, so that the last sync is short."""
        with self._lock:
            self._unsynced += num_bytes
            is_due = self._unsynced >= _SYNC_BYTES
            if is_due:
                self._unsynced = 0
        if is_due:
            os.fdatasync(self.fd)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._journal.close()
        os.close(self.fd)


def _is_shared(folder: Folder, name: str) -> bool:
    facts = folder.facts(name)
    return facts is not None and facts.st_nlink > 1
