"""Compares a file of the disk tier with what its manifest says, and writes a damaged one anew."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection

import blake3
import xxhash

from flashserve.errors import CheckpointError
from flashserve.store.checkpoint.listing import CHUNK_BYTES, SourceFile
from flashserve.store.disk.chunks import chunk_bytes, pread_chunk, pwrite_chunk
from flashserve.store.disk.folder import Folder, temporary_name
from flashserve.store.disk.manifest import Stored


@dataclasses.dataclass(frozen=True, slots=True)
class Findings:
    """chunks are the indexes of damaged ones; `what` is empty for a good file."""

    chunks: frozenset[int] = frozenset()
    what: str = ""

    @property
    def is_damaged(self) -> bool:
        return bool(self.what)

    def ranges(self, file: SourceFile) -> tuple[tuple[int, int], ...]:
        """The damaged bytes as [begin, end), neighbours joined."""
        joined: list[tuple[int, int]] = []
        for index in sorted(self.chunks):
            begin = index * CHUNK_BYTES
            end = begin + chunk_bytes(file, index)
            if joined and joined[-1][1] == begin:
                begin = joined.pop()[0]
            joined.append((begin, end))
        return tuple(joined)


def check_file(
    folder: Folder, stored: Stored, file: SourceFile, advance: Callable[[int], None]
) -> Findings:
    """Reads a whole file from the disk, not from the kernel's cache, and leaves nothing there.

    advance is told the bytes of each chunk, read or missing.
    """
    everything = frozenset(range(file.num_chunks))
    try:
        fd = folder.open(file.name, os.O_RDONLY)
    except OSError as error:
        advance(file.num_bytes)
        return Findings(everything, f"cannot be opened: {error.strerror}")
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        damaged, digest = _read(fd, stored.checksums[file.name], file, advance)
        num_bytes = os.fstat(fd).st_size
    finally:
        os.close(fd)
    if damaged:
        return Findings(damaged, "differs from its checksums")
    if num_bytes != file.num_bytes:
        return Findings(everything, f"has {num_bytes} bytes instead of {file.num_bytes}")
    if stored.digests.get(file.name, digest) != digest:
        return Findings(everything, "differs from its digest")
    return Findings()


def rewrite(
    folder: Folder,
    stored: Stored,
    file: SourceFile,
    damaged: Collection[int],
    refetch: Callable[[int], bytes],
    advance: Callable[[int], None] = lambda _: None,
) -> str:
    """Writes the file anew beside the old one, `damaged` chunks from `refetch`; its name.

    advance is told the bytes of each chunk; what it raises ends this.

    Raises:
        CheckpointError: what was refetched, or the old file, is not what it should be.
        OSError: the disk is full or fails.
    """
    name = temporary_name()
    new = folder.open(name, os.O_RDWR | os.O_CREAT | os.O_EXCL)
    old = -1
    try:
        if len(damaged) < file.num_chunks:
            old = folder.open(file.name, os.O_RDONLY)
        hasher = blake3.blake3()
        for index, checksum in enumerate(stored.checksums[file.name]):
            data = refetch(index) if index in damaged else _read_old(old, file, index)
            if len(data) != chunk_bytes(file, index) or xxhash.xxh3_64_intdigest(data) != checksum:
                raise CheckpointError(
                    f"chunk {index} of {file.name} is another one at its source by now"
                    if index in damaged
                    else f"chunk {index} of {file.name} changes while it is read"
                )
            with memoryview(data) as view:
                pwrite_chunk(new, index, view)
            hasher.update(data)
            advance(len(data))
        if stored.digests.get(file.name, digest := hasher.hexdigest()) != digest:
            raise CheckpointError(f"{file.name} differs from its digest at its source too")
        os.fsync(new)
    except BaseException:
        folder.remove(name)
        raise
    finally:
        os.close(new)
        if old >= 0:
            os.close(old)
    return name


def _read(
    fd: int, checksums: tuple[int, ...], file: SourceFile, advance: Callable[[int], None]
) -> tuple[frozenset[int], str]:
    """Indexes of damaged chunks, and the BLAKE3 of the whole."""
    hasher = blake3.blake3(max_threads=blake3.blake3.AUTO)
    damaged = set()
    buffer = bytearray(min(CHUNK_BYTES, file.num_bytes))
    for index, checksum in enumerate(checksums):
        with memoryview(buffer)[: chunk_bytes(file, index)] as target:
            if not _is_read(fd, index, target) or xxhash.xxh3_64_intdigest(target) != checksum:
                damaged.add(index)
            hasher.update(target)
            os.posix_fadvise(fd, index * CHUNK_BYTES, len(target), os.POSIX_FADV_DONTNEED)
            advance(len(target))
    return frozenset(damaged), hasher.hexdigest()


def _is_read(fd: int, index: int, target: memoryview) -> bool:
    """False where the file is too short, or the disk gives these bytes back no more."""
    try:
        return pread_chunk(fd, index, target)
    except OSError:
        return False


def _read_old(fd: int, file: SourceFile, index: int) -> bytes:
    data = bytearray(chunk_bytes(file, index))
    with memoryview(data) as target:
        return bytes(data) if pread_chunk(fd, index, target) else b""
