"""Moves files into memory by several threads, in the order in which they are needed.

Every chunk is summed up as it comes, compared with what is known of it, and then handed on: to
whoever waits for it in DRAM, and to the disk, which is written behind.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import itertools
import logging
import mmap
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence

import xxhash

from flashserve.errors import CheckpointError, UnavailableError
from flashserve.store.checkpoint.listing import CHUNK_BYTES, FileReader

_log = logging.getLogger(__name__)


def _ignored(_: int) -> None:
    """No rate limit, and nobody who wants to know."""


@dataclasses.dataclass(frozen=True, slots=True)
class FileLoad:
    """One file to be read. `path` names it in messages.

    memory is the file's place, at least num_bytes long; where it is None each chunk only passes
    through a buffer. known are checksums by chunk that were taken before; a chunk with another one
    is read once more from what `again` opens, if anything can, and on_damage is told its index when
    that brought it. take(num_bytes) waits until so many
    bytes may be read. on_chunk(index, data, checksum) is called by the reading threads as chunks
    have come; `data` is theirs only while it runs, unless it lies in `memory`.
    """

    path: str
    num_bytes: int
    reader: FileReader
    memory: memoryview | None
    on_chunk: Callable[[int, memoryview, int], None]
    known: Mapping[int, int] = dataclasses.field(default_factory=dict)
    again: Callable[[], FileReader] | None = None
    take: Callable[[int], None] = _ignored
    on_damage: Callable[[int], None] = _ignored


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """Chunks [first, first + count) of one file, read in one go."""

    file_index: int
    first: int
    count: int


def checksum(data: memoryview) -> int:
    """xxh3 of a chunk: finds damage, not malice."""
    return xxhash.xxh3_64_intdigest(data)


def runs(
    order: Iterable[tuple[int, int]], longest: Sequence[int], num_threads: int
) -> tuple[Run, ...]:
    """Joins chunks that follow one another in the order and in their file.

    Args:
        order: file index and chunk index.
        longest: for each file, how many chunks one read should bring at most.
        num_threads: no run is so long that a thread would be left without one.
    """
    places = list(order)
    share = max(1, len(places) // num_threads)
    found: list[Run] = []
    for file_index, index in places:
        last = found[-1] if found else None
        if (
            last
            and last.file_index == file_index
            and last.first + last.count == index
            and last.count < min(longest[file_index], share)
        ):
            found[-1] = Run(file_index, last.first, last.count + 1)
        else:
            found.append(Run(file_index, index, 1))
    return tuple(found)


def load(
    files: Sequence[FileLoad],
    order: Iterable[tuple[int, int]],
    *,
    num_threads: int,
    stopping: threading.Event,
) -> None:
    """Reads the chunks of `order` (file index and chunk index), first things first.

    Returns when all are there, or no thread touches any memory any more.

    Raises:
        CheckpointError: a file is damaged, or not what it was.
        SourceError: a file cannot be read.
        UnavailableError: `stopping` was set.
    """
    work = _Work(files, order, num_threads, stopping)
    with concurrent.futures.ThreadPoolExecutor(num_threads, "store-read") as pool:
        readers = [pool.submit(work.read_runs) for _ in range(num_threads)]
    for reader in readers:
        reader.result()
    if stopping.is_set():
        raise UnavailableError("reading was stopped: nobody needs it, or the store is closing")


class _Work:
    """One load under way. A failure in any thread ends all of them."""

    def __init__(
        self,
        files: Sequence[FileLoad],
        order: Iterable[tuple[int, int]],
        num_threads: int,
        stopping: threading.Event,
    ) -> None:
        self._files = files
        longest = [max(1, file.reader.preferred_bytes // CHUNK_BYTES) for file in files]
        self._runs = runs(order, longest, num_threads)
        self._next = itertools.count()
        self._stopping = stopping
        self._failed = threading.Event()
        needs_buffer = [run.count for run in self._runs if files[run.file_index].memory is None]
        self._buffer_bytes = max(needs_buffer, default=0) * CHUNK_BYTES

    def read_runs(self) -> None:
        try:
            with _Buffer(self._buffer_bytes) as buffer:
                # next() of a count is one step of the interpreter: no run is taken twice.
                while not (self._failed.is_set() or self._stopping.is_set()):
                    number = next(self._next)
                    if number >= len(self._runs):
                        return
                    run = self._runs[number]
                    self._read(self._files[run.file_index], run, buffer)
        except BaseException:
            self._failed.set()
            raise

    def _read(self, file: FileLoad, run: Run, buffer: _Buffer) -> None:
        begin = run.first * CHUNK_BYTES
        end = min(begin + run.count * CHUNK_BYTES, file.num_bytes)
        file.take(end - begin)
        whole = buffer.view[: end - begin] if file.memory is None else file.memory[begin:end]
        with whole:
            file.reader.read(begin, whole)
            for index in range(run.first, run.first + run.count):
                if self._stopping.is_set():
                    return
                start = index * CHUNK_BYTES - begin
                with whole[start : start + CHUNK_BYTES] as data:
                    file.on_chunk(index, data, _verified(file, index, data))


def _verified(file: FileLoad, index: int, data: memoryview) -> int:
    """The checksum of a chunk, which is as it was; read once more if it is not."""
    found, wanted = checksum(data), file.known.get(index)
    if wanted is None or found == wanted:
        return found
    begin = index * CHUNK_BYTES
    place = f"{file.path} is damaged between its bytes {begin} and {begin + len(data)}"
    if file.again is None:
        raise CheckpointError(
            f"{place}: they are no longer those that were read before; restore the file"
        )
    _log.warning("%s; they are fetched again", place)
    reader = file.again()
    try:
        file.take(len(data))
        reader.read(begin, data)
    finally:
        reader.close()
    if checksum(data) != wanted:
        raise CheckpointError(f"{place}, and so are those that were fetched again")
    file.on_damage(index)
    return wanted


class _Buffer:
    """Page-aligned memory of one thread; none for 0 bytes."""

    def __init__(self, num_bytes: int) -> None:
        self._map = mmap.mmap(-1, num_bytes) if num_bytes else None
        self.view = memoryview(self._map if self._map is not None else b"")

    def __enter__(self) -> _Buffer:
        return self

    def __exit__(self, *_: object) -> None:
        self.view.release()
        if self._map is not None:
            self._map.close()
