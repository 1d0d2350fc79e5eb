import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from flashserve.config import StoreSettings
from flashserve.errors import CheckpointError, SourceError
from flashserve.store.checkpoint.listing import CHUNK_BYTES, SourceFile
from flashserve.store.sources import reading
from flashserve.store.sources.reading import LocalReader, file_identity

NUM_BYTES = 50_123
DATA = np.random.default_rng(0).integers(0, 256, NUM_BYTES, dtype=np.uint8).tobytes()


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path.resolve() / "model.safetensors"
    path.write_bytes(DATA)
    return path


@pytest.fixture
def target() -> Iterator[memoryview]:
    """Page-aligned, and longer than the file."""
    with mmap.mmap(-1, 64 << 10) as mapping, memoryview(mapping) as view:
        view[:] = b"\xee" * len(view)
        yield view


def listed(path: Path) -> SourceFile:
    status = path.stat()
    return SourceFile(path.name, status.st_size, file_identity(path, status))


def opened(path: Path) -> LocalReader:
    return LocalReader(path.parent, listed(path), StoreSettings(disk_threads=3))


class Kernel:
    """preadv as some filesystem would have it, and what was asked of it."""

    def __init__(self, *, cached: int, direct: int = 0, most: int = 1 << 30) -> None:
        """cached: bytes from the start that are in the page cache; direct: an errno, or 0."""
        self._cached, self._direct, self._most = cached, direct, most
        self.reader: LocalReader | None = None
        self.calls: list[tuple[str, int, int]] = []

    def preadv(self, fd: int, targets: list[memoryview], position: int, flags: int = 0) -> int:
        (target,) = targets
        kind = "direct" if fd == self.reader._direct else "cached" if flags else "buffered"
        self.calls.append((kind, position, len(target)))
        length = min(len(target), self._most)
        if kind == "cached":
            length = min(length, self._cached - position)
            if length <= 0:
                raise BlockingIOError(errno.EAGAIN, "would wait")
        if kind == "direct":
            assert position % 4096 == len(target) % 4096 == 0
            if self._direct:
                raise OSError(self._direct, os.strerror(self._direct))
        piece = DATA[position : position + length]
        target[: len(piece)] = piece
        return len(piece)

    def kinds(self) -> list[str]:
        return [kind for kind, _, _ in self.calls]


@pytest.fixture
def served(path, monkeypatch):
    """A reader of the file whose kernel is a given one, and does not tell what it has cached."""
    readers = []
    monkeypatch.setattr(reading, "num_cached_pages", lambda *_: None)

    def serve(kernel: Kernel) -> LocalReader:
        reader = opened(path)
        reader._direct = os.dup(reader._buffered) if reader._direct < 0 else reader._direct
        kernel.reader = reader
        monkeypatch.setattr(os, "preadv", kernel.preadv)
        readers.append(reader)
        return reader

    yield serve
    for reader in readers:
        reader.close()


@pytest.mark.parametrize(
    ("begin", "num_bytes"),
    [(0, NUM_BYTES), (0, 8), (0, 4096), (8, 1000), (4096, 40_000), (8192, NUM_BYTES - 8192)],
)
def test_any_range_is_read_and_nothing_beyond_it(path, target, begin, num_bytes):
    reader = opened(path)
    reader.read(begin, target[:num_bytes])
    reader.read(begin, target[:0])
    reader.close()
    assert bytes(target[:num_bytes]) == DATA[begin : begin + num_bytes]
    assert set(target[num_bytes:]) == {0xEE}


def test_an_unaligned_target_is_filled_too(path, target):
    reader = opened(path)
    reader.read(0, target[1 : 1 + NUM_BYTES])
    reader.close()
    assert target[1 : 1 + NUM_BYTES] == DATA


def test_what_the_page_cache_has_is_taken_from_it(served, target):
    kernel = Kernel(cached=NUM_BYTES, most=20_000)
    served(kernel).read(0, target[:NUM_BYTES])
    assert target[:NUM_BYTES] == DATA
    assert set(kernel.kinds()) == {"cached"}


@pytest.mark.parametrize(("num_pages", "kind"), [(13, "cached"), (12, "direct"), (0, "direct")])
def test_a_kernel_that_tells_what_it_has_is_asked_for_no_byte(
    served, target, monkeypatch, num_pages, kind
):
    kernel = Kernel(cached=NUM_BYTES if kind == "cached" else 0)
    reader = served(kernel)
    monkeypatch.setattr(reading, "num_cached_pages", lambda *_: num_pages)
    reader.read(0, target[:NUM_BYTES])
    assert target[:NUM_BYTES] == DATA
    assert kernel.kinds()[0] == kind
    assert set(kernel.kinds()) <= {kind, "buffered"}


def test_what_it_lacks_is_read_past_it(served, target):
    """But for the end, which is no whole page; and the cache is asked for one page, not for all."""
    kernel = Kernel(cached=0)
    served(kernel).read(0, target[:NUM_BYTES])
    assert target[:NUM_BYTES] == DATA
    assert kernel.calls == [
        ("cached", 24_576, 4096),
        ("direct", 0, 49_152),
        ("buffered", 49_152, NUM_BYTES - 49_152),
    ]


@pytest.mark.parametrize("most", [4096, 12_288, 5000])
@pytest.mark.parametrize("cached", [0, 30_000, 32_768, 49_500])
def test_short_reads_are_continued(served, target, cached, most):
    kernel = Kernel(cached=cached, most=most)
    served(kernel).read(0, target[:NUM_BYTES])
    assert target[:NUM_BYTES] == DATA


@pytest.mark.parametrize("refusal", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_filesystem_that_refuses_direct_reads_is_read_through_the_cache(served, target, refusal):
    kernel = Kernel(cached=0, direct=refusal)
    served(kernel).read(0, target[:NUM_BYTES])
    assert target[:NUM_BYTES] == DATA
    assert kernel.kinds() == ["cached", "direct", "buffered"]


def test_a_filesystem_that_will_not_open_for_direct_reads_is_read_too(path, target, monkeypatch):
    system_open = os.open

    def refuse(name: str, flags: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "no O_DIRECT")
        return system_open(name, flags)

    monkeypatch.setattr(os, "open", refuse)
    reader = opened(path)
    reader.read(0, target[:NUM_BYTES])
    reader.close()
    assert target[:NUM_BYTES] == DATA


def test_a_disk_error_is_a_source_error_that_names_the_file(served, target):
    with pytest.raises(SourceError, match=r"model\.safetensors cannot be read: .*Input/output"):
        served(Kernel(cached=0, direct=errno.EIO)).read(0, target[:NUM_BYTES])


def test_a_file_that_shrank_since_it_was_listed_is_refused(path):
    file = listed(path)
    os.truncate(path, 4096)
    with pytest.raises(CheckpointError, match=rf"{path} has 4096 bytes, and had {NUM_BYTES}"):
        LocalReader(path.parent, file, StoreSettings())


def test_a_file_that_was_replaced_since_it_was_listed_is_refused(path):
    file = listed(path)
    path.write_bytes(DATA[::-1])
    os.utime(path, ns=(0, 7))
    with pytest.raises(CheckpointError, match=rf"{path} changed after it was listed"):
        LocalReader(path.parent, file, StoreSettings())


def test_an_identity_of_elsewhere_is_not_compared(path, target):
    file = SourceFile(path.name, NUM_BYTES, "s3://bucket/key#etag")
    reader = LocalReader(path.parent, file, StoreSettings())
    reader.read(0, target[:NUM_BYTES])
    reader.close()
    assert target[:NUM_BYTES] == DATA


@pytest.mark.parametrize("num_bytes", [0, 10_000, 45_000])
def test_a_file_that_becomes_shorter_is_named_with_the_byte(path, target, num_bytes):
    reader = opened(path)
    os.truncate(path, num_bytes)
    with pytest.raises(CheckpointError, match=rf"{path} became shorter .* at byte {num_bytes}$"):
        reader.read(0, target[:NUM_BYTES])
    reader.close()


def test_a_file_that_is_written_while_it_is_read_is_refused(path, target):
    reader = opened(path)
    reader.read(0, target[:4096])
    with path.open("r+b") as file:
        file.write(b"new")
    os.utime(path, ns=(0, 7))
    with pytest.raises(CheckpointError, match=rf"{path} changed while it was read"):
        reader.read(4096, target[:4096])
    reader.close()


def test_a_missing_file_is_named(path):
    file = listed(path)
    path.unlink()
    with pytest.raises(CheckpointError, match=rf"{path} is missing"):
        LocalReader(path.parent, file, StoreSettings())


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "link", "pipe", "a\0b"])
def test_a_hostile_name_is_refused(path, name):
    root = path.parent / "root"
    root.mkdir()
    (path.parent / "secret").write_bytes(b"secret")
    (root / "link").symlink_to("../secret")
    os.mkfifo(root / "pipe")
    with pytest.raises(CheckpointError):
        LocalReader(root, SourceFile(name, 6, "elsewhere"), StoreSettings())


def test_every_way_out_leaves_no_descriptor(path):
    def descriptors() -> set[str]:
        return {entry.name for entry in Path("/proc/self/fd").iterdir()}

    before = descriptors()
    reader = opened(path)
    assert len(descriptors()) > len(before)
    reader.close()
    reader.close()
    with pytest.raises(CheckpointError):
        LocalReader(path.parent, SourceFile(path.name, 1, "elsewhere"), StoreSettings())
    assert descriptors() == before


def test_a_reader_says_how_it_is_best_used(path):
    reader = opened(path)
    reader.close()
    assert (reader.preferred_threads, reader.preferred_bytes) == (3, CHUNK_BYTES)
    assert CHUNK_BYTES % reading._ALIGNMENT == 0
