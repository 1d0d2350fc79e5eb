"""The whole store over a remote source: to DRAM, to disk behind it, and back after a restart."""

import contextlib
import hashlib
import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import xxhash

from flashserve.config import StoreSettings
from flashserve.errors import CheckpointError, ConflictError, SourceError, UnavailableError
from flashserve.store import origin, versions
from flashserve.store.checkpoint.listing import CHUNK_BYTES, Listing, SourceFile
from flashserve.store.sources.local import DirectorySource, list_directory
from flashserve.store.store import StageReport, Store
from flashserve.types import ModelId, ModelSpec, Tier

pytestmark = pytest.mark.integration

MIB = 1 << 20
M = ModelId("m")
URI = "s3://bucket/m"
SETTINGS = StoreSettings(scrub_bytes_per_s=0, disk_bytes=200 * MIB)


class FakeRemote:
    """A remote source over a directory, which can go away, tear off, and counts its reads."""

    lowest_tier = Tier.REMOTE

    def __init__(self, uri: str, directory: Path) -> None:
        self.uri = uri
        self.directory = directory
        self.is_up = True
        self.num_listings = 0
        self.on_listing = lambda: True
        self.fails_at: int | None = None
        self.fails_name = ""
        self.shared_identity = ""
        self.is_protected = True
        self.promises = False
        self.num_flips = 0
        self.reads: list[tuple[str, int]] = []
        self.may_read = threading.Event()
        self.may_read.set()

    def listing(self) -> Listing:
        self.num_listings += 1
        self.on_listing()
        if not self.is_up:
            raise SourceError(f"{self.uri} does not answer")
        found = list_directory(self.uri, self.directory)
        files = tuple(
            SourceFile(file.name, file.num_bytes, self._identity(file), self._digests(file.name))
            for file in found.files
        )
        return Listing(self.uri, f"etag:{found.identity}", files, self.is_protected)

    def _identity(self, file: SourceFile) -> str:
        if file.name.endswith(".safetensors") and file.name != self.fails_name:
            return self.shared_identity or f"etag:{file.identity}"
        return f"etag:{file.identity}"

    def _digests(self, name: str) -> tuple[tuple[str, str], ...]:
        md5 = hashlib.md5((self.directory / name).read_bytes()).hexdigest()
        return (("md5", md5),) if self.promises else ()

    def open(self, file: SourceFile) -> "FakeReader":
        return FakeReader(self, file.name)


class FakeReader:
    preferred_bytes = CHUNK_BYTES
    preferred_threads = 1

    def __init__(self, source: FakeRemote, name: str) -> None:
        self.source = source
        self.name = name

    def read(self, begin: int, target: memoryview) -> None:
        is_weight = self.name.endswith(".safetensors") and len(target) > MIB
        if is_weight:
            self.source.may_read.wait()
            self.source.reads.append((self.name, begin // CHUNK_BYTES))
        fails = begin == self.source.fails_at or self.name == self.source.fails_name
        if not self.source.is_up or (is_weight and fails):
            raise SourceError(f"{self.source.uri}/{self.name} does not answer")
        with (self.source.directory / self.name).open("rb") as file:
            file.seek(begin)
            target[:] = file.read(len(target))
        if is_weight and begin == CHUNK_BYTES and self.source.num_flips:
            self.source.num_flips -= 1
            target[77] ^= 1

    def close(self) -> None:
        pass


@pytest.fixture
def remote(tmp_path, monkeypatch):
    """Layers of 5 MB, so that groups do not end where chunks do: 4 chunks in all."""
    directory = tmp_path / "bucket"
    directory.mkdir()
    random = np.random.default_rng(0)
    names = [
        "model.embed_tokens.weight",
        *(f"model.layers.{n}.w" for n in range(4)),
        "lm_head.weight",
    ]
    tensors = {name: random.integers(0, 256, 5_000_000, np.uint8) for name in names}
    safetensors.numpy.save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text("{}")
    (directory / "tokenizer.json").write_text("{}")
    source = FakeRemote(URI, directory)

    def open_source(uri: str, data_dir: Path, settings: StoreSettings):
        return source if uri == URI else DirectorySource(uri, Path(uri), settings)

    monkeypatch.setattr(origin, "open_source", open_source)
    return source


@contextlib.contextmanager
def running(tmp_path, settings=SETTINGS):
    store = Store(tmp_path / "data", 128 * MIB, False, settings)
    try:
        yield store
    finally:
        store.close()


def spec(name: str = "m", uri: str = URI) -> ModelSpec:
    return ModelSpec(ModelId(name), uri, 0, Tier.REMOTE)


class Recorder:
    def __init__(self) -> None:
        self.calls: list[tuple] = []
        self.came = threading.Event()

    def damaged(self, *call) -> None:
        self.calls.append(("damaged", *call))
        self.came.set()

    def on_disk(self, model_id, num_bytes, seconds) -> None:
        self.calls.append(("on_disk", model_id, num_bytes))
        self.came.set()

    def left_disk(self, model_id) -> None:
        self.calls.append(("left_disk", model_id))


def image(store: Store, name: str = "m") -> bytes:
    with store.lease(ModelId(name)) as lease:
        return store.arena._map[lease.offset :][: lease.snapshot.size_bytes]


def weights(remote: FakeRemote) -> bytes:
    return (remote.directory / "model.safetensors").read_bytes()


def stage_and_write(store: Store, remote: FakeRemote) -> None:
    store.listener = listener = Recorder()
    assert store.stage(spec(), Tier.DRAM).num_bytes == len(weights(remote))
    listener.came.wait()
    assert listener.calls[0][:2] == ("on_disk", M)


def test_a_remote_model_comes_to_dram_then_to_disk_and_is_there_after_a_restart(tmp_path, remote):
    with running(tmp_path) as store:
        stage_and_write(store, remote)
        assert image(store) == weights(remote)
        assert store.evict(M, Tier.DRAM) == 30 * MIB
        assert store.tier(spec()) is Tier.DISK
        tokenizers = store.inspect(URI).directory
    remote.reads.clear()
    remote.is_up = False
    with running(tmp_path) as store:
        assert store.stage(spec(), Tier.DRAM).fetch_s < 60
        assert image(store) == weights(remote)
        assert remote.reads == []
        assert store.residents()[M].disk_bytes > len(weights(remote))
        assert store.snapshot(M).directory == tokenizers
        assert (tokenizers / "tokenizer.json").read_text() == "{}"


def test_groups_open_while_the_rest_is_on_its_way(tmp_path, remote):
    remote.may_read.clear()
    with running(tmp_path) as store, store.hold(spec()) as lease:
        told: list[int] = []
        lease.arrival.subscribe(told.append)
        assert told == [0]
        with pytest.raises(ConflictError, match="not in DRAM"):
            store.lease(M)
        with pytest.raises(ConflictError, match="being staged"):
            store.evict(M, Tier.DRAM)
        remote.may_read.set()
        assert lease.arrival.wait().num_bytes == len(weights(remote))
        assert told == sorted(set(told))
        assert told[-1] == lease.arrival.num_groups == 6


def test_who_joins_a_fetch_waits_for_a_fetch(tmp_path, remote):
    remote.may_read.clear()
    with running(tmp_path) as store, store.hold(spec()) as first, store.hold(spec("n")) as second:
        assert first.arrival.is_fetched
        assert second.arrival.is_fetched
        remote.may_read.set()
        reports = first.arrival.wait(), second.arrival.wait()
        assert [report.num_bytes for report in reports] == [len(weights(remote)), 0]
        assert all(report.fetch_s > 0 and not report.dram_s for report in reports)
        with store.hold(spec("late")) as late:
            assert not late.arrival.is_fetched


def test_an_interrupted_fetch_goes_on_where_it_was(tmp_path, remote):
    remote.fails_at = 3 * CHUNK_BYTES
    with running(tmp_path) as store:
        with pytest.raises(SourceError):
            store.stage(spec(), Tier.DRAM)
        assert store.usage().used == 0
        assert store.tier(spec()) is Tier.REMOTE
        first = set(remote.reads)
        remote.fails_at = None
        remote.reads.clear()
        stage_and_write(store, remote)
        assert image(store) == weights(remote)
    assert remote.reads
    assert set(remote.reads).isdisjoint(first - {("model.safetensors", 3)})


def test_staging_to_disk_takes_no_room_in_dram(tmp_path, remote):
    with running(tmp_path) as store:
        assert store.stage(spec(), Tier.DISK).num_bytes > len(weights(remote))
        assert store.usage().used == 0
        assert store.stage(spec(), Tier.DISK).num_bytes == 0
        assert store.tier(spec()) is Tier.DISK
        remote.reads.clear()
        store.stage(spec(), Tier.DRAM)
        assert image(store) == weights(remote)
        assert remote.reads == []
        store.listener = listener = Recorder()
        store.evict(M, Tier.DISK)
        assert listener.calls == [("left_disk", M)]
        assert store.tier(spec()) is Tier.REMOTE
        assert store.disk_usage().used == 0


def test_a_chunk_that_rotted_on_disk_is_fetched_again(tmp_path, remote):
    with running(tmp_path) as store:
        store.stage(spec(), Tier.DISK)
        path = store._origins.on_disk(URI).directory / "model.safetensors"
        with path.open("r+b") as file:
            file.seek(CHUNK_BYTES + 5)
            byte = file.read(1)[0]
            file.seek(CHUNK_BYTES + 5)
            file.write(bytes([byte ^ 1]))
        remote.reads.clear()
        store.stage(spec(), Tier.DRAM)
        assert image(store) == weights(remote)
        assert remote.reads == [("model.safetensors", 1)]


def test_a_full_disk_does_not_keep_a_model_from_dram(tmp_path, remote, caplog):
    small = StoreSettings(scrub_bytes_per_s=0, disk_bytes=MIB)
    with running(tmp_path, small) as store:
        store.stage(spec(), Tier.DRAM)
        assert image(store) == weights(remote)
        assert store.tier(spec()) is Tier.DRAM
        with pytest.raises(UnavailableError, match="disk"):
            store.stage(spec("other"), Tier.DISK)
    assert sum("not kept on disk" in record.getMessage() for record in caplog.records) == 1


def test_models_share_equal_files_and_what_arrives_of_them(tmp_path, remote):
    shared = remote.directory / "model.safetensors"
    for name in ("one", "two"):
        place = tmp_path / "hub" / "snapshots" / name
        place.mkdir(parents=True)
        (place / "config.json").write_text(f'{{"name": "{name}"}}')
        blobs = tmp_path / "hub" / "blobs"
        blobs.mkdir(exist_ok=True)
        if not (blobs / "w").exists():
            (blobs / "w").hardlink_to(shared)
        (place / "model.safetensors").symlink_to(blobs / "w")
    one, two = (str(tmp_path / "hub" / "snapshots" / name) for name in ("one", "two"))
    with running(tmp_path) as store:
        store.stage(spec("one", one), Tier.DRAM)
        assert store.stage(spec("two", two), Tier.DRAM).num_bytes == 0
        assert store.extents(ModelId("one")) == store.extents(ModelId("two"))
        assert store.snapshot(ModelId("two")).config == {"name": "two"}
        assert store.evict(ModelId("one"), Tier.DRAM) == 0
        assert image(store, "two") == weights(remote)
        assert store.evict(ModelId("two"), Tier.DRAM) == 30 * MIB


def test_damage_in_dram_is_found_by_the_scrub_and_read_anew(tmp_path, remote):
    with running(tmp_path, StoreSettings(scrub_bytes_per_s=1 << 40)) as store:
        stage_and_write(store, remote)
        store.listener = listener = Recorder()
        with store.lease(M) as lease:
            store.arena._map[lease.offset + 9_000_000] ^= 1
            listener.came.wait()
            assert store.usage().used == 30 * MIB
        (kind, models, message), *_ = listener.calls
        assert (kind, models) == ("damaged", (M,))
        assert f"{CHUNK_BYTES} and {2 * CHUNK_BYTES}" in message
        assert store.usage().used == 0
        assert store.tier(spec()) is Tier.DISK
        store.stage(spec(), Tier.DRAM)
        assert image(store) == weights(remote)


def test_a_local_file_that_rotted_is_named(tmp_path, remote):
    """Its size and times say that it is what was read before; its bytes do not."""
    path = remote.directory / "model.safetensors"
    local = spec("local", str(remote.directory))
    with running(tmp_path) as store:
        store.stage(local, Tier.DRAM)
        store.evict(ModelId("local"), Tier.DRAM)
        times = path.stat()
        with path.open("r+b") as file:
            file.seek(20_000_000)
            byte = file.read(1)[0]
            file.seek(20_000_000)
            file.write(bytes([byte ^ 1]))
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
            store.stage(local, Tier.DRAM)
        assert store.usage().used == 0


@pytest.mark.parametrize(("verify", "is_protected"), [("always", True), ("auto", False)])
def test_a_bit_that_flips_in_transit_is_found_and_fetched_again_before_it_serves(
    tmp_path, remote, verify, is_protected, caplog
):
    remote.promises, remote.is_protected, remote.num_flips = True, is_protected, 1
    with running(tmp_path, SETTINGS.model_copy(update={"verify_fetches": verify})) as store:
        with store.hold(spec()) as lease:
            lease.arrival.subscribe(lambda _: None)
            lease.arrival.wait()
            assert image(store) == weights(remote)
        assert "model.safetensors was damaged on its way here: its md5" in caplog.text
        store.evict(M, Tier.DRAM)
        remote.reads.clear()
        store.stage(spec(), Tier.DRAM)
        assert image(store) == weights(remote)
        assert remote.reads == []  # the copy on disk is the second, good one


def test_nothing_opens_before_an_unprotected_fetch_is_proved(tmp_path, remote):
    remote.promises, remote.is_protected = True, False
    remote.may_read.clear()
    opened: list[int] = []
    with running(tmp_path) as store, store.hold(spec()) as lease:
        lease.arrival.subscribe(lambda num_open: opened.append((num_open, len(remote.reads))))
        remote.may_read.set()
        lease.arrival.wait()
        assert {num_reads for num_open, num_reads in opened if num_open} == {4}


def test_a_fetch_that_is_proved_first_is_summed_up_once(tmp_path, remote, monkeypatch):
    remote.promises, summed, digest = True, [], xxhash.xxh3_64_intdigest

    def sum_up(data) -> int:
        summed.append(len(data))
        return digest(data)

    monkeypatch.setattr(xxhash, "xxh3_64_intdigest", sum_up)
    settings = {"verify_fetches": "always", "disk_bytes": MIB}  # no room for a copy on disk
    with running(tmp_path, SETTINGS.model_copy(update=settings)) as store:
        store.stage(spec(), Tier.DRAM)
        assert sum(size for size in summed if size > MIB) == len(weights(remote))
        store.verify(M)


def test_a_fetch_that_is_damaged_twice_is_refused_and_leaves_nothing(tmp_path, remote):
    remote.promises, remote.is_protected, remote.num_flips = True, False, 2
    with running(tmp_path) as store:
        with pytest.raises(CheckpointError, match=r"m/model\.safetensors is damaged.*twice"):
            store.stage(spec(), Tier.DRAM)
        assert store.usage().used == 0
        store.stage(spec(), Tier.DRAM)  # what was kept for resuming does not spoil the next one
        assert image(store) == weights(remote)


def test_damage_that_is_found_behind_withdraws_the_model_from_dram_and_disk(tmp_path, remote):
    remote.promises, remote.num_flips = True, 1
    with running(tmp_path) as store:
        store.listener = listener = Recorder()
        store.stage(spec(), Tier.DRAM)
        while not any(call[0] == "damaged" for call in listener.calls):
            listener.came.wait()
            listener.came.clear()
        (call,) = (call for call in listener.calls if call[0] == "damaged")
        assert call[1] == (M,)
        assert "was damaged on its way here: its md5" in call[2]
        assert store.tier(spec()) is Tier.REMOTE
        store.stage(spec(), Tier.DRAM)
        assert image(store) == weights(remote)


def test_files_of_equal_bytes_become_one_when_nobody_leases_the_other(tmp_path, remote):
    for name in ("one", "two"):
        place = tmp_path / name
        place.mkdir()
        (place / "config.json").write_text("{}")
        (place / "model.safetensors").write_bytes(weights(remote))
    one, two = ModelId("one"), ModelId("two")
    with running(tmp_path) as store:
        for name in (one, two):
            store.stage(spec(name, str(tmp_path / name)), Tier.DRAM)
        held = store.lease(two)
        while not all(file.digest for file in store._shelf.files()):
            time.sleep(0.01)
        assert store.usage().used == 60 * MIB
        held.release()
        assert store.usage().used == 30 * MIB
        assert store.extents(one) == store.extents(two)
        assert image(store, "two") == weights(remote)
        assert store.evict(one, Tier.DRAM) == 0
        assert store.evict(two, Tier.DRAM) == 30 * MIB
        assert store.usage().used == 0


def until(fact) -> None:
    """For what a thread of the store does, and nobody tells."""
    while not fact():
        time.sleep(0.002)


def test_a_model_in_dram_is_leased_without_asking_its_source(tmp_path, remote, caplog):
    """Stale while revalidate: the source is looked at behind, and failing does no harm."""
    with running(tmp_path, SETTINGS.model_copy(update={"recheck_s": 3600.0})) as store:
        store.stage(spec(), Tier.DRAM)
        remote.num_listings = 0
        remote.is_up = False
        for name in ("m", "other"):
            with store.hold(spec(name)) as lease:
                assert lease.arrival.wait() == StageReport()
                assert lease.snapshot.uri == URI
        assert store.extents(M) == store.extents(ModelId("other"))
        assert remote.num_listings == 0
        store._versions._recheck_s = 0.0
        for num_looks in (1, 2):
            store.hold(spec()).release()
            until(lambda n=num_looks: remote.num_listings == n and not store._versions._queued)
        lines = [record.getMessage() for record in caplog.records]
        assert lines[-2:] == [f"{URI}: serving the copy in memory: {URI} does not answer"] * 2
        with store.hold(spec()) as lease:
            assert image(store) == weights(remote)


def test_a_source_that_changed_is_read_by_the_start_after_the_look(tmp_path, remote):
    with running(tmp_path, SETTINGS.model_copy(update={"recheck_s": 0.0})) as store:
        stage_and_write(store, remote)
        old = weights(remote)
        (remote.directory / "model.safetensors").write_bytes(old[:-1] + bytes([old[-1] ^ 1]))
        with store.hold(spec()) as stale:
            assert image(store) == old
            until(lambda: not store._versions._queued)
            with store.hold(spec()) as fresh:
                assert fresh.arrival.wait().num_bytes == len(old)
                assert image(store) == weights(remote) != old
                assert store.arena._map[stale.offset :][: len(old)] == old
        assert store.usage().used == 30 * MIB


def test_staging_asks_the_source_whatever_was_seen_of_it(tmp_path, remote):
    with running(tmp_path) as store:
        store.stage(spec(), Tier.DRAM)
        old = weights(remote)
        assert store.stage(spec(), Tier.DRAM).num_bytes == 0
        (remote.directory / "model.safetensors").write_bytes(old[:-1] + bytes([old[-1] ^ 1]))
        assert store.stage(spec(), Tier.DRAM).num_bytes == len(old)
        assert image(store) == weights(remote)


def test_what_was_evicted_or_deleted_asks_its_source_again(tmp_path, remote):
    with running(tmp_path) as store:
        for leave in (lambda: store.evict(M, Tier.DRAM), lambda: store.forget(M)):
            store.stage(spec(), Tier.DRAM)
            leave()
            remote.num_listings = 0
            with store.hold(spec()) as lease:
                lease.arrival.wait()
            assert remote.num_listings == 1
        store.forget(M)
        assert store._versions.current(URI) is None


def test_a_look_that_hangs_does_not_keep_the_store_from_closing(tmp_path, remote, monkeypatch):
    monkeypatch.setattr(versions, "_CLOSE_S", 0.0)
    may_answer = threading.Event()
    store = Store(tmp_path / "data", 128 * MIB, False, SETTINGS)
    store._versions._recheck_s = 0.0
    store.stage(spec(), Tier.DRAM)
    remote.on_listing = may_answer.wait
    store.hold(spec()).release()
    store.close()
    may_answer.set()
    store._versions._thread.join()


@pytest.fixture
def twins(tmp_path, remote, monkeypatch):
    """Two remote sources whose weights are known to be the same file, under two names, before a
    byte is read; the rest of them differs.
    """
    sources = {}
    for name in ("one", "two"):
        place = tmp_path / name
        place.mkdir()
        (place / "config.json").write_text(f'{{"name": "{name}"}}')
        (place / "model.safetensors").hardlink_to(remote.directory / "model.safetensors")
        uri = f"s3://bucket/{name}"
        sources[uri] = FakeRemote(uri, place)
        sources[uri].shared_identity = "sha256:shared"
    monkeypatch.setattr(origin, "open_source", lambda uri, *_: sources[uri])
    return sources.values()


@contextlib.contextmanager
def joined(store: Store, twins):
    """Both are held, and what the first one reads is what the second one waits for."""
    one, two = twins
    one.may_read.clear()
    with store.hold(spec("one", one.uri)) as first, store.hold(spec("two", two.uri)) as second:
        assert first.extents == second.extents
        yield first, second


def test_a_model_that_waits_for_the_read_of_another_goes_on_by_itself(tmp_path, twins):
    one, two = twins
    one.fails_at = 2 * CHUNK_BYTES
    with running(tmp_path) as store, joined(store, twins) as (first, second):
        one.may_read.set()
        assert second.arrival.wait().num_bytes == 0
        first.arrival.wait()  # the bytes are its own as well
        assert image(store, "two") == weights(two)
        read = {index for _, index in one.reads} - {2}
        assert {index for _, index in two.reads} == {0, 1, 2, 3} - read
        assert store.usage().used == 30 * MIB
        store.verify(ModelId("two"))


def test_what_a_read_that_was_damaged_brought_is_compared_by_who_goes_on(tmp_path, twins):
    one, two = twins
    for source in twins:
        source.promises = True
    one.is_protected, one.num_flips = False, 2  # damaged twice: refused
    with running(tmp_path) as store, joined(store, twins) as (_, second):
        one.may_read.set()
        second.arrival.wait()
        assert image(store, "two") == weights(two)
        assert {index for _, index in two.reads} == {0, 1, 2, 3}


def test_each_source_is_tried_once(tmp_path, twins):
    one, two = twins
    one.fails_at = two.fails_at = CHUNK_BYTES
    with running(tmp_path) as store:
        with joined(store, twins) as (first, second):
            third = store.hold(spec("third", one.uri))
            one.may_read.set()
            for lease in (first, second, third):
                with pytest.raises(SourceError, match=r"two/model\.safetensors does not answer"):
                    lease.arrival.wait()
            third.release()
        until(lambda: store.usage().used == 0)  # the disk is written behind
        for source in twins:
            assert [index for _, index in source.reads].count(1) == 1


def test_a_file_that_only_the_failed_read_needs_goes_with_it(tmp_path, twins):
    """The first model has a shard of its own, which fails it alone; the other has another name."""
    one, two = twins
    shared, own = (one.directory / f"model-{n}.safetensors" for n in ("shared", "own"))
    (one.directory / "model.safetensors").rename(shared)
    safetensors.numpy.save_file({"own": np.zeros(2 * MIB, np.uint8)}, own)
    placed = dict.fromkeys(safetensors.numpy.load_file(shared), shared.name)
    index = json.dumps({"weight_map": {**placed, "own": own.name}})
    (one.directory / "model.safetensors.index.json").write_text(index)
    one.fails_name = own.name
    with running(tmp_path) as store:
        one.may_read.clear()
        with store.hold(spec("one", one.uri)) as first, store.hold(spec("two", two.uri)) as second:
            assert second.extents[0] in first.extents
            one.may_read.set()
            with pytest.raises(SourceError, match="model-own"):
                first.arrival.wait()
            second.arrival.wait()
            assert image(store, "two") == weights(two)
            with pytest.raises(ConflictError):
                store.lease(ModelId("one"))
        assert store.usage().used == 30 * MIB


def test_a_model_that_is_wanted_again_while_its_read_is_stopped_is_read(tmp_path, remote):
    remote.may_read.clear()
    with running(tmp_path) as store:
        store.hold(spec()).release()
        store.forget(M)  # nobody needs it: the read is told to stop
        with store.hold(spec()) as again:
            remote.may_read.set()
            again.arrival.wait()
            assert image(store) == weights(remote)
