"""What a source holds, file by file, and how its bytes are read: the seam below every tier."""

from __future__ import annotations

import dataclasses
from typing import Protocol

from flashserve.types import Tier

CHUNK_BYTES = 8 << 20
"""The unit in which files move, are summed up and are checked; chunk i of a file starts at
i * CHUNK_BYTES, and the last one may be shorter."""


@dataclasses.dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a checkpoint.

    identity changes whenever the bytes do, and is equal for files that are known to be the same
    before a byte is read: path, size and mtime; ETag or version; commit and path. digests are what
    the origin promises of the whole file, by algorithm ("md5", "sha256"), in hex; often none.
    """

    name: str
    num_bytes: int
    identity: str
    digests: tuple[tuple[str, str], ...] = ()

    @property
    def num_chunks(self) -> int:
        return -(-self.num_bytes // CHUNK_BYTES)

    def chunk_bytes(self, index: int) -> int:
        return min(CHUNK_BYTES, self.num_bytes - index * CHUNK_BYTES)


@dataclasses.dataclass(frozen=True, slots=True)
class Listing:
    """The files of a checkpoint that matter: weights, config, tokenizer; sorted by name.

    is_protected: no byte can be changed unseen on its way here: it is a file of this machine, or
    TLS guards it.
    """

    uri: str
    identity: str
    files: tuple[SourceFile, ...]
    is_protected: bool = True


class FileReader(Protocol):
    """Reads one file of a source. Thread-safe: several threads read ranges at once."""

    preferred_bytes: int
    """A read of about this size is best; a multiple of CHUNK_BYTES."""
    preferred_threads: int

    def read(self, begin: int, target: memoryview) -> None:
        """Fills `target` with the bytes from `begin`, all of it.

        begin is a multiple of CHUNK_BYTES or the read is small (a header). For a read of whole
        chunks, `target` starts at a multiple of 4096 in memory and may be written up to the next
        multiple of 4096 after its end.

        Raises:
            CheckpointError: the file is shorter than it was, or is another one by now.
            SourceError: it cannot be read, after all retries.
            UnavailableError: the store is closing.
        """

    def close(self) -> None: ...


class Source(Protocol):
    """A checkpoint's origin. `lowest_tier` is where its bytes are when FlashServe holds none:
    DISK for files of this machine, REMOTE otherwise.
    """

    @property
    def uri(self) -> str: ...

    @property
    def lowest_tier(self) -> Tier: ...

    def listing(self) -> Listing:
        """Asks the origin anew.

        Raises:
            SourceError: it is missing or cannot be had.
        """

    def open(self, file: SourceFile) -> FileReader:
        """A reader of exactly these bytes: a file that changed since the listing is an error."""
