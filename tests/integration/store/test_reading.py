"""Local files come into a real arena, past the page cache or out of it."""

import concurrent.futures
import ctypes
import mmap
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flashserve.config import StoreSettings
from flashserve.store.checkpoint.listing import CHUNK_BYTES, SourceFile
from flashserve.store.dram.arena import Arena
from flashserve.store.sources.reading import LocalReader, file_identity

pytestmark = pytest.mark.integration

NUM_BYTES = 3 * CHUNK_BYTES + 12_345
PAGE_BYTES = mmap.PAGESIZE


@pytest.fixture(scope="module")
def data() -> bytes:
    return np.random.default_rng(0).bytes(NUM_BYTES)


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(2 * NUM_BYTES)
    yield arena
    arena.close()


def write(directory: Path, data: bytes) -> SourceFile:
    path = directory.resolve() / "model.safetensors"
    with path.open("wb") as file:
        file.write(data)
        os.fsync(file.fileno())
    return SourceFile(path.name, len(data), file_identity(path, path.stat()))


def forget(path: Path) -> None:
    """Takes a file out of the page cache."""
    with path.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def num_cached_pages(path: Path) -> int:
    libc = ctypes.CDLL(None)
    flags = (ctypes.c_ubyte * -(-NUM_BYTES // PAGE_BYTES))()
    with path.open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, mmap.MAP_PRIVATE)
    anchor = ctypes.c_char.from_buffer(mapping)
    address = ctypes.c_void_p(ctypes.addressof(anchor))
    assert libc.mincore(address, ctypes.c_size_t(NUM_BYTES), flags) == 0
    del anchor
    mapping.close()
    return sum(flag & 1 for flag in flags)


def read_whole(directory: Path, file: SourceFile, target: memoryview, num_threads: int) -> None:
    reader = LocalReader(directory, file, StoreSettings())

    def read(begin: int) -> None:
        with target[begin : min(begin + CHUNK_BYTES, NUM_BYTES)] as chunk:
            reader.read(begin, chunk)

    try:
        with concurrent.futures.ThreadPoolExecutor(num_threads) as pool:
            list(pool.map(read, range(0, NUM_BYTES, CHUNK_BYTES)))
    finally:
        reader.close()


@pytest.mark.parametrize("is_cached", [False, True])
def test_several_threads_read_a_file_into_an_arena(tmp_path, data, arena, is_cached):
    file = write(tmp_path, data)
    if not is_cached:
        forget(tmp_path / file.name)
    with arena.memory(arena.allocate(NUM_BYTES)) as memory:
        read_whole(tmp_path, file, memory, num_threads=4)
        assert memory[:NUM_BYTES] == data
        assert not any(memory[NUM_BYTES:])


def test_a_cold_read_leaves_the_page_cache_to_others(tmp_path, data, arena):
    """Also the second time: what one reading leaves behind must not mislead the next.

    On a busy machine the page that is asked for first may have come before the answer is given;
    that chunk is then read through the cache, so one undisturbed reading is enough.
    """
    file = write(tmp_path, data)
    path = tmp_path / file.name
    forget(path)
    reader = LocalReader(tmp_path, file, StoreSettings())
    is_direct = reader._direct >= 0
    reader.close()
    if num_cached_pages(path) or not is_direct:
        pytest.skip("the temporary directory is in memory, or refuses O_DIRECT")

    def pages_left(memory: memoryview) -> int:
        forget(path)
        for _ in range(2):
            read_whole(tmp_path, file, memory, num_threads=2)
        return num_cached_pages(path)

    with arena.memory(arena.allocate(NUM_BYTES)) as memory:
        # The last piece, which is no whole page, always comes through the cache.
        assert any(pages_left(memory) < 64 for _ in range(20))


def test_a_filesystem_in_memory_is_read(data, arena):
    if not os.access("/dev/shm", os.W_OK):
        pytest.skip("there is no tmpfs to write to")
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="flashserve-test-") as name:
        file = write(Path(name), data)
        with arena.memory(arena.allocate(NUM_BYTES)) as memory:
            read_whole(Path(name), file, memory, num_threads=2)
            assert memory[:NUM_BYTES] == data
