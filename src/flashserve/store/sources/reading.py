"""Reads files of this machine: out of the page cache where they are there, past it otherwise."""

from __future__ import annotations

import errno
import os
from pathlib import Path

from flashserve.config import StoreSettings
from flashserve.errors import CheckpointError, SourceError
from flashserve.store.checkpoint.files import one_line, open_file, resolve_file
from flashserve.store.checkpoint.listing import CHUNK_BYTES, SourceFile
from flashserve.store.sources.cachestat import num_cached_pages

_ALIGNMENT = 4096  # of file offsets and lengths that every filesystem takes with O_DIRECT
_LOCAL = "file:"

# What a filesystem answers that has no RWF_NOWAIT, or no O_DIRECT (for this piece of memory).
_NOT_SUPPORTED = {errno.EOPNOTSUPP, errno.EINVAL}


def file_identity(path: Path, status: os.stat_result) -> str:
    """Of a resolved path: the same file in two directories that link to it is one."""
    return f"{_LOCAL}{path}:{status.st_size}:{status.st_mtime_ns}"


class LocalReader:
    """A `FileReader` of one file in a directory.

    Reading past the page cache, several large requests at once, is faster than through it, and
    leaves it to others; but what is in it already comes several times faster still.
    """

    preferred_bytes = CHUNK_BYTES

    def __init__(self, directory: Path, file: SourceFile, settings: StoreSettings) -> None:
        """Opens the file, wherever in `directory` its name and links lead.

        Args:
            directory: of the checkpoint.
            file: as listed. An identity made by `file_identity` must be the file's own; another
                one says where the bytes came from, and only their number is compared.
            settings: says how many threads a caller should read with.

        Raises:
            CheckpointError: the file is missing, leads out of the directory, or is not as listed.
        """
        self.preferred_threads = settings.disk_threads
        self._path = directory / file.name
        self._direct = -1
        try:
            self._file = open_file(directory, file.name)
            self._buffered = self._file.fileno()
            self._status = os.fstat(self._buffered)
            try:
                self._check_listed(directory, file)
            except BaseException:
                self._file.close()
                raise
        except FileNotFoundError:
            raise CheckpointError(f"{self._path} is missing") from None
        self._direct = _open_direct(self._buffered)

    def read(self, begin: int, target: memoryview) -> None:
        """Fills `target` with the bytes from `begin`; writes nothing beyond its end.

        Raises:
            CheckpointError: the file changed since it was opened.
            SourceError: it cannot be read.
        """
        try:
            done = self._read_cached(begin, target) if self._is_cached(begin, target) else 0
            done = self._read_direct(begin, target, done)
            self._read_buffered(begin, target, done)
            self._check_same()
        except OSError as error:
            raise SourceError(f"{self._path} cannot be read: {one_line(error)}") from None

    def close(self) -> None:
        """Closes the file; more than once does no harm."""
        if self._direct >= 0:
            os.close(self._direct)
            self._direct = -1
        self._file.close()

    def _is_cached(self, begin: int, target: memoryview) -> bool:
        """Whether the page cache has all that is wanted.

        A kernel that does not say so is asked for one page of the middle: a read that must not
        wait still starts readahead where it finds a hole, of as much as it asked for, and would
        bring in behind our back what is then read past the cache. The page is forgotten again if
        it was not there, lest it mislead the next read.
        """
        num_pages = -(-(begin % _ALIGNMENT + len(target)) // _ALIGNMENT)
        found = num_cached_pages(self._buffered, begin, len(target))
        if found is not None:
            return found >= num_pages
        probe = len(target) // 2 // _ALIGNMENT * _ALIGNMENT
        with target[probe : probe + _ALIGNMENT] as page:
            is_cached = self._read_at_once(begin + probe, page) > 0
        if not is_cached:
            self._forget(begin + probe)
        return is_cached

    def _read_cached(self, begin: int, target: memoryview) -> int:
        """Takes what the page cache has, up to the first hole; how many bytes that were."""
        done = 0
        while done < len(target):
            with target[done:] as rest:
                count = self._read_at_once(begin + done, rest)
            if not count:
                break
            done += count
        return done

    def _read_at_once(self, position: int, target: memoryview) -> int:
        """What the page cache gives without waiting; 0 for nothing."""
        try:
            return os.preadv(self._buffered, [target], position, os.RWF_NOWAIT)
        except OSError as error:
            if error.errno in {errno.EAGAIN, *_NOT_SUPPORTED}:
                return 0
            raise

    def _read_direct(self, begin: int, target: memoryview, done: int) -> int:
        """Reads whole aligned pieces past the page cache, from `done` on; where that ended."""
        if self._direct < 0 or begin % _ALIGNMENT:
            return done
        end = len(target) // _ALIGNMENT * _ALIGNMENT
        position = done // _ALIGNMENT * _ALIGNMENT
        # The end of the file leaves `position` unaligned.
        while position < end and not position % _ALIGNMENT:
            try:
                with target[position:end] as rest:
                    count = os.preadv(self._direct, [rest], begin + position)
            except OSError as error:
                if error.errno in _NOT_SUPPORTED:
                    break
                raise
            if not count:
                break
            position += count
        return max(position, done)

    def _read_buffered(self, begin: int, target: memoryview, done: int) -> None:
        while done < len(target):
            with target[done:] as rest:
                count = os.preadv(self._buffered, [rest], begin + done)
            if not count:
                raise CheckpointError(
                    f"{self._path} became shorter while it was read, at byte {begin + done}"
                )
            done += count

    def _forget(self, position: int) -> None:
        os.posix_fadvise(self._buffered, position, _ALIGNMENT, os.POSIX_FADV_DONTNEED)

    def _check_listed(self, directory: Path, file: SourceFile) -> None:
        if self._status.st_size != file.num_bytes:
            raise CheckpointError(
                f"{self._path} has {self._status.st_size} bytes, and had {file.num_bytes} when it "
                "was listed"
            )
        if file.identity.startswith(_LOCAL):
            path = resolve_file(directory, file.name)
            if file.identity != file_identity(path, self._status):
                raise CheckpointError(f"{self._path} changed after it was listed")

    def _check_same(self) -> None:
        now = os.fstat(self._buffered)
        if (now.st_size, now.st_mtime_ns) != (self._status.st_size, self._status.st_mtime_ns):
            raise CheckpointError(f"{self._path} changed while it was read")


def _open_direct(descriptor: int) -> int:
    """A second descriptor of the same file, past the page cache; -1 where that is refused."""
    try:
        return os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
    except OSError:
        return -1
