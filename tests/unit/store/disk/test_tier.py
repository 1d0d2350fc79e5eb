import errno
import os
import random
import resource
import stat
import threading

import blake3
import pytest
import xxhash

from flashserve.errors import CheckpointError, ConflictError, InputError, UnavailableError
from flashserve.store.checkpoint import listing
from flashserve.store.checkpoint.listing import Listing, SourceFile
from flashserve.store.disk import chunks, incoming
from flashserve.store.disk.tier import DiskTier

CHUNK = 1000


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for module in (listing, chunks, incoming):
        monkeypatch.setattr(module, "CHUNK_BYTES", CHUNK)


class Clock:
    def __init__(self) -> None:
        self.now = 1e9

    def __call__(self) -> float:
        self.now += 1
        return self.now


@pytest.fixture
def root(tmp_path):
    return tmp_path / "data" / "store"


@pytest.fixture
def tier(root):
    opened = DiskTier(root, 100_000, Clock())
    yield opened
    opened.close()


def data_of(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def listing_of(files: dict[str, bytes], identity: str = "a") -> Listing:
    entries = tuple(
        SourceFile(name, len(data), f"{identity}/{name}", (("md5", "00"),))
        for name, data in sorted(files.items())
    )
    return Listing(f"s3://bucket/{identity}", identity, entries)


def pieces(data: bytes) -> list[tuple[bytes, int]]:
    cut = [data[begin : begin + CHUNK] for begin in range(0, len(data), CHUNK)]
    return [(piece, xxhash.xxh3_64_intdigest(piece)) for piece in cut]


def write(place, files: dict[str, bytes], only=None) -> None:
    for name, data in files.items():
        for index, (piece, checksum) in enumerate(pieces(data)):
            if only is None or (name, index) in only:
                place.write_chunk(name, index, memoryview(piece), checksum)


def store(tier: DiskTier, files: dict[str, bytes], identity: str = "a", *, digests: bool = False):
    place = tier.begin(listing_of(files, identity))
    write(place, files)
    stored = place.complete()
    if digests:
        for name, data in files.items():
            place.set_digest(name, blake3.blake3(data).hexdigest())
    return stored


def everything(root) -> set[str]:
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


FILES = {"config.json": b"{}", "model.safetensors": data_of(3500), "empty.json": b""}


def test_a_whole_checkpoint_is_found_with_its_checksums(tier):
    listed = listing_of(FILES)
    assert tier.find("a") is None
    place = tier.begin(listed)
    place.put("config.json", FILES["config.json"])
    assert (place.directory / "config.json").read_bytes() == b"{}"
    write(place, {name: FILES[name] for name in ("model.safetensors", "empty.json")})
    assert tier.find("a") is None
    stored = place.complete()
    assert tier.find("a") == stored
    assert stored.listing == listed
    assert stored.num_bytes == 3502
    assert stored.checksums == {
        name: tuple(checksum for _, checksum in pieces(data)) for name, data in FILES.items()
    }
    assert {name: (stored.directory / name).read_bytes() for name in FILES} == FILES
    assert everything(stored.directory) == {".manifest.json", *FILES}


def test_it_is_found_again_by_the_next_process(root, tier):
    stored = store(tier, FILES, digests=True)
    tier.close()
    again = DiskTier(root, 100_000)
    found = again.find("a")
    assert found is not None
    assert found.checksums == stored.checksums
    assert found.listing == stored.listing
    assert found.digests["model.safetensors"] == blake3.blake3(data_of(3500)).hexdigest()
    assert again.problems == ()
    again.close()


def test_the_root_and_what_is_in_it_are_private(root, tier):
    store(tier, FILES)
    assert stat.S_IMODE(root.stat().st_mode) == 0o700
    for path in root.rglob("*"):
        assert not stat.S_IMODE(path.stat().st_mode) & 0o077


def test_a_root_that_is_open_to_others_is_closed_and_a_link_refused(tmp_path):
    (tmp_path / "open").mkdir(mode=0o755)
    DiskTier(tmp_path / "open", 1).close()
    assert stat.S_IMODE((tmp_path / "open").stat().st_mode) == 0o700
    (tmp_path / "link").symlink_to(tmp_path / "open")
    with pytest.raises(InputError, match="is a link"):
        DiskTier(tmp_path / "link", 1)


def test_a_second_owner_is_told_whose_the_root_is(root, tier):
    with pytest.raises(ConflictError, match=f"another process \\({os.getpid()}\\)"):
        DiskTier(root, 1)
    tier.close()
    DiskTier(root, 1).close()


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "a/b",
        "",
        ".",
        "..",
        ".manifest.json",
        ".x.part",
        "a\0b",
        "a\nb",
        "ä",
        "x" * 201,
        "/x",
    ],
)
def test_names_that_are_not_plain_are_refused(tier, root, name):
    before = everything(root)
    with pytest.raises(CheckpointError, match="is not kept on disk"):
        tier.begin(listing_of({name: b"x"}))
    assert everything(root) == before


def test_a_file_listed_twice_is_refused(tier):
    file = SourceFile("x", 1, "i")
    with pytest.raises(CheckpointError, match="listed twice"):
        tier.begin(Listing("u", "a", (file, file)))


def test_links_planted_in_a_place_are_not_followed(tier, tmp_path):
    target = tmp_path / "victim"
    target.write_bytes(b"precious")
    place = tier.begin(listing_of(FILES))
    (place.directory / ".model.safetensors.part").symlink_to(target)
    with pytest.raises(UnavailableError, match="cannot be used"):
        write(place, {"model.safetensors": FILES["model.safetensors"]})
    (place.directory / "config.json").symlink_to(target)
    place.put("config.json", b"{}")
    assert (place.directory / "config.json").read_bytes() == b"{}"
    assert target.read_bytes() == b"precious"


def test_a_fetch_goes_on_from_the_chunks_that_are_there(root, tier):
    place = tier.begin(listing_of(FILES))
    write(place, FILES, only={("model.safetensors", 0), ("model.safetensors", 3)})
    place.put("config.json", b"{}")
    place.close()
    tier.close()
    tier = DiskTier(root, 100_000)
    place = tier.begin(listing_of(FILES))
    expected = [checksum for _, checksum in pieces(FILES["model.safetensors"])]
    assert place.done("model.safetensors") == {0: expected[0], 3: expected[3]}
    assert place.done("config.json") == {0: xxhash.xxh3_64_intdigest(b"{}")}
    target = bytearray(500)
    place.read_chunk("model.safetensors", 3, memoryview(target))
    assert target == FILES["model.safetensors"][3000:]
    write(place, FILES, only={("model.safetensors", 1), ("model.safetensors", 2)})
    stored = place.complete()
    assert (stored.directory / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    tier.close()


def test_a_chunk_whose_bytes_never_reached_the_disk_is_not_done(tier):
    """The journal may outlive what it vouches for when the machine goes down."""
    place = tier.begin(listing_of(FILES))
    write(place, {"model.safetensors": FILES["model.safetensors"]})
    place.close()
    part = place.directory / ".model.safetensors.part"
    damaged = bytearray(part.read_bytes())
    damaged[1500] ^= 1
    part.write_bytes(damaged[:3000])
    assert set(tier.begin(listing_of(FILES)).done("model.safetensors")) == {0, 2}


def test_a_chunk_that_rots_while_it_waits_is_not_read(tier):
    place = tier.begin(listing_of(FILES))
    write(place, FILES)
    with (place.directory / ".model.safetensors.part").open("r+b") as file:
        file.seek(1500)
        file.write(b"\0\0\0")
    with pytest.raises(CheckpointError, match=r"chunk 1 of .*model\.safetensors is damaged"):
        place.read_chunk("model.safetensors", 1, memoryview(bytearray(1000)))
    assert 1 not in place.done("model.safetensors")


def test_an_incomplete_checkpoint_does_not_become_visible(tier):
    place = tier.begin(listing_of(FILES))
    write(place, FILES, only={("model.safetensors", 0), ("config.json", 0)})
    with pytest.raises(ConflictError, match="3 of 4 chunks are missing"):
        place.complete()
    assert tier.find("a") is None
    write(place, FILES)
    place.complete()
    assert tier.find("a") is not None


def test_one_writer_per_identity(tier):
    place = tier.begin(listing_of(FILES))
    with pytest.raises(ConflictError, match="being written"):
        tier.begin(listing_of(FILES))
    write(place, FILES)
    place.complete()
    with pytest.raises(ConflictError, match="on disk already"):
        tier.begin(listing_of(FILES))
    with pytest.raises(ConflictError, match="has ended"):
        write(place, FILES)


def test_an_abandoned_fetch_is_kept_or_goes(root, tier):
    place = tier.begin(listing_of(FILES))
    empty = everything(root)
    write(place, FILES)
    place.abandon(keep=True)
    assert tier.usage().used == 3502
    place = tier.begin(listing_of(FILES))
    assert len(place.done("model.safetensors")) == 4
    place.abandon(keep=False)
    place.close()
    assert tier.usage().used == 0
    assert everything(root) == empty


def test_chunks_are_written_by_several_threads(tier):
    data = data_of(50_000)
    place = tier.begin(listing_of({"m": data}))
    work = list(enumerate(pieces(data)))

    def run(part: int) -> None:
        for index, (piece, checksum) in work[part::4]:
            place.write_chunk("m", index, memoryview(piece), checksum)

    threads = [threading.Thread(target=run, args=(part,)) for part in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (place.complete().directory / "m").read_bytes() == data


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_says_so_and_the_fetch_can_go_on(tier, monkeypatch, number):
    place = tier.begin(listing_of(FILES))
    write(place, FILES, only={("model.safetensors", 0)})

    def full(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", full)
        with pytest.raises(UnavailableError, match=r"the disk tier is full: .*store\.disk_bytes"):
            write(place, FILES)
    assert tier.find("a") is None
    assert set(place.done("model.safetensors")) == {0}
    place.abandon(keep=True)
    place = tier.begin(listing_of(FILES))
    write(place, FILES)
    assert tier.find("a") is None
    assert place.complete() == tier.find("a")


def test_a_limit_of_the_kernel_is_a_full_disk(tier):
    place = tier.begin(listing_of(FILES))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, limits[1]))
    try:
        with pytest.raises(UnavailableError, match="the disk tier is full"):
            write(place, FILES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    write(place, FILES)
    assert place.complete() == tier.find("a")


def ask_until_ended(place) -> None:
    while True:
        place.done("config.json")


def test_a_descriptor_is_not_closed_while_a_chunk_is_written(tier, monkeypatch):
    """Its number would be another file's by the time of the write."""
    place = tier.begin(listing_of(FILES))
    is_writing, may_write = threading.Event(), threading.Event()
    pwrite = os.pwrite

    def slow(*arguments):
        is_writing.set()
        assert may_write.wait(10)
        return pwrite(*arguments)

    monkeypatch.setattr(os, "pwrite", slow)
    only = {("model.safetensors", 0)}
    writer = threading.Thread(target=write, args=(place, FILES, only))
    closer = threading.Thread(target=place.close)
    writer.start()
    assert is_writing.wait(10)
    closer.start()
    with pytest.raises(ConflictError, match="has ended"):
        ask_until_ended(place)
    assert closer.is_alive()
    may_write.set()
    writer.join()
    closer.join()
    assert set(tier.begin(listing_of(FILES)).done("model.safetensors")) == {0}


def test_the_least_recently_used_goes_first(tier):
    for name in "abc":
        store(tier, {"m": data_of(30_000, ord(name))}, name)
    assert tier.find("a") is not None
    store(tier, {"m": data_of(30_000)}, "d")
    assert [stored.listing.identity for stored in tier.checkpoints()] == ["c", "a", "d"]
    assert tier.find("b") is None
    assert tier.usage().used == 90_000
    assert tier.usage().free == 10_000


def test_the_order_of_use_survives_a_restart(root, tier):
    for name in "abc":
        store(tier, {"m": data_of(30_000, ord(name))}, name)
    tier.find("a")
    tier.close()
    tier = DiskTier(root, 100_000)
    assert [stored.listing.identity for stored in tier.checkpoints()] == ["b", "c", "a"]
    tier.close()


def test_what_is_pinned_stays(tier):
    for name in "abc":
        store(tier, {"m": data_of(30_000, ord(name))}, name)
    for name in "abc":
        tier.pin(name)
    tier.pin("c")
    tier.unpin("c")
    with pytest.raises(UnavailableError, match=r"30000 bytes, and of 100000 are 90000 in use"):
        tier.begin(listing_of({"m": data_of(30_000)}, "d"))
    with pytest.raises(ConflictError, match="in use"):
        tier.evict("c")
    tier.unpin("c")
    store(tier, {"m": data_of(30_000)}, "d")
    assert [stored.listing.identity for stored in tier.checkpoints()] == ["a", "b", "d"]


def test_nothing_is_evicted_for_what_does_not_fit_anyway(tier):
    store(tier, {"m": data_of(60_000)}, "a")
    store(tier, {"m": data_of(10_000)}, "b")
    tier.pin("a")
    with pytest.raises(UnavailableError, match="full"):
        tier.begin(listing_of({"m": data_of(50_000)}, "c"))
    assert tier.find("b") is not None
    with pytest.raises(
        UnavailableError,
        match=r"has 100001 bytes and never fits into 100000: raise store\.disk_bytes",
    ):
        tier.begin(listing_of({"m": bytes(100_001)}, "c"))


def test_leftovers_of_fetches_give_way_and_running_ones_do_not(tier):
    left = {"m": data_of(40_000)}
    place = tier.begin(listing_of(left, "left"))
    write(place, left)
    place.abandon(keep=True)
    running = tier.begin(listing_of({"m": bytes(50_000)}, "running"))
    assert tier.usage().used == 90_000
    with pytest.raises(UnavailableError, match="50000 in use"):
        tier.begin(listing_of({"m": bytes(50_001)}, "new"))
    new = tier.begin(listing_of({"m": bytes(50_000)}, "new"))
    assert tier.usage().free == 0
    running.abandon(keep=False)
    new.abandon(keep=False)
    assert tier.begin(listing_of(left, "left")).done("m") == {}


def test_a_leftover_is_not_evicted_for_its_own_continuation(tier):
    files = {"m": data_of(90_000)}
    place = tier.begin(listing_of(files))
    write(place, files)
    place.close()
    assert len(tier.begin(listing_of(files)).done("m")) == 90


def test_equal_files_of_two_checkpoints_are_one_file(root, tier):
    shared = data_of(40_000)
    a = store(tier, {"m": shared, "c": b"1"}, "a", digests=True)
    b = store(tier, {"m": shared, "c": b"2"}, "b", digests=True)
    assert (a.directory / "m").stat().st_ino == (b.directory / "m").stat().st_ino
    assert (b.directory / "m").read_bytes() == shared
    assert tier.usage().used == 40_002
    blob = root / "blobs" / blake3.blake3(shared).hexdigest()
    assert blob.stat().st_nlink == 3
    assert tier.evict("a") == 1
    assert (b.directory / "m").read_bytes() == shared
    assert tier.evict("b") == 40_001
    assert everything(root) == {"lock"}
    assert tier.usage().used == 0


def test_equal_files_of_one_checkpoint_are_one_file(tier):
    stored = store(tier, {"x": data_of(2000), "y": data_of(2000)}, digests=True)
    assert (stored.directory / "x").stat().st_ino == (stored.directory / "y").stat().st_ino
    assert tier.usage().used == 2000


def test_a_digest_that_the_checksums_contradict_shares_nothing(tier):
    a = store(tier, {"m": data_of(2000, 1)}, "a", digests=True)
    b = store(tier, {"m": data_of(2000, 2)}, "b")
    tier.set_digest("b", "m", blake3.blake3(data_of(2000, 1)).hexdigest())
    assert (a.directory / "m").read_bytes() == data_of(2000, 1)
    assert (b.directory / "m").read_bytes() == data_of(2000, 2)


def test_a_digest_known_before_the_end_or_after_eviction_does_no_harm(tier):
    place = tier.begin(listing_of(FILES))
    digest = blake3.blake3(FILES["model.safetensors"]).hexdigest()
    place.set_digest("model.safetensors", digest)
    write(place, FILES)
    place.complete()
    found = tier.find("a")
    assert found is not None
    assert found.digests == {"model.safetensors": digest}
    tier.evict("a")
    place.set_digest("config.json", digest)
    assert tier.usage().used == 0


@pytest.mark.parametrize(
    "tear",
    [
        lambda data: data[: len(data) // 2],
        lambda data: b"",
        lambda data: b"null",
        lambda data: b"[" * 100_000,
        lambda data: data.replace(b'"identity":"a"', b'"identity":"b"'),
        lambda data: data.replace(b"model.safetensors", b"../../../../etc/x"),
        lambda data: data.replace(b'"version":1', b'"version":2'),
        lambda data: data.replace(b'"num_bytes":3500', b'"num_bytes":-1'),
    ],
)
def test_a_torn_or_hostile_manifest_is_reported_and_counts_as_absent(root, tier, tear):
    stored = store(tier, FILES)
    tier.close()
    manifest = stored.directory / ".manifest.json"
    manifest.write_bytes(tear(manifest.read_bytes()))
    tier = DiskTier(root, 100_000)
    assert tier.find("a") is None
    assert tier.checkpoints() == []
    assert len(tier.problems) == 1
    assert ".manifest.json" in tier.problems[0]
    store(tier, FILES)
    assert tier.find("a") is not None
    tier.close()


@pytest.mark.parametrize("harm", ["missing", "shorter", "link", "directory"])
def test_a_checkpoint_with_a_broken_file_is_not_found(root, tier, tmp_path, harm):
    stored = store(tier, FILES)
    path = stored.directory / "model.safetensors"
    if harm == "shorter":
        os.truncate(path, 100)
    else:
        path.rename(tmp_path / "model")
    if harm == "link":
        path.symlink_to(tmp_path / "model")
    if harm == "directory":
        path.mkdir()
    assert tier.find("a") is None
    assert "model.safetensors" in tier.problems[0]
    tier.close()
    tier = DiskTier(root, 100_000)
    assert tier.find("a") is None
    tier.close()


def test_checksums_of_files_elsewhere_are_kept_by_identity(root, tier):
    assert tier.recall("/models/x#1") is None
    tier.remember("/models/x#1", (1, 2**64 - 1))
    tier.remember("/models/x#1", (1, 2**64 - 1))
    tier.remember("/models/y#1", ())
    tier.close()
    tier = DiskTier(root, 1)
    assert tier.recall("/models/x#1") == (1, 2**64 - 1)
    assert tier.recall("/models/y#1") == ()
    assert tier.recall("/models/x#2") is None
    tier.close()


def test_a_damaged_entry_of_known_checksums_is_removed(root, tier):
    tier.remember("x", (1, 2))
    (entry,) = (root / "known").iterdir()
    data = bytearray(entry.read_bytes())
    data[-1] ^= 1
    entry.write_bytes(data)
    assert tier.recall("x") is None
    assert list((root / "known").iterdir()) == []


def test_known_checksums_are_bounded(root, tier):
    tier.known._max_entries = 3
    for number in range(5):
        tier.remember(str(number), (number,))
    assert [tier.recall(str(number)) for number in range(5)] == [None, None, (2,), (3,), (4,)]
    assert len(list((root / "known").iterdir())) == 3
