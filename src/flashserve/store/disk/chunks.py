"""Reads and writes whole chunks of files through descriptors, and compares their checksums."""

from __future__ import annotations

import concurrent.futures
import os
import threading
from collections.abc import Mapping

import xxhash

from flashserve.store.checkpoint.listing import CHUNK_BYTES, SourceFile

_NUM_THREADS = 4


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
    done = 0
    while done < len(data):
        with data[done:] as rest:
            done += os.pwrite(fd, rest, index * CHUNK_BYTES + done)


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
