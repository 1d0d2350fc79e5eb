"""What a store says of its tiers, against what was done to it."""

import threading
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from flashserve.config import StoreSettings
from flashserve.errors import CheckpointError
from flashserve.store import origin
from flashserve.store.checkpoint.listing import CHUNK_BYTES, Listing, SourceFile
from flashserve.store.dram.arena import Arena
from flashserve.store.dram.memory import huge_page_bytes
from flashserve.store.sources.local import DirectorySource
from flashserve.store.store import Store
from flashserve.types import ModelId, ModelSpec, Tier

pytestmark = pytest.mark.integration

MIB = 1 << 20
A, B = ModelId("a"), ModelId("b")
NUM_BYTES = 2 * CHUNK_BYTES + 5


@pytest.fixture
def checkpoint(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    data = np.random.default_rng(0).integers(0, 256, NUM_BYTES, np.uint8)
    safetensors.numpy.save_file({"w": data}, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    return directory


@pytest.fixture
def store(tmp_path):
    settings = StoreSettings(scrub_bytes_per_s=0, disk_bytes=200 * MIB)
    store = Store(tmp_path / "data", 64 * MIB, False, settings)
    yield store
    store.close()


def size(directory: Path) -> int:
    return (directory / "model.safetensors").stat().st_size


def local(name: ModelId, directory: Path) -> ModelSpec:
    return ModelSpec(name, str(directory), size(directory))


def test_shared_bytes_count_once_and_models_leases_and_evictions_each(store, checkpoint):
    for name in (A, B):
        store.stage(local(name, checkpoint), Tier.DRAM)
    with store.lease(A):
        dram = store.report().dram
        assert (dram.total_bytes, dram.used_bytes, dram.free_bytes) == (
            64 * MIB,
            18 * MIB,
            46 * MIB,
        )
        assert (dram.num_models, dram.num_leases, dram.num_evicted) == (2, 1, 0)
    for name in (A, A, B):
        store.evict(name, Tier.DRAM)
    dram = store.report().dram
    assert (dram.used_bytes, dram.num_models, dram.num_leases, dram.num_evicted) == (0, 0, 0, 2)
    assert store.report().read_bytes == {Tier.REMOTE: 0, Tier.DISK: size(checkpoint)}


def test_damage_is_counted(store, checkpoint):
    store.stage(local(A, checkpoint), Tier.DRAM)
    store.arena._map[CHUNK_BYTES + 9] ^= 1
    with pytest.raises(CheckpointError, match="damaged"):
        store.verify(A)
    report = store.report()
    assert report.dram.num_damaged == 1
    assert report.dram.num_models == 0


def test_a_scrub_says_how_far_its_round_is(store, checkpoint):
    store.stage(local(A, checkpoint), Tier.DRAM)
    guard = store._guard
    assert store.report().scrub.ended_s is None
    assert guard.next_piece() is None  # a round begins with the next call
    done = []
    while piece := guard.next_piece():
        with piece.view:
            done.append(store.report().scrub.done_bytes)
    assert done == [CHUNK_BYTES, 2 * CHUNK_BYTES, size(checkpoint)]
    scrub = store.report().scrub
    assert (scrub.round_bytes, scrub.num_rounds, scrub.done_bytes) == (size(checkpoint), 1, 0)
    assert scrub.ended_s is not None
    assert scrub.ended_s >= 0


def test_a_disk_tier_that_another_process_has_is_not_reported(tmp_path, store):
    assert store.report().disk is not None
    other = Store(tmp_path / "data", 4 * MIB, False, StoreSettings(scrub_bytes_per_s=0))
    try:
        assert other.report().disk is None
    finally:
        other.close()


class SlowRemote:
    """A directory far away, whose weights come when they may."""

    lowest_tier = Tier.REMOTE
    preferred_bytes = CHUNK_BYTES
    preferred_threads = 1

    def __init__(self, uri: str, directory: Path) -> None:
        self.uri = uri
        self.directory = directory
        self.turns = threading.Semaphore(0)
        self.asked = threading.Semaphore(0)

    def listing(self) -> Listing:
        files = tuple(
            SourceFile(path.name, path.stat().st_size, f"etag:{path.name}")
            for path in sorted(self.directory.iterdir())
        )
        return Listing(self.uri, "etag:all", files)

    def open(self, file: SourceFile) -> "SlowReader":
        return SlowReader(self, file.name)


class SlowReader:
    preferred_bytes = CHUNK_BYTES
    preferred_threads = 1

    def __init__(self, source: SlowRemote, name: str) -> None:
        self._source = source
        self._path = source.directory / name

    def read(self, begin: int, target: memoryview) -> None:
        if len(target) == CHUNK_BYTES:
            self._source.asked.release()
            self._source.turns.acquire()
        with self._path.open("rb") as file:
            file.seek(begin)
            target[:] = file.read(len(target))

    def close(self) -> None:
        pass


@pytest.mark.parametrize("tier", [Tier.DRAM, Tier.DISK])
def test_a_fetch_under_way_shows_source_and_progress(monkeypatch, store, checkpoint, tier):
    uri = "s3://bucket/m"
    remote = SlowRemote(uri, checkpoint)

    def open_source(name: str, data_dir: Path, settings: StoreSettings):
        return remote if name == uri else DirectorySource(name, Path(name), settings)

    monkeypatch.setattr(origin, "open_source", open_source)
    monkeypatch.setattr(store._origins, "_settings", StoreSettings(remote_connections=1))
    spec = ModelSpec(A, uri, size(checkpoint), Tier.REMOTE)
    stage = threading.Thread(target=store.stage, args=(spec, tier))
    stage.start()
    remote.asked.acquire()
    remote.turns.release()
    remote.asked.acquire()  # the first chunk is done when the second is asked for
    (fetch,) = store.report().fetches
    remote.turns.release()
    stage.join()
    assert (fetch.model_id, fetch.source, fetch.from_tier, fetch.to_tier) == (
        A,
        uri,
        Tier.REMOTE,
        tier,
    )
    assert CHUNK_BYTES <= fetch.done_bytes < fetch.total_bytes == size(checkpoint)
    assert fetch.bytes_per_s > 0
    report = store.report()
    assert report.fetches == ()
    assert report.read_bytes == {Tier.REMOTE: size(checkpoint), Tier.DISK: 0}


def test_prefault_goes_on_until_all_is_there():
    arena = Arena(16 * MIB, prefault=True)
    try:
        arena._prefaulter._thread.join()
        assert not arena.is_prefaulting
        assert arena.prefaulted_bytes == 16 * MIB or arena.prefault_refusal
        assert 0 <= arena.huge_page_bytes() <= 16 * MIB
    finally:
        arena.close()
    without = Arena(4 * MIB)
    assert not without.is_prefaulting
    without.close()


def test_huge_pages_are_those_of_the_mapping_at_the_address(tmp_path):
    smaps = tmp_path / "smaps"
    smaps.write_text(
        "7f0000000000-7f0000400000 rw-s 00000000 00:01 1 /memfd:other\n"
        "Size: 4096 kB\nShmemPmdMapped: 4096 kB\n"
        "7f0000800000-7f0001000000 rw-s 00000000 00:01 2 /memfd:flashserve-arena\n"
        "Size: 8192 kB\nShmemPmdMapped:     2048 kB\nVmFlags: rd wr sh\n"
    )
    assert huge_page_bytes(0x7F0000800000, smaps) == 2 * MIB
    assert huge_page_bytes(0x7F0000900000, smaps) == 0
    assert huge_page_bytes(0x7F0000800000, tmp_path / "missing") == 0
