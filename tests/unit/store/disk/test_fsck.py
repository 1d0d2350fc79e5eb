import os
import random

import blake3
import pytest
import xxhash

from flashserve.config import StoreSettings
from flashserve.errors import CheckpointError, ConflictError, SourceError
from flashserve.store import refetching
from flashserve.store.checkpoint import listing
from flashserve.store.checkpoint.listing import Listing, SourceFile
from flashserve.store.disk import checking, chunks, incoming
from flashserve.store.disk.fsck import fsck, repair_file
from flashserve.store.disk.tier import DiskTier
from flashserve.store.refetching import Refetcher

CHUNK = 1000
DATA = random.Random(0).randbytes(4500)
FILES = {"config.json": b"{}", "model.safetensors": DATA}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for module in (listing, chunks, incoming, checking, refetching):
        monkeypatch.setattr(module, "CHUNK_BYTES", CHUNK)


@pytest.fixture
def root(tmp_path):
    return tmp_path / "store"


@pytest.fixture
def tier(root):
    opened = DiskTier(root, 100_000)
    yield opened
    opened.close()


def store(tier, files=FILES, identity="a", *, digests=True, whole=True):
    entries = tuple(
        SourceFile(name, len(data), f"{identity}/{name}") for name, data in sorted(files.items())
    )
    place = tier.begin(Listing(f"s3://bucket/{identity}", identity, entries))
    for name, data in files.items():
        for index in range(-(-len(data) // CHUNK)):
            piece = data[index * CHUNK : (index + 1) * CHUNK]
            place.write_chunk(name, index, memoryview(piece), xxhash.xxh3_64_intdigest(piece))
    if not whole:
        place.close()
        return None
    stored = place.complete()
    for name, data in files.items() if digests else ():
        place.set_digest(name, blake3.blake3(data).hexdigest())
    return stored


def flip(path, *positions):
    """Bits on disk, behind everybody's back; the file keeps its size and its inode."""
    with path.open("r+b") as file:
        for position in positions:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ 4]))


def names_in(directory):
    return sorted(path.name for path in directory.iterdir())


class Origin:
    """A source that still has everything, and counts what it is asked."""

    def __init__(self, files=FILES):
        self.files = files
        self.asked = []

    def __call__(self, stored, name, index):
        self.asked.append((stored.listing.identity, name, index))
        return self.files[name][index * CHUNK : (index + 1) * CHUNK]


def test_a_whole_tier_is_clean(tier):
    store(tier)
    calls = []
    report = fsck(tier, None, lambda *call: calls.append(call))
    assert report.is_clean
    assert (report.num_checkpoints, report.num_files, report.num_bytes) == (1, 2, 4502)
    assert report.problems == report.removed == report.set_aside == ()
    assert calls == sorted(calls)
    assert calls[-1] == (4502, 4502)


def test_flipped_bits_are_named_and_repaired_from_the_source(tier):
    stored = store(tier)
    path = stored.directory / "model.safetensors"
    flip(path, 5, 1999, 4400)
    origin = Origin()
    report = fsck(tier, origin)
    (problem,) = report.problems
    assert problem.path == path
    assert problem.uri == "s3://bucket/a"
    assert problem.ranges == ((0, 2000), (4000, 4500))
    assert problem.is_repaired
    assert report.is_clean
    assert origin.asked == [("a", "model.safetensors", index) for index in (0, 1, 4)]
    assert path.read_bytes() == DATA
    assert names_in(stored.directory) == [".manifest.json", *sorted(FILES)]
    assert tier.find("a") is not None
    assert fsck(tier).problems == ()


def test_every_name_of_a_damaged_file_is_mended(tier, root):
    a = store(tier)
    b = store(tier, {**FILES, "config.json": b"[]"}, "b")
    flip(a.directory / "model.safetensors", 2500)
    report = fsck(tier, Origin())
    assert len(report.problems) == 1
    blob = root / "blobs" / blake3.blake3(DATA).hexdigest()
    names = [a.directory / "model.safetensors", b.directory / "model.safetensors", blob]
    assert {path.read_bytes() for path in names} == {DATA}
    assert len({path.stat().st_ino for path in names}) == 1
    assert tier.usage().used == 4504
    assert fsck(tier).is_clean


def test_a_reader_of_the_damaged_file_keeps_what_it_opened(tier):
    """The file is written anew and renamed: nobody's bytes change under them."""
    path = store(tier).directory / "model.safetensors"
    flip(path, 0)
    with path.open("rb") as reader:
        fsck(tier, Origin())
        assert reader.read() != DATA
    assert path.read_bytes() == DATA


def test_without_a_source_damage_is_put_aside_and_never_served(tier, root):
    a = store(tier)
    store(tier, {**FILES, "config.json": b"[]"}, "b")
    store(tier, {"other": b"fine"}, "c")
    flip(a.directory / "model.safetensors", 2500)
    report = fsck(tier)
    assert not report.is_clean
    assert sorted(report.set_aside) == ["s3://bucket/a", "s3://bucket/b"]
    assert "there is nothing to repair it from" in report.problems[0].what
    assert tier.find("a") is None
    assert tier.find("b") is None
    assert tier.find("c") is not None
    tier.close()
    tier = DiskTier(root, 100_000)
    assert tier.find("a") is None
    assert tier.usage().used == 4508
    tier.close()


def test_what_was_put_aside_comes_back_when_it_can_be_repaired(tier, root):
    path = store(tier).directory / "model.safetensors"
    flip(path, 2500)
    assert not fsck(tier).is_clean
    assert not fsck(tier).is_clean
    tier.close()
    tier = DiskTier(root, 100_000)
    report = fsck(tier, Origin())
    assert report.is_clean
    assert report.set_aside == ()
    assert tier.find("a") is not None
    assert path.read_bytes() == DATA
    tier.close()


def test_a_new_copy_replaces_what_was_put_aside(tier, root):
    flip(store(tier).directory / "model.safetensors", 2500)
    fsck(tier)
    store(tier)
    assert list((root / "quarantine").iterdir()) == []
    assert tier.usage().used == 4502
    assert fsck(tier).is_clean


@pytest.mark.parametrize("harm", ["missing", "shorter", "longer", "link"])
def test_files_that_are_not_what_they_were_are_written_anew(tier, tmp_path, harm):
    path = store(tier).directory / "model.safetensors"
    if harm == "shorter":
        os.truncate(path, 2500)
    elif harm == "longer":
        with path.open("ab") as file:
            file.write(b"x")
    else:
        path.rename(tmp_path / "moved")
    if harm == "link":
        path.symlink_to(tmp_path / "moved")
    report = fsck(tier, Origin())
    assert [problem.is_repaired for problem in report.problems] == [True]
    assert not path.is_symlink()
    assert path.read_bytes() == DATA
    assert fsck(tier).problems == ()


def test_one_file_is_mended_while_the_tier_is_in_use(tier):
    a = store(tier)
    b = store(tier, {**FILES, "config.json": b"[]"}, "b")
    flip(a.directory / "model.safetensors", 2500)
    origin = Origin()
    repair_file(tier, "a", "model.safetensors", {2}, lambda i: origin(a, "model.safetensors", i))
    assert {(each.directory / "model.safetensors").read_bytes() for each in (a, b)} == {DATA}
    assert origin.asked == [("a", "model.safetensors", 2)]
    assert tier.usage().used == 4504
    assert tier.evict("a") == 2


def test_one_file_is_not_mended_with_other_bytes(tier):
    a = store(tier)
    flip(a.directory / "model.safetensors", 2500)
    with pytest.raises(CheckpointError, match="another one at its source"):
        repair_file(tier, "a", "model.safetensors", {2}, lambda _: bytes(CHUNK))
    with pytest.raises(CheckpointError, match="changes while it is read"):
        repair_file(tier, "a", "model.safetensors", {1}, lambda _: DATA[CHUNK : 2 * CHUNK])
    assert names_in(a.directory) == [".manifest.json", *sorted(FILES)]
    tier.evict("a")
    with pytest.raises(ConflictError, match="no longer on disk"):
        repair_file(tier, "a", "model.safetensors", {2}, lambda _: b"")


@pytest.mark.parametrize("error", [SourceError("gone"), CheckpointError("changed")])
def test_a_source_that_fails_is_said(tier, error):
    flip(store(tier).directory / "model.safetensors", 2500)

    def failing(*_):
        raise error

    report = fsck(tier, failing)
    assert report.problems[0].what == f"differs from its checksums; {error.message}"
    assert report.set_aside == ("s3://bucket/a",)


@pytest.mark.parametrize("data", [b"", b"short", bytes(1000)])
def test_other_bytes_from_the_source_are_not_taken(tier, data):
    stored = store(tier)
    flip(stored.directory / "model.safetensors", 2500)
    report = fsck(tier, lambda *_: data)
    assert "chunk 2 of model.safetensors is another one at its source" in report.problems[0].what
    assert tier.find("a") is None


def test_a_file_that_contradicts_its_digest_is_not_served(tier):
    store(tier, digests=False)
    tier.set_digest("a", "model.safetensors", "0" * 64)
    report = fsck(tier, Origin())
    assert "differs from its digest" in report.problems[0].what
    assert report.problems[0].ranges == ((0, 4500),)
    assert tier.find("a") is None


def test_leftovers_go_and_interrupted_fetches_stay(tier, root):
    stored = store(tier)
    store(tier, {"m": DATA}, "left", whole=False)
    tier.begin(Listing("s3://bucket/nothing", "nothing", ())).close()
    tier.remember("x", (1,))
    tier.remember("y", (2,))
    min((root / "known").iterdir()).write_bytes(b"torn")
    (stored.directory / "stranger").write_bytes(b"x")
    (root / "blobs" / ("f" * 64)).write_bytes(b"x")
    (root / "blobs" / "passwd").symlink_to("/etc/passwd")
    report = fsck(tier)
    assert report.is_clean
    assert len(report.removed) == 5
    assert (report.num_resumable, report.num_checkpoints) == (1, 1)
    assert names_in(stored.directory) == [".manifest.json", *sorted(FILES)]
    assert len(list((root / "known").iterdir())) == 1
    assert len(list((root / "incoming").iterdir())) == 1
    assert len(list((root / "blobs").iterdir())) == 2
    assert fsck(tier).removed == ()


def test_what_only_a_torn_manifest_knew_is_a_problem_once(tier, root):
    (store(tier).directory / ".manifest.json").write_bytes(b"{")
    tier.close()
    tier = DiskTier(root, 100_000)
    report = fsck(tier, Origin())
    assert not report.is_clean
    assert ".manifest.json" in report.problems[0].what
    tier.close()
    tier = DiskTier(root, 100_000)
    assert fsck(tier).is_clean
    assert tier.usage().used == 0
    tier.close()


class FakeReader:
    def __init__(self, data):
        self.data = data
        self.is_closed = False

    def read(self, begin, target):
        target[:] = self.data[begin : begin + len(target)]

    def close(self):
        self.is_closed = True


class FakeSource:
    def __init__(self):
        self.readers = []

    def open(self, file):
        self.readers.append(FakeReader(FILES[file.name]))
        return self.readers[-1]


def test_chunks_are_fetched_again_through_one_reader_per_file(tier, tmp_path):
    stored = store(tier)
    flip(stored.directory / "model.safetensors", 0, 2500, 4499)
    flip(stored.directory / "config.json", 0)
    source = FakeSource()
    opened = []

    def open_uri(uri, data_dir, settings):
        opened.append((uri, data_dir))
        return source

    with Refetcher(tmp_path, StoreSettings(), open_uri) as refetch:
        assert fsck(tier, refetch).is_clean
    assert opened == [("s3://bucket/a", tmp_path)] * 2
    assert [reader.is_closed for reader in source.readers] == [True, True]
    assert (stored.directory / "model.safetensors").read_bytes() == DATA
