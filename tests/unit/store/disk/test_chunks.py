import errno
import fcntl
import mmap
import os
import random
from pathlib import Path

import pytest

from flashserve.store.checkpoint.listing import CHUNK_BYTES
from flashserve.store.disk.chunks import ChunkWriter

DATA = random.Random(0).randbytes(CHUNK_BYTES + 5000)


@pytest.fixture
def aligned():
    with mmap.mmap(-1, len(DATA)) as memory:
        memory[:] = DATA
        with memoryview(memory) as view:
            yield view


@pytest.fixture
def file(tmp_path):
    fd = os.open(tmp_path / "f", os.O_RDWR | os.O_CREAT)
    os.ftruncate(fd, len(DATA))
    yield fd
    os.close(fd)


def write(fd, view):
    writer = ChunkWriter(fd)
    for index in (1, 0):
        with view[index * CHUNK_BYTES : (index + 1) * CHUNK_BYTES] as piece:
            writer.write(index, piece)
    writer.close()


def record_writes(monkeypatch, refuse_direct=None):
    calls = []
    pwrite = os.pwrite

    def recording(fd, data, offset):
        is_direct = bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT)
        if is_direct and refuse_direct:
            raise OSError(refuse_direct, "no")
        calls.append((is_direct, offset, len(data)))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", recording)
    return calls


def test_whole_pages_go_past_the_page_cache_and_the_end_through_it(file, aligned, monkeypatch):
    calls = record_writes(monkeypatch)
    write(file, aligned)
    assert os.pread(file, len(DATA), 0) == DATA
    if any(is_direct for is_direct, _, _ in calls):  # not on tmpfs of older kernels
        assert calls == [
            (True, CHUNK_BYTES, 4096),
            (False, CHUNK_BYTES + 4096, 904),
            (True, 0, CHUNK_BYTES),
        ]


def test_memory_that_is_not_aligned_is_written_all_the_same(file):
    with memoryview(bytearray(1) + DATA)[1:] as view:
        write(file, view)
    assert os.pread(file, len(DATA), 0) == DATA


def test_a_filesystem_that_refuses_gets_the_bytes_through_the_cache(file, aligned, monkeypatch):
    calls = record_writes(monkeypatch, refuse_direct=errno.EINVAL)
    write(file, aligned)
    assert os.pread(file, len(DATA), 0) == DATA
    assert calls == [(False, CHUNK_BYTES, 5000), (False, 0, CHUNK_BYTES)]


def test_a_full_disk_is_not_taken_for_a_refusal(file, aligned, monkeypatch):
    record_writes(monkeypatch, refuse_direct=errno.ENOSPC)
    with pytest.raises(OSError, match="no"):
        write(file, aligned)


def test_a_closed_writer_leaves_no_descriptor(file, aligned):
    before = set(Path("/proc/self/fd").iterdir())
    write(file, aligned)
    assert set(Path("/proc/self/fd").iterdir()) == before
