"""Whatever is done to the disk tier in whatever order, its books agree with the disk."""

import blake3
import pytest
import xxhash
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from flashserve.errors import ConflictError, UnavailableError
from flashserve.store.checkpoint import listing
from flashserve.store.checkpoint.listing import Listing, SourceFile
from flashserve.store.disk import checking, chunks, incoming
from flashserve.store.disk.fsck import fsck
from flashserve.store.disk.tier import DiskTier

CHUNK = 4096
BUDGET = 13 * CHUNK
NAMES = st.sampled_from("abcd")
SIZES = {"a": 1, "b": 3, "c": 5, "d": 5}  # in chunks, besides the shared one


def files_of(identity):
    """d is c with another name; all share a file."""
    own = bytes([ord("c" if identity == "d" else identity)]) * (CHUNK * SIZES[identity])
    return {"own": own, "shared": b"s" * CHUNK}


class Histories(RuleBasedStateMachine):
    def __init__(self, root):
        super().__init__()
        self.root = root
        self.now = 1e9
        self.tier = self.opened()
        self.held = {}
        self.pins = []
        self.whole = set()

    def opened(self):
        return DiskTier(self.root, BUDGET, self.clock)

    def clock(self):
        self.now += 1
        return self.now

    @rule(name=NAMES)
    def begin(self, name):
        files = tuple(SourceFile(f, len(data), f + name) for f, data in files_of(name).items())
        try:
            self.held[name] = self.tier.begin(Listing(name, name, files))
        except ConflictError:
            assert name in self.held or name in self.whole
        except UnavailableError:
            pass
        left = {stored.listing.identity for stored in self.tier.checkpoints()}
        assert left <= self.whole
        assert not (self.whole - left) & set(self.pins)
        self.whole = left

    @rule(name=NAMES, with_digests=st.booleans())
    def store(self, name, with_digests):
        if name not in self.held:
            self.begin(name)
        if name in self.held:
            self.finish(name, "whole")
        if with_digests:
            self.digest(name)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), how=st.sampled_from(["whole", "keep", "drop"]))
    def end(self, data, how):
        self.finish(data.draw(st.sampled_from(sorted(self.held))), how)

    def finish(self, name, how):
        place = self.held.pop(name)
        for file, content in files_of(name).items():
            done = place.done(file)
            for index in range(len(content) // CHUNK if how == "whole" else 1):
                if index not in done:
                    piece = content[index * CHUNK : (index + 1) * CHUNK]
                    checksum = xxhash.xxh3_64_intdigest(piece)
                    place.write_chunk(file, index, memoryview(piece), checksum)
        if how == "whole":
            place.complete()
            self.whole.add(name)
        else:
            place.abandon(keep=how == "keep")

    @rule(name=NAMES)
    def digest(self, name):
        for file, content in files_of(name).items():
            self.tier.set_digest(name, file, blake3.blake3(content).hexdigest())

    @rule(name=NAMES)
    def find(self, name):
        assert (self.tier.find(name) is not None) == (name in self.whole)

    @rule(name=NAMES)
    def pin(self, name):
        self.tier.pin(name)
        self.pins.append(name)

    @precondition(lambda self: self.pins)
    @rule()
    def unpin(self):
        self.tier.unpin(self.pins.pop())

    @rule(name=NAMES)
    def evict(self, name):
        before = self.tier.usage().used
        try:
            freed = self.tier.evict(name)
        except ConflictError:
            assert name in self.held or name in self.pins
        else:
            assert self.tier.usage().used == before - freed
            self.whole.discard(name)

    @rule()
    def restart(self):
        self.tier.close()
        self.held, self.pins = {}, []
        self.tier = self.opened()
        assert self.tier.problems == ()

    @rule()
    def check(self):
        assert fsck(self.tier).problems == ()

    @invariant()
    def the_books_agree_with_the_disk(self):
        usage = self.tier.usage()
        assert usage.used + usage.free == usage.total == BUDGET
        assert {stored.listing.identity for stored in self.tier.checkpoints()} == self.whole
        inodes = {
            path.stat().st_ino: path.stat().st_size
            for path in self.root.glob("checkpoints/*/*")
            if not path.name.startswith(".")
        }
        reserved = sum(CHUNK * (SIZES[name] + 1) for name in self.held)
        assert usage.used >= sum(inodes.values()) + reserved
        if not any(self.root.glob("incoming/*")):
            assert usage.used == sum(inodes.values())
        blobs = {path.stat().st_ino for path in self.root.glob("blobs/*")}
        assert blobs <= inodes.keys()

    @invariant()
    def what_is_whole_is_right(self):
        for stored in self.tier.checkpoints():
            for file, content in files_of(stored.listing.identity).items():
                assert (stored.directory / file).read_bytes() == content

    def teardown(self):
        self.tier.close()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    for module in (listing, chunks, incoming, checking):
        monkeypatch.setattr(module, "CHUNK_BYTES", CHUNK)


def test_any_history(tmp_path_factory):
    from hypothesis.stateful import run_state_machine_as_test

    run_state_machine_as_test(
        lambda: Histories(tmp_path_factory.mktemp("tier") / "store"),
        settings=settings(
            max_examples=60, stateful_step_count=40, deadline=None, derandomize=True, database=None
        ),
    )
