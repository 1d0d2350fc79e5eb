import threading

import numpy as np
import pytest
import xxhash

from flashserve.errors import CheckpointError, SourceError, UnavailableError
from flashserve.store import pipeline
from flashserve.store.pipeline import FileLoad, Run, load, runs

CHUNK = 1000


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(pipeline, "CHUNK_BYTES", CHUNK)


class FakeReader:
    """Reads from bytes; what it was asked for is recorded."""

    preferred_threads = 2

    def __init__(self, data: bytes, preferred_bytes: int = CHUNK) -> None:
        self.data = data
        self.preferred_bytes = preferred_bytes
        self.reads: list[tuple[int, int]] = []
        self.num_closed = 0

    def read(self, begin: int, target: memoryview) -> None:
        self.reads.append((begin, len(target)))
        target[:] = self.data[begin : begin + len(target)]

    def close(self) -> None:
        self.num_closed += 1


class Loaded:
    """One file to be loaded, and what came of it."""

    def __init__(self, data: bytes, name: str = "w", preferred_bytes: int = CHUNK, **options):
        self.data = data
        self.reader = options.pop("reader", None) or FakeReader(data, preferred_bytes)
        self.memory = bytearray(len(data))
        self.chunks: list[tuple[int, bytes, int]] = []
        options.setdefault("memory", memoryview(self.memory))
        self.file = FileLoad(name, len(data), self.reader, on_chunk=self._on_chunk, **options)

    def _on_chunk(self, index: int, data: memoryview, checksum: int) -> None:
        self.chunks.append((index, bytes(data), checksum))

    @property
    def all_chunks(self) -> list[tuple[int, int]]:
        return [(0, index) for index in range(-(-len(self.data) // CHUNK))]


def random_bytes(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def run(loaded: Loaded, order=None, num_threads: int = 2, stopping=None) -> None:
    load(
        [loaded.file],
        loaded.all_chunks if order is None else order,
        num_threads=num_threads,
        stopping=stopping or threading.Event(),
    )


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("size", [0, 1, 999, 1000, 1001, 12_345])
def test_every_chunk_comes_once_with_its_checksum(size, in_place):
    data = random_bytes(size)
    options = {} if in_place else {"memory": None}
    loaded = Loaded(data, preferred_bytes=4 * CHUNK, **options)
    run(loaded, num_threads=3)
    pieces = [data[at : at + CHUNK] for at in range(0, size, CHUNK)]
    assert sorted(loaded.chunks) == [
        (index, piece, xxhash.xxh3_64_intdigest(piece)) for index, piece in enumerate(pieces)
    ]
    assert bytes(loaded.memory) == (data if in_place else bytes(size))


def test_one_thread_keeps_the_order_across_files():
    files = [Loaded(random_bytes(3500, seed), str(seed)) for seed in range(2)]
    order = [(1, 2), (0, 0), (0, 1), (1, 0), (1, 3), (0, 3)]
    seen: list[tuple[int, int]] = []
    for number, each in enumerate(files):
        each.reader.read = lambda at, to, number=number: seen.append((number, at // CHUNK))
    load([each.file for each in files], order, num_threads=1, stopping=threading.Event())
    assert seen == order


def test_neighbours_are_read_in_one_go_as_far_as_the_reader_likes():
    order = [(0, 3), (0, 4), (0, 5), (0, 6), (1, 7), (1, 9), (1, 10), (0, 0)]
    assert runs(order, [3, 8], 1) == (
        Run(0, 3, 3),
        Run(0, 6, 1),
        Run(1, 7, 1),
        Run(1, 9, 2),
        Run(0, 0, 1),
    )


def test_no_thread_is_left_without_a_run():
    assert runs([(0, n) for n in range(4)], [100], 4) == tuple(Run(0, n, 1) for n in range(4))
    assert runs([], [], 4) == ()


def test_the_rate_limit_is_asked_for_every_byte():
    taken: list[int] = []
    run(Loaded(random_bytes(2500), take=taken.append))
    assert sorted(taken) == [500, 1000, 1000]


def known(data: bytes) -> dict[int, int]:
    pieces = (data[at : at + CHUNK] for at in range(0, len(data), CHUNK))
    return {index: xxhash.xxh3_64_intdigest(piece) for index, piece in enumerate(pieces)}


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_damage_is_named_with_its_bytes():
    data = random_bytes(3500)
    loaded = Loaded(flipped(data, 1234), "dir/w.safetensors", known=known(data))
    with pytest.raises(CheckpointError, match=r"dir/w\.safetensors is damaged .* 1000 and 2000"):
        run(loaded)
    assert all(index != 1 for index, *_ in loaded.chunks)


def test_damage_is_fetched_again_once_and_only_there():
    data = random_bytes(3500)
    good = FakeReader(data)
    loaded = Loaded(flipped(data, 3456), known=known(data), again=lambda: good)
    run(loaded)
    assert bytes(loaded.memory) == data
    assert good.reads == [(3000, 500)]
    assert good.num_closed == 1


def test_damage_that_comes_again_is_told():
    data = random_bytes(1500)
    bad = flipped(data, 0)
    again = FakeReader(bad)
    loaded = Loaded(bad, known=known(data), again=lambda: again)
    with pytest.raises(CheckpointError, match="fetched again"):
        run(loaded)
    assert len(again.reads) == again.num_closed == 1


def test_only_known_checksums_are_compared():
    data = random_bytes(3500)
    loaded = Loaded(flipped(data, 0), known={2: known(data)[2]})
    run(loaded)
    assert len(loaded.chunks) == 4


def test_a_failure_ends_all_threads():
    loaded = Loaded(random_bytes(100 * CHUNK))
    read = loaded.reader.read

    def fail(begin: int, target: memoryview) -> None:
        read(begin, target)
        if begin == 3 * CHUNK:
            raise SourceError("w cannot be read")

    loaded.reader.read = fail
    before = threading.active_count()
    with pytest.raises(SourceError):
        run(loaded, num_threads=4)
    assert threading.active_count() == before
    assert (99 * CHUNK, CHUNK) not in loaded.reader.reads


def test_reading_stops_when_told():
    stopping = threading.Event()
    loaded = Loaded(random_bytes(100 * CHUNK), take=lambda _: stopping.set())
    with pytest.raises(UnavailableError):
        run(loaded, stopping=stopping, num_threads=4)
    assert len(loaded.reader.reads) <= 4
    assert loaded.chunks == []


def test_no_view_of_the_memory_is_left_behind():
    loaded = Loaded(random_bytes(5 * CHUNK))
    run(loaded)
    loaded.file.memory.release()
    loaded.memory.extend(b"x")  # raises while anybody has a view
