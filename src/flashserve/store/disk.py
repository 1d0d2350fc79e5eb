"""Moves the files of a checkpoint from disk into memory, and sums them up on the way."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import itertools
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import xxhash

from flashserve.errors import CheckpointError, SourceError, UnavailableError
from flashserve.store.files import one_line, open_file
from flashserve.store.layout import Layout

CHUNK_BYTES = 8 << 20
NUM_READERS = 4

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of one file: [begin, begin + num_bytes) of it lies at `offset` of the image."""

    file_index: int
    begin: int
    num_bytes: int
    offset: int


def chunks(layout: Layout) -> Iterator[Chunk]:
    """The pieces in which a checkpoint moves and is checked, in the order of its image."""
    for index, (file, start) in enumerate(zip(layout.files, layout.file_offsets, strict=True)):
        for begin in range(0, file.num_bytes, CHUNK_BYTES):
            num_bytes = min(CHUNK_BYTES, file.num_bytes - begin)
            yield Chunk(index, begin, num_bytes, start + begin)


def checksum(data: memoryview) -> int:
    """xxh3 of a chunk: finds damage, not malice."""
    return xxhash.xxh3_64_intdigest(data)


def read_image(
    directory: Path,
    layout: Layout,
    image: memoryview,
    *,
    stopping: threading.Event,
    progress: Progress | None = None,
) -> tuple[int, ...]:
    """Fills `image` with the files of a checkpoint, each at its place, by several threads.

    Args:
        directory: where the files are.
        layout: as read from them before.
        image: writable, at least `layout.image_bytes` long. No reference to it is kept.
        stopping: once set, reading ends soon with an UnavailableError.
        progress: called with bytes done and bytes in all after each chunk, by one thread at a
            time.

    Returns:
        The checksum of each chunk, in the order of `chunks`.

    Raises:
        CheckpointError: a file is not as long as its layout says.
        SourceError: a file cannot be read.
    """
    with contextlib.ExitStack() as stack:
        descriptors: list[int] = []
        for entry in layout.files:
            try:
                file = stack.enter_context(open_file(directory, entry.name))
            except FileNotFoundError:
                raise CheckpointError(f"{directory / entry.name} is missing") from None
            descriptors.append(file.fileno())
        work = _Work(directory, layout, descriptors, image, stopping, progress)
        return work.run()


class _Work:
    """One image being read. A failure in any thread ends all of them."""

    def __init__(
        self,
        directory: Path,
        layout: Layout,
        descriptors: list[int],
        image: memoryview,
        stopping: threading.Event,
        progress: Progress | None,
    ) -> None:
        self._directory = directory
        self._layout = layout
        self._descriptors = descriptors
        self._image = image
        self._stopping = stopping
        self._progress = progress
        self._chunks = list(chunks(layout))
        self._checksums = [0] * len(self._chunks)
        self._next = itertools.count()
        self._failed = threading.Event()
        self._lock = threading.Lock()
        self._num_done = 0

    def run(self) -> tuple[int, ...]:
        with concurrent.futures.ThreadPoolExecutor(NUM_READERS, "store-read") as pool:
            readers = [pool.submit(self._read_chunks) for _ in range(NUM_READERS)]
        for reader in readers:
            reader.result()
        if self._stopping.is_set():
            raise UnavailableError("the store is closing")
        return tuple(self._checksums)

    def _read_chunks(self) -> None:
        try:
            # next() of a count is one step of the interpreter: no chunk is taken twice.
            while not (self._failed.is_set() or self._stopping.is_set()):
                index = next(self._next)
                if index >= len(self._chunks):
                    return
                self._read_chunk(index)
        except BaseException:
            self._failed.set()
            raise

    def _read_chunk(self, index: int) -> None:
        chunk = self._chunks[index]
        with self._image[chunk.offset : chunk.offset + chunk.num_bytes] as target:
            done = 0
            while done < chunk.num_bytes:
                with target[done:] as rest:
                    done += self._read(chunk, done, rest)
            self._checksums[index] = checksum(target)
        if self._progress:
            with self._lock:
                self._num_done += chunk.num_bytes
                self._progress(self._num_done, self._layout.size_bytes)

    def _read(self, chunk: Chunk, done: int, target: memoryview) -> int:
        path = self._directory / self._layout.files[chunk.file_index].name
        position = chunk.begin + done
        try:
            count = os.preadv(self._descriptors[chunk.file_index], [target], position)
        except OSError as error:
            raise SourceError(f"{path} cannot be read: {one_line(error)}") from None
        if not count:
            raise CheckpointError(f"{path} became shorter while it was read, at byte {position}")
        return count
