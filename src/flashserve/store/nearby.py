"""Reads what the disk tier has of a checkpoint, and what is missing or damaged from its source."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from flashserve.errors import FlashServeError
from flashserve.store.checkpoint.listing import CHUNK_BYTES, FileReader, SourceFile
from flashserve.store.disk.incoming import Incoming
from flashserve.store.disk.manifest import Stored

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

_log = logging.getLogger(__name__)

ReadChunk = Callable[[SourceFile, int], bytes]


class StoredFiles:
    """The files of a checkpoint of the disk tier, every byte compared with its checksum.

    `directory` is where its small files stay for good.
    """

    def __init__(self, stored: Stored, directory: Path, read_chunk: ReadChunk) -> None:
        """read_chunk: gives chunks of a file by index, verified."""
        self.directory = directory
        self.place = str(stored.directory)
        self._files = {file.name: file for file in stored.listing.files}
        self._read_chunk = read_chunk

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self._files))

    def open(self, name: str) -> tuple[BinaryIO, int]:
        file = self._files.get(name)
        if file is None:
            raise FileNotFoundError(name)
        raw = _ChunkedFile(file, lambda index: self._read_chunk(file, index))
        return io.BufferedReader(raw), file.num_bytes


class Resumed:
    """Reads the chunks that an interrupted fetch left from there, the others from their source."""

    def __init__(
        self, reader: FileReader, incoming: Incoming, file: SourceFile, done: dict[int, int]
    ) -> None:
        """done: checksums by index of what is there; what turns out to be damaged is taken out."""
        self.preferred_bytes = CHUNK_BYTES
        self.preferred_threads = reader.preferred_threads
        self._reader = reader
        self._incoming = incoming
        self._file = file
        self._done = done

    def read(self, begin: int, target: memoryview) -> None:
        index = begin // CHUNK_BYTES
        if index in self._done:
            try:
                self._incoming.read_chunk(self._file.name, index, target)
            except FlashServeError as error:
                _log.warning("%s; fetched again", error.message)
                self._drop(index)
            else:
                return
        self._reader.read(begin, target)

    def close(self) -> None:
        self._reader.close()

    def _drop(self, index: int) -> None:
        """Unless the file is another checkpoint's too, which is mended by its own loads."""
        try:
            is_done = index in self._incoming.done(self._file.name)
        except FlashServeError:
            return  # writing to disk has ended
        if not is_done:
            self._done.pop(index, None)


class _ChunkedFile(io.RawIOBase):
    """One file from its start to its end, of which one chunk is kept at a time."""

    def __init__(self, file: SourceFile, read_chunk: Callable[[int], bytes]) -> None:
        super().__init__()
        self._file = file
        self._read_chunk = read_chunk
        self._index = -1
        self._chunk = b""
        self._position = 0

    def readable(self) -> bool:
        return True

    def readinto(self, target: WriteableBuffer) -> int:
        if self._position >= self._file.num_bytes:
            return 0
        index, begin = divmod(self._position, CHUNK_BYTES)
        if index != self._index:
            self._index, self._chunk = index, self._read_chunk(index)
        with memoryview(target).cast("B") as whole:
            piece = self._chunk[begin : begin + len(whole)]
            whole[: len(piece)] = piece
        self._position += len(piece)
        return len(piece)
