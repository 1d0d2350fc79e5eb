"""Which chunks of a file are on disk already: small records, appended after their bytes.

A record is 16 bytes: chunk index (u32), xxh3 of the chunk (u64), checksum of both (u32), little
endian. The last is seeded with the file's identity, so that a journal speaks of one file only. A
torn tail or a damaged record counts as absent. The bytes themselves may not have reached the disk
when the machine went down, so whoever resumes compares each chunk with its record.
"""

from __future__ import annotations

import errno
import os
import struct
import threading

import xxhash

from flashserve.store.disk.folder import Folder

_BODY = struct.Struct("<IQ")
_CHECK = struct.Struct("<I")
RECORD_BYTES = _BODY.size + _CHECK.size


class Journal:
    """The journal of one file, open for appending. Appending is safe from several threads."""

    def __init__(self, folder: Folder, name: str, identity: str, num_chunks: int) -> None:
        """Opens or makes the journal; `recorded` is what it held, by chunk index.

        Raises:
            OSError: it cannot be opened, or is not a file.
        """
        self._seed = xxhash.xxh3_64_intdigest(identity.encode())
        self._lock = threading.Lock()
        self._fd = folder.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
        try:
            self.recorded = self._read(num_chunks)
        except BaseException:
            self.close()
            raise

    def append(self, index: int, checksum: int) -> None:
        """Vouches for a chunk. One write, so a crash leaves the record whole or a torn tail.

        Raises:
            OSError: the disk is full or fails.
        """
        body = _BODY.pack(index, checksum)
        record = body + _CHECK.pack(self._check(body))
        with self._lock:
            count = os.write(self._fd, record)
            if count != RECORD_BYTES:
                os.ftruncate(self._fd, os.fstat(self._fd).st_size - count)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _read(self, num_chunks: int) -> dict[int, int]:
        """All valid records; a torn tail is cut off, so that what is appended stays aligned."""
        size = os.fstat(self._fd).st_size
        whole = size // RECORD_BYTES * RECORD_BYTES
        if whole != size:
            os.ftruncate(self._fd, whole)
        # Each chunk is recorded once or a few times: what is larger is not a journal of ours.
        data = os.pread(self._fd, min(whole, 16 * RECORD_BYTES * (num_chunks + 1)), 0)
        found: dict[int, int] = {}
        for begin in range(0, len(data) - RECORD_BYTES + 1, RECORD_BYTES):
            body = data[begin : begin + _BODY.size]
            (check,) = _CHECK.unpack_from(data, begin + _BODY.size)
            index, checksum = _BODY.unpack(body)
            if check == self._check(body) and index < num_chunks:
                found[index] = checksum
        return found

    def _check(self, body: bytes) -> int:
        return xxhash.xxh3_64_intdigest(body, self._seed) & 0xFFFFFFFF
