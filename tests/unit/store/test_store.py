import concurrent.futures
import contextlib
import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path

import hypothesis
import hypothesis.stateful
import pytest
from hypothesis import strategies as st

from flashserve.errors import (
    CheckpointError,
    ConflictError,
    FlashServeError,
    InputError,
    InternalError,
    ModelTooLargeError,
    SourceError,
    UnavailableError,
)
from flashserve.store import pipeline
from flashserve.store.digest import OnDone, Pieces
from flashserve.store.dram.arena import EXTENT_ALIGNMENT as PAGE
from flashserve.store.sources.reading import LocalReader
from flashserve.store.store import Lease, StageReport, Store
from flashserve.types import ModelId, ModelSpec, Tier


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "data", 8 * PAGE, prefault=False)
    yield store
    store.close()


def spec(directory: Path, name: str = "m") -> ModelSpec:
    return ModelSpec(ModelId(name), str(directory), 0)


M = ModelId("m")
OTHER = ModelId("other")


def image_bytes(store: Store, model_id: ModelId) -> bytes:
    with store.lease(model_id) as lease, memoryview(store.arena._map) as memory:
        return bytes(memory[lease.offset : lease.offset + lease.snapshot.layout.image_bytes])


def test_staging_brings_the_file_into_dram(tmp_path, store, write_checkpoint):
    directory = write_checkpoint(tmp_path / "model")
    data = (directory / "model.safetensors").read_bytes()
    report = store.stage(spec(directory), Tier.DRAM)
    assert report.num_bytes == len(data)
    assert report.dram_s > 0
    assert image_bytes(store, M)[: len(data)] == data
    assert store.tier(spec(directory)) is Tier.DRAM
    assert store.dram_bytes(M) == store.usage().used == PAGE
    assert store.extents(M) == ((0, PAGE),)
    store.verify(M)


def test_tensors_lie_in_the_arena_as_in_the_files(tmp_path, store, write_checkpoint, two_shards):
    write_checkpoint(tmp_path / "filler", seed=1)
    store.stage(spec(tmp_path / "filler", "filler"), Tier.DRAM)
    store.stage(spec(write_checkpoint(tmp_path / "model", two_shards)), Tier.DRAM)
    wanted = {name: value for shard in two_shards.values() for name, value in shard.items()}
    with store.lease(M) as lease, memoryview(store.arena._map) as memory:
        assert lease.tensors == store.tensors(M)
        found = {
            each.name: bytes(memory[each.offset : each.offset + each.num_bytes])
            for each in lease.tensors
        }
    assert found == {name: value.tobytes() for name, value in wanted.items()}


def test_a_hit_moves_nothing(tmp_path, store, write_checkpoint, monkeypatch):
    model = spec(write_checkpoint(tmp_path / "model"))
    store.stage(model, Tier.DRAM)
    monkeypatch.setattr(LocalReader, "read", None)
    assert store.stage(model, Tier.DRAM) == StageReport()


def test_two_models_of_one_source_share_their_bytes(tmp_path, store, write_checkpoint):
    directory = write_checkpoint(tmp_path / "model")
    (tmp_path / "link").symlink_to(directory)
    store.stage(spec(directory), Tier.DRAM)
    assert store.stage(spec(tmp_path / "link", "other"), Tier.DRAM) == StageReport()
    assert store.usage().used == PAGE
    assert store.extents(M) == store.extents(OTHER)
    assert store.evict(M, Tier.DRAM) == 0
    assert store.tier(spec(directory)) is Tier.DISK
    store.verify(OTHER)
    assert store.evict(OTHER, Tier.DRAM) == PAGE


def test_staging_to_disk_only_asks_for_the_files(tmp_path, store, write_checkpoint):
    assert store.stage(spec(write_checkpoint(tmp_path / "model")), Tier.DISK).num_bytes == 0
    assert store.usage().used == 0
    with pytest.raises(SourceError):
        store.stage(spec(tmp_path / "missing"), Tier.DISK)


@pytest.mark.parametrize("tier", [Tier.REMOTE, Tier.DEVICE])
def test_other_tiers_cannot_be_staged_to(tmp_path, store, write_checkpoint, tier):
    with pytest.raises(InputError, match=tier.label):
        store.stage(spec(write_checkpoint(tmp_path / "model")), tier)


def test_many_callers_share_one_read(tmp_path, store, write_checkpoint, monkeypatch):
    directory = write_checkpoint(tmp_path / "model")
    read, num_reads, held = LocalReader.read, [], threading.Semaphore(0)

    def read_when_all_hold(reader: LocalReader, begin: int, target: memoryview) -> None:
        if len(target) == size:
            num_reads.append(1)
            for _ in range(8):
                held.acquire()
        read(reader, begin, target)

    size = (directory / "model.safetensors").stat().st_size
    monkeypatch.setattr(LocalReader, "read", read_when_all_hold)
    progress: list[tuple[int, int]] = []

    def stage(index: int) -> StageReport:
        model = spec(directory, f"m{index}")
        with store._read(model, lambda *call: progress.append((index, *call))) as lease:
            held.release()
            return lease.arrival.wait()

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        reports = list(pool.map(stage, range(8)))
    assert num_reads == [1]
    assert sorted(report.num_bytes for report in reports) == [0] * 7 + [size]
    assert sorted(progress) == [(index, size, size) for index in range(8)]
    assert store.usage().used == PAGE
    assert {store.extents(ModelId(f"m{index}")) for index in range(8)} == {((0, PAGE),)}


def test_everybody_hears_of_a_failed_read(tmp_path, store, write_checkpoint, monkeypatch):
    directory = write_checkpoint(tmp_path / "model")
    may_fail = threading.Event()

    def fail(*_: object) -> None:
        may_fail.wait()
        raise SourceError("disk on fire")

    monkeypatch.setattr(LocalReader, "read", fail)
    first, second = store.hold(spec(directory)), store.hold(spec(directory, "other"))
    told: list[int] = []
    second.arrival.subscribe(told.append)
    may_fail.set()
    for lease in (first, second):
        with pytest.raises(SourceError, match="disk on fire"), lease:
            lease.arrival.wait()
    assert told == [0, -1]
    assert store.usage().used == 0
    assert store.tier(spec(directory)) is Tier.DISK


def test_a_failed_read_leaves_nothing_and_can_be_repeated(
    tmp_path, store, write_checkpoint, monkeypatch
):
    model = spec(write_checkpoint(tmp_path / "model"))
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "checksum", lambda data: 1 // 0)
        with pytest.raises(InternalError, match="ZeroDivision"):
            store.stage(model, Tier.DRAM)
    assert store.usage().used == 0
    assert store.dram_bytes(M) == 0
    with pytest.raises(ConflictError, match="not in DRAM"):
        store.lease(M)
    store.stage(model, Tier.DRAM)
    store.verify(M)


def test_a_source_that_changed_is_read_again(tmp_path, store, write_checkpoint):
    directory = write_checkpoint(tmp_path / "model", seed=1)
    store.stage(spec(directory), Tier.DRAM)
    write_checkpoint(directory, 3000, seed=2)
    report = store.stage(spec(directory), Tier.DRAM)
    data = (directory / "model.safetensors").read_bytes()
    assert report.num_bytes == len(data)
    assert image_bytes(store, M)[: len(data)] == data
    assert store.usage().used == PAGE


def test_old_bytes_stay_while_they_are_leased(tmp_path, store, write_checkpoint):
    directory = write_checkpoint(tmp_path / "model", seed=1)
    old = (directory / "model.safetensors").read_bytes()
    store.stage(spec(directory), Tier.DRAM)
    lease = store.lease(M)
    write_checkpoint(directory, seed=2)
    store.stage(spec(directory), Tier.DRAM)
    assert store.usage().used == 2 * PAGE
    assert store.extents(M) != lease.extents
    with memoryview(store.arena._map) as memory:
        assert memory[lease.offset : lease.offset + len(old)] == old
    lease.release()
    assert store.usage().used == PAGE
    store.verify(M)


def test_a_source_that_changes_while_it_is_read_is_refused(
    tmp_path, store, write_checkpoint, monkeypatch
):
    directory = write_checkpoint(tmp_path / "model")
    read = LocalReader.read

    def meddle(reader: LocalReader, *args: object) -> None:
        read(reader, *args)
        (directory / "tokenizer.json").write_text("{}")

    monkeypatch.setattr(LocalReader, "read", meddle)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        store.stage(spec(directory), Tier.DRAM)
    assert store.usage().used == 0


def test_a_leased_model_is_not_evicted(tmp_path, store, write_checkpoint):
    store.stage(spec(write_checkpoint(tmp_path / "model")), Tier.DRAM)
    first, second = store.lease(M), store.lease(M)
    first.release()
    first.release()
    with pytest.raises(ConflictError, match="in use"):
        store.evict(M, Tier.DRAM)
    second.release()
    assert store.evict(M, Tier.DISK) == PAGE
    assert store.evict(M, Tier.DRAM) == 0


def test_evicting_the_device_tier_is_not_the_stores_work(tmp_path, store, write_checkpoint):
    store.stage(spec(write_checkpoint(tmp_path / "model")), Tier.DRAM)
    assert store.evict(M, Tier.DEVICE) == 0
    assert store.dram_bytes(M) == PAGE


def test_a_forgotten_model_goes_with_its_last_lease(tmp_path, store, write_checkpoint):
    directory = write_checkpoint(tmp_path / "model")
    store.stage(spec(directory), Tier.DRAM)
    with store.lease(M):
        store.forget(M)
        assert store.usage().used == PAGE
        with pytest.raises(ConflictError):
            store.lease(M)
        assert store.stage(spec(directory, "other"), Tier.DRAM) == StageReport()
        store.forget(OTHER)
    assert store.usage().used == 0


def test_a_model_that_is_forgotten_or_evicted_while_it_is_staged(tmp_path, store, write_checkpoint):
    def meddle(*_: int) -> None:
        with pytest.raises(ConflictError, match="being staged"):
            store.evict(M, Tier.DRAM)
        store.forget(M)

    with pytest.raises(ConflictError, match="deleted"):
        store.stage(spec(write_checkpoint(tmp_path / "model")), Tier.DRAM, meddle)
    assert store.usage().used == 0


def test_a_model_larger_than_the_arena_is_refused_with_both_sizes(
    tmp_path, store, write_checkpoint
):
    directory = write_checkpoint(tmp_path / "model", 8 * PAGE)
    size = (directory / "model.safetensors").stat().st_size
    with pytest.raises(ModelTooLargeError, match=rf"{size}.*{8 * PAGE}"):
        store.inspect(str(directory))
    with pytest.raises(ModelTooLargeError, match=str(8 * PAGE)):
        store.stage(spec(directory), Tier.DRAM)


def test_no_room_now_is_told(tmp_path, store, write_checkpoint):
    store.stage(spec(write_checkpoint(tmp_path / "model", 5 * PAGE)), Tier.DRAM)
    large = spec(write_checkpoint(tmp_path / "large", 3 * PAGE), "large")
    with pytest.raises(UnavailableError, match="no room"):
        store.stage(large, Tier.DRAM)
    store.evict(M, Tier.DRAM)
    store.stage(large, Tier.DRAM)


def test_damage_in_dram_is_found_and_named(tmp_path, store, write_checkpoint, two_shards):
    store.stage(spec(write_checkpoint(tmp_path / "model", two_shards)), Tier.DRAM)
    store.verify(M)
    with store.lease(M) as lease:
        tensor = next(each for each in lease.tensors if each.name == "c")
        with memoryview(store.arena._map) as memory:
            memory[tensor.offset] ^= 1
    with pytest.raises(CheckpointError, match=r"model-00002-of-00002\.safetensors in DRAM is dam"):
        store.verify(M)


def test_inspecting_reads_no_weights(tmp_path, store, write_checkpoint):
    directory = write_checkpoint(tmp_path / "model", config={"model_type": "x"})
    found = store.inspect(str(directory))
    assert found.config == {"model_type": "x"}
    assert store.usage().used == 0
    store.stage(spec(directory), Tier.DRAM)
    assert store.snapshot(M) == found


def test_a_closed_store_refuses_work_and_takes_back_leases(tmp_path, write_checkpoint):
    fds, threads = len(list(Path("/proc/self/fd").iterdir())), threading.active_count()
    store = Store(tmp_path, 64 * PAGE, prefault=True)
    model = spec(write_checkpoint(tmp_path / "model"))
    store.stage(model, Tier.DRAM)
    lease = store.lease(M)
    store.close()
    lease.release()
    for call in (lambda: store.stage(model, Tier.DRAM), lambda: store.lease(M)):
        with pytest.raises(UnavailableError, match="closed"):
            call()
    assert len(list(Path("/proc/self/fd").iterdir())) == fds
    assert threading.active_count() == threads


def test_closing_ends_a_read_under_way(tmp_path, write_checkpoint, monkeypatch):
    store = Store(tmp_path, 8 * PAGE, prefault=False)
    model = spec(write_checkpoint(tmp_path / "model", PAGE))
    entered = threading.Event()

    def wait_for_close(*_: object) -> None:
        entered.set()
        store._stopping.wait()

    monkeypatch.setattr(LocalReader, "read", wait_for_close)
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        staging = pool.submit(store.stage, model, Tier.DRAM)
        entered.wait()
        store.close()
        with pytest.raises(UnavailableError, match="closing"):
            staging.result()


def test_the_store_needs_no_tensor_library():
    package = Path(pipeline.__file__).parent
    found = (file.relative_to(package).with_suffix("") for file in package.rglob("*.py"))
    modules = [".".join(each.parts) for each in found if each.parts[0] != "device"]
    assert "disk.tier" in modules
    code = "import sys, json\n"
    code += "".join(f"import flashserve.store.{name}\n" for name in modules)
    code += "print(json.dumps(sorted({'torch', 'transformers'} & set(sys.modules))))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == []


class ManualDigester:
    """Computes digests when it is told to."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Pieces, OnDone]] = []

    def submit(self, pieces: Pieces, promised: Sequence[object], on_done: OnDone) -> None:
        assert not promised, "files of this machine have no promised digest"
        self.jobs.append((pieces, on_done))

    def work(self) -> None:
        """The first job, if its bytes are still there."""
        pieces, on_done = self.jobs.pop(0)
        digest = hashlib.sha256()
        for piece in pieces():
            if piece is None:
                return
            with piece as view:
                digest.update(view)
        on_done(digest.hexdigest(), None)

    def stop(self) -> None:
        pass


class StoreMachine(hypothesis.stateful.RuleBasedStateMachine):
    """Hold, stage, change, lease, release, damage, evict and forget in any order, with room for
    about half. What is held arrives when the machine says so; directories 1 and 3 share a file,
    and files of the same size may have the same bytes, which is found when the machine says so.
    """

    SIZES = (2, 3, 2, 3)
    names = st.sampled_from([ModelId(f"m{index}") for index in range(5)])

    @hypothesis.stateful.initialize()
    def start(self) -> None:
        self.directory = tempfile.TemporaryDirectory()
        self.root = Path(self.directory.name)
        self.store = Store(self.root, 5 * PAGE, prefault=False)
        self.store._proof.close()
        self.digester = ManualDigester()
        self.store._proof._digester = self.digester
        self.version = 0
        for index in range(len(self.SIZES)):
            self.write(index)
        self.staged: dict[ModelId, bytes] = {}
        self.holds: list[tuple[Lease, bytes]] = []
        self.may_read = threading.Event()
        self.may_read.set()
        read, may_read = LocalReader.read, self.may_read

        def wait_and_read(reader: LocalReader, begin: int, target: memoryview) -> None:
            if len(target) >= PAGE:
                may_read.wait()
            read(reader, begin, target)

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(LocalReader, "read", wait_and_read)
        self.leases: list[tuple[Lease, bytes]] = []

    def teardown(self) -> None:
        self.may_read.set()
        for lease, _ in self.leases + self.holds:
            lease.release()
        self.store.close()
        self.patch.undo()
        self.directory.cleanup()

    def write(self, index: int) -> None:
        """A new version: sparse, so that it takes no time, with a mark at both ends."""
        self.version += 1
        num_bytes = self.SIZES[index] * PAGE
        header = b'{"w":{"dtype":"U8","shape":[%d],"data_offsets":[0,%d]}}'
        size = num_bytes - 8 - 70
        encoded = (header % (size, size)).ljust(70)
        directory = self.root / "snapshots" / str(index)
        directory.mkdir(parents=True, exist_ok=True)
        path = self.blob(index)
        path.parent.mkdir(exist_ok=True)
        if not (directory / "model.safetensors").is_symlink():
            (directory / "model.safetensors").symlink_to(path)
        path.write_bytes(len(encoded).to_bytes(8, "little") + encoded)
        mark = (self.version % 3).to_bytes(4, "little")
        with path.open("r+b") as file:
            file.seek(num_bytes - 4)
            file.write(mark)
        os.utime(path, ns=(0, self.version))
        (directory / "config.json").write_text("{}")

    def blob(self, index: int) -> Path:
        return self.root / "blobs" / str(1 if index == 3 else index)

    def mark(self, index: int) -> bytes:
        return self.blob(index).read_bytes()[-4:]

    def finish_reads(self) -> None:
        """Everything that is held has arrived; nothing is read any more."""
        self.may_read.set()
        for lease, mark in self.holds:
            lease.arrival.wait()
            self.leases.append((lease, mark))
        self.holds = []
        for fill in tuple(self.store._shelf._fills):
            fill.ended.wait()

    @hypothesis.stateful.rule(name=names, index=st.integers(0, 3))
    def stage(self, name: ModelId, index: int) -> None:
        try:
            self.finish_reads()
            self.store.stage(self.model(name, index), Tier.DRAM)
        except UnavailableError:
            self.staged.pop(name, None)
        else:
            self.staged[name] = self.mark(index)

    def model(self, name: ModelId, index: int) -> ModelSpec:
        return spec(self.root / "snapshots" / str(index), name)

    @hypothesis.stateful.rule(name=names, index=st.integers(0, 3))
    def hold(self, name: ModelId, index: int) -> None:
        """Its bytes arrive when `arrive` says so."""
        self.may_read.clear()
        self.staged.pop(name, None)
        with contextlib.suppress(UnavailableError):
            self.holds.append((self.store.hold(self.model(name, index)), self.mark(index)))

    @hypothesis.stateful.rule()
    def arrive(self) -> None:
        self.finish_reads()

    @hypothesis.stateful.rule(data=st.data())
    def leave_while_it_arrives(self, data: st.DataObject) -> None:
        """The place is kept until the reading has ended, whoever leaves."""
        if self.holds:
            lease, _ = self.holds.pop(data.draw(st.integers(0, len(self.holds) - 1)))
            lease.release()

    @hypothesis.stateful.rule(name=names)
    def damage(self, name: ModelId) -> None:
        """What is damaged is found no more, under any name, and stays while it is leased."""
        if name not in self.staged:
            return
        (file,) = self.store._shelf.whole(name).files
        gone = self.store._shelf.quarantine(file)
        assert name in gone
        for each in gone:
            self.staged.pop(each, None)
            with pytest.raises(ConflictError):
                self.store.lease(each)

    @hypothesis.stateful.precondition(lambda self: self.digester.jobs)
    @hypothesis.stateful.rule()
    def prove(self) -> None:
        """Files that turn out to be equal become one, at once or when they are released."""
        self.digester.work()

    @hypothesis.stateful.rule(index=st.integers(0, 3))
    def change(self, index: int) -> None:
        self.finish_reads()
        self.write(index)

    @hypothesis.stateful.rule(name=names)
    def lease(self, name: ModelId) -> None:
        if name in self.staged:
            self.leases.append((self.store.lease(name), self.staged[name]))
        elif not self.store.dram_bytes(name):
            with pytest.raises(ConflictError):
                self.store.lease(name)

    @hypothesis.stateful.rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if self.leases:
            index = data.draw(st.integers(0, len(self.leases) - 1))
            self.leases.pop(index)[0].release()

    @hypothesis.stateful.rule(name=names)
    def evict(self, name: ModelId) -> None:
        image = self.store._shelf.models().get(name)
        if image is None or not image.leases[name]:
            self.finish_reads()  # evicting waits for a read that it ends
        used = self.store.usage().used
        try:
            freed = self.store.evict(name, Tier.DRAM)
        except FlashServeError:
            assert any(lease.model_id == name for lease, _ in self.leases + self.holds)
        else:
            self.staged.pop(name, None)
            assert self.store.usage().used == used - freed
            assert self.store.dram_bytes(name) == 0

    @hypothesis.stateful.rule(name=names)
    def forget(self, name: ModelId) -> None:
        self.store.forget(name)
        self.staged.pop(name, None)

    @hypothesis.stateful.invariant()
    def leased_bytes_are_untouched(self) -> None:
        for lease, mark in self.leases:
            size = lease.snapshot.layout.size_bytes
            assert self.store.arena._map[lease.offset + size - 4 : lease.offset + size] == mark
        ranges = {extent for lease, _ in self.leases + self.holds for extent in lease.extents}
        for (begin, num_bytes), (after, _) in itertools.pairwise(sorted(ranges)):
            assert begin + num_bytes <= after

    @hypothesis.stateful.invariant()
    def staged_bytes_are_those_of_the_file(self) -> None:
        for name, mark in self.staged.items():
            with self.store.lease(name) as lease:
                end = lease.offset + lease.snapshot.layout.size_bytes
                assert self.store.arena._map[end - 4 : end] == mark

    @hypothesis.stateful.invariant()
    def memory_is_conserved(self) -> None:
        usage = self.store.usage()
        assert usage.used + usage.free == usage.total
        places = {
            file.extent.offset: file.extent.num_bytes
            for image in self.store._shelf.models().values()
            for file in image.files
        }
        places |= {at: size for lease, _ in self.leases + self.holds for at, size in lease.extents}
        reading = {file for fill in self.store._shelf._fills for file in fill.files}
        places |= {file.extent.offset: file.extent.num_bytes for file in reading}
        assert usage.used == sum(places.values())


TestStoreMachine = StoreMachine.TestCase
TestStoreMachine.settings = hypothesis.settings(
    max_examples=30, stateful_step_count=30, deadline=None
)
