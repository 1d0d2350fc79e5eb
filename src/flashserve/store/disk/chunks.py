"""Reads and writes whole chunks of files through descriptors, and compares their checksums."""

from __future__ import annotations

import concurrent.futures
import errno
import os
import threading
from collections.abc import Mapping

import xxhash

from flashserve.store.checkpoint.listing import CHUNK_BYTES, SourceFile

_NUM_THREADS = 4
_ALIGNMENT = 4096  # of offsets and lengths that every filesystem takes with O_DIRECT
# What a filesystem answers that has no O_DIRECT, or not for this piece of memory.
_NOT_DIRECT = {errno.EINVAL, errno.EOPNOTSUPP}


def chunk_bytes(file: SourceFile, index: int) -> int:
    """Bytes of chunk `index`, of which the last one may have fewer."""
    return min(CHUNK_BYTES, file.num_bytes - index * CHUNK_BYTES)


def pread_chunk(fd: int, index: int, target: memoryview) -> bool:
    """Fills `target` from chunk `index` on; false where the file ends before that.

    Raises:
        OSError: the disk fails.
    """
    done = 0
    while done < len(target):
        with target[done:] as rest:
            count = os.preadv(fd, [rest], index * CHUNK_BYTES + done)
        if not count:
            return False
        done += count
    return True


def pwrite_chunk(fd: int, index: int, data: memoryview) -> None:
    """Writes all of `data` from chunk `index` on.

    Raises:
        OSError: the disk is full or fails.
    """
    _pwrite(fd, index * CHUNK_BYTES, data)


class ChunkWriter:
    """Writes chunks of one file straight from where they lie in memory, past the page cache.

    What does not fit that goes through the cache: ends that are no whole pages, memory that is not
    aligned, filesystems that refuse. Either way a reader sees the bytes at once, and they are
    durable after the next fsync of the file. Thread-safe.
    """

    def __init__(self, fd: int) -> None:
        """Borrows `fd`, which is open for writing."""
        self._fd = fd
        self._direct = -1
        try:
            path = f"/proc/self/fd/{fd}"
            self._direct = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_DIRECT)
        except OSError as error:
            if error.errno not in {*_NOT_DIRECT, errno.ENOENT}:  # no /proc
                raise

    def write(self, index: int, data: memoryview) -> None:
        """All of `data` from chunk `index` on.

        Raises:
            OSError: the disk is full or fails.
        """
        begin = index * CHUNK_BYTES
        done = self._write_direct(begin, data)
        with data[done:] as rest:
            _pwrite(self._fd, begin + done, rest)

    def close(self) -> None:
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1

    def _write_direct(self, begin: int, data: memoryview) -> int:
        """How many bytes went past the page cache."""
        if self._direct < 0 or begin % _ALIGNMENT:
            return 0
        done, end = 0, len(data) // _ALIGNMENT * _ALIGNMENT
        # A write that stops short may leave `done` unaligned.
        while done < end and not done % _ALIGNMENT:
            try:
                with data[done:end] as rest:
                    done += os.pwrite(self._direct, rest, begin + done)
            except OSError as error:
                if error.errno in _NOT_DIRECT:
                    break
                raise
        return done


def _pwrite(fd: int, begin: int, data: memoryview) -> None:
    done = 0
    while done < len(data):
        with data[done:] as rest:
            done += os.pwrite(fd, rest, begin + done)


def good_chunks(fd: int, file: SourceFile, wanted: Mapping[int, int]) -> dict[int, int]:
    """Those of the `wanted` chunks (index to checksum) whose bytes in the file are as they say.

    Raises:
        OSError: the disk fails.
    """
    buffers = threading.local()

    def is_good(index: int) -> bool:
        if not hasattr(buffers, "memory"):
            buffers.memory = bytearray(CHUNK_BYTES)
        with memoryview(buffers.memory)[: chunk_bytes(file, index)] as target:
            return (
                pread_chunk(fd, index, target) and xxhash.xxh3_64_intdigest(target) == wanted[index]
            )

    with concurrent.futures.ThreadPoolExecutor(_NUM_THREADS, "disk-verify") as pool:
        verdicts = pool.map(is_good, wanted)
        return {index: wanted[index] for index, good in zip(wanted, verdicts, strict=True) if good}
