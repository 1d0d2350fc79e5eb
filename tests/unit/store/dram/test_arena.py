import errno
import fcntl
import mmap
import os
import threading
from pathlib import Path

import hypothesis
import hypothesis.stateful
import pytest
from hypothesis import strategies as st

from flashserve.errors import ConflictError, InputError, ModelTooLargeError, UnavailableError
from flashserve.store.dram import arena as arena_module
from flashserve.store.dram.arena import (
    EXTENT_ALIGNMENT,
    Arena,
    ArenaUsage,
    Extent,
    ExtentState,
    attach,
)
from flashserve.store.dram.memory import Placement

PAGE = EXTENT_ALIGNMENT
STRIDE = PAGE // 8  # of the marks by which a test knows an extent's bytes


@pytest.fixture
def arena():
    arena = Arena(8 * PAGE)
    yield arena
    arena.close()


def filled(arena: Arena, num_pages: int, mark: int) -> Extent:
    extent = arena.allocate(num_pages * PAGE)
    with arena.memory(extent) as memory:
        memory[:1] = memory[-1:] = bytes([mark])
    arena.seal(extent)
    return extent


def place_of(extent: Extent) -> tuple[int, int]:
    return extent.offset, extent.num_bytes


def test_extents_take_whole_aligned_pages(arena):
    extents = [arena.allocate(num_bytes) for num_bytes in (1, PAGE, PAGE + 1)]
    assert [extent.num_bytes for extent in extents] == [PAGE, PAGE, 2 * PAGE]
    assert all(extent.offset % PAGE == 0 for extent in extents)
    assert arena.usage() == ArenaUsage(8 * PAGE, 4 * PAGE, 4 * PAGE)


def test_an_arena_is_rounded_down_to_whole_pages():
    arena = Arena(3 * PAGE + 5)
    assert arena.num_bytes == os.fstat(arena.fd).st_size == 3 * PAGE
    arena.close()


@pytest.mark.parametrize("num_bytes", [-1, 0, PAGE - 1, 1 << 62, 1 << 70])
def test_an_arena_that_cannot_be_is_refused(num_bytes):
    with pytest.raises(InputError, match="arena of"):
        Arena(num_bytes)


def test_freed_neighbours_become_one_gap(arena):
    extents = [filled(arena, 2, mark) for mark in range(4)]
    arena.free(extents[1])
    arena.free(extents[2])
    assert arena.allocate(4 * PAGE).offset == extents[1].offset


def test_the_smallest_gap_is_taken(arena):
    first, _, third, _ = (filled(arena, pages, 1) for pages in (3, 1, 1, 1))
    arena.free(first)
    arena.free(third)
    assert arena.allocate(PAGE).offset == third.offset


def test_what_can_never_fit_is_told_from_what_does_not_fit_now(arena):
    with pytest.raises(ModelTooLargeError, match=str(8 * PAGE)):
        arena.allocate(8 * PAGE + 1)
    filled(arena, 7, 1)
    with pytest.raises(UnavailableError, match="no room"):
        arena.allocate(PAGE + 1)


def test_scattered_gaps_are_joined_by_moving_what_nobody_leases(arena):
    extents = [filled(arena, 2, mark) for mark in range(4)]
    arena.free(extents[0])
    arena.free(extents[2])
    big = arena.allocate(4 * PAGE)
    assert big.offset == 4 * PAGE
    for index, mark in ((1, 1), (3, 3)):
        with arena.memory(extents[index]) as memory:
            assert memory[0] == memory[-1] == mark


def test_leased_and_filling_extents_are_not_moved(arena):
    leased = [filled(arena, 2, mark) for mark in range(3)]
    filling = arena.allocate(PAGE)
    arena.lease(leased[1])
    arena.free(leased[0])
    arena.free(leased[2])
    before = leased[1].offset, filling.offset
    with pytest.raises(UnavailableError):
        arena.allocate(4 * PAGE)
    assert (leased[1].offset, filling.offset) == before
    arena.release(leased[1])
    with pytest.raises(UnavailableError):
        arena.allocate(5 * PAGE)
    assert filling.offset == before[1]
    assert arena.allocate(4 * PAGE).offset == 2 * PAGE


def test_a_leased_extent_is_not_freed(arena):
    extent = filled(arena, 1, 1)
    arena.lease(extent)
    arena.lease(extent)
    arena.release(extent)
    with pytest.raises(ConflictError):
        arena.free(extent)
    arena.release(extent)
    arena.free(extent)
    assert extent.state is ExtentState.FREED
    assert arena.usage().used == 0


def test_only_the_owner_can_write(arena):
    """Neither the descriptor, nor one opened anew through /proc, maps writable or writes."""
    with arena.memory(arena.allocate(PAGE)) as memory:
        memory[:5] = b"owner"
    reopened = os.open(f"/proc/self/fd/{arena.fd}", os.O_RDWR)
    try:
        for fd in (arena.fd, reopened):
            attempts = [
                lambda fd=fd: mmap.mmap(fd, PAGE, mmap.MAP_SHARED, mmap.PROT_WRITE),
                lambda fd=fd: os.pwrite(fd, b"x", 0),
                lambda fd=fd: os.ftruncate(fd, PAGE),
                lambda fd=fd: os.ftruncate(fd, 16 * PAGE),
                lambda fd=fd: fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE),
            ]
            for attempt in attempts:
                with pytest.raises(PermissionError) as caught:
                    attempt()
                assert caught.value.errno == errno.EPERM
            with attach(fd, arena.num_bytes) as mapping:
                assert mapping[:5] == b"owner"
                with pytest.raises(TypeError):
                    mapping[:5] = b"other"
    finally:
        os.close(reopened)


def test_a_copy_holds_the_extents_in_the_order_asked_for(arena):
    extents = [filled(arena, pages, mark) for mark, pages in ((1, 1), (2, 2), (3, 1))]
    fd = arena.copy_out([place_of(extents[2]), place_of(extents[1])])
    try:
        assert os.fstat(fd).st_size == 3 * PAGE
        copy = os.pread(fd, 3 * PAGE, 0)
        assert (copy[0], copy[PAGE - 1], copy[PAGE], copy[-1]) == (3, 3, 2, 2)
        with pytest.raises(PermissionError):
            os.pwrite(fd, b"x", 0)
        for extent in extents:
            arena.free(extent)
        with arena.memory(arena.allocate(4 * PAGE)) as memory:
            memory[:] = bytes(len(memory))
        assert os.pread(fd, 3 * PAGE, 0) == copy
    finally:
        os.close(fd)


def test_a_failed_copy_holds_on_to_nothing(arena, monkeypatch):
    """No view is left that would keep the memory when the arena is closed."""
    extent = filled(arena, 1, 1)

    def fail(_: object) -> int:
        raise UnavailableError("no memory")

    monkeypatch.setattr(arena_module, "sealed_copy", fail)
    with pytest.raises(UnavailableError):
        arena.copy_out([place_of(extent)])
    arena.close()
    assert "flashserve-arena" not in Path("/proc/self/maps").read_text()


@pytest.mark.parametrize("huge_pages", [True, False])
def test_memory_is_placed_before_it_is_touched(monkeypatch, huge_pages):
    asked: list[tuple[int, bool, int]] = []

    def record(address: int, num_bytes: int, *, huge_pages: bool) -> Placement:
        maps = Path("/proc/self/smaps").read_text().split(f"{address:x}-")[1]
        resident = next(line for line in maps.splitlines() if line.startswith("Rss:"))
        asked.append((num_bytes, huge_pages, int(resident.split()[1])))
        return Placement(huge_pages=huge_pages)

    monkeypatch.setattr(arena_module, "place", record)
    arena = Arena(2 * PAGE, prefault=True, huge_pages=huge_pages)
    arena.close()
    assert asked == [(2 * PAGE, huge_pages, 0)]
    assert arena.placement.huge_pages == huge_pages


def descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


def test_closing_leaves_no_descriptor_thread_or_memory():
    fds, threads = descriptors(), threading.active_count()
    arena = Arena(PAGE)
    arena.close()
    arena = Arena(64 * PAGE, prefault=True)
    filled(arena, 1, 1)
    arena.close()
    arena.close()
    assert descriptors() == fds
    assert threading.active_count() == threads
    assert "flashserve-arena" not in Path("/proc/self/maps").read_text()


def test_closing_under_a_view_leaves_only_the_memory():
    arena = Arena(PAGE)
    view = arena.memory(arena.allocate(1))
    arena.close()
    view[0] = 1
    assert view[0] == 1


def resident_bytes(arena: Arena) -> int:
    return os.fstat(arena.fd).st_blocks * 512


def test_memory_is_faulted_ahead():
    arena = Arena(20 * PAGE, prefault=True)
    arena._prefaulter._thread.join()
    try:
        if arena.prefault_refusal is None:
            assert arena.prefaulted_bytes == resident_bytes(arena) == arena.num_bytes
    finally:
        arena.close()


def test_memory_is_not_touched_unless_asked(arena):
    assert arena.prefaulted_bytes == resident_bytes(arena) == 0


def test_a_refusing_kernel_is_no_failure(monkeypatch):
    monkeypatch.setattr(arena_module, "_MADV_POPULATE_WRITE", 9999)
    arena = Arena(20 * PAGE, prefault=True)
    arena._prefaulter._thread.join()
    try:
        assert "Invalid argument" in arena.prefault_refusal
        assert arena.prefaulted_bytes == 0
        filled(arena, 20, 1)
    finally:
        arena.close()


def test_closing_stops_the_faulting(monkeypatch):
    """The thread pauses in its first piece until the arena is being closed, and does no second."""
    entered, stopping = threading.Event(), threading.Event()

    class Libc:
        num_calls = 0

        def madvise(self, *_: object) -> int:
            self.num_calls += 1
            entered.set()
            stopping.wait()
            return 0

    libc = Libc()
    monkeypatch.setattr(arena_module, "_libc", libc)
    arena = Arena(64 * PAGE, prefault=True)
    entered.wait()
    arena._prefaulter._stopping.set()
    stopping.set()
    arena.close()
    assert libc.num_calls == 1


class ArenaMachine(hypothesis.stateful.RuleBasedStateMachine):
    """Any order of calls: memory is conserved, extents stay apart, leased bytes stay put."""

    extents = hypothesis.stateful.Bundle("extents")

    def __init__(self) -> None:
        super().__init__()
        self.arena = Arena(12 * PAGE)
        self.live: dict[Extent, int] = {}
        self.pinned: dict[Extent, int] = {}
        self.mark = 0

    def teardown(self) -> None:
        self.arena.close()

    @hypothesis.stateful.rule(target=extents, num_pages=st.integers(1, 5), sealed=st.booleans())
    def allocate(self, num_pages: int, sealed: bool):
        free = self.arena.usage().free
        movable = not self.pinned and all(e.state is ExtentState.SEALED for e in self.live)
        try:
            extent = self.arena.allocate(num_pages * PAGE - 1)
        except UnavailableError:
            # Without anything pinned, room that is free can always be had.
            assert free < num_pages * PAGE or not movable
            return hypothesis.stateful.multiple()
        self.mark = self.mark % 255 + 1
        with self.arena.memory(extent) as memory:
            memory[::STRIDE] = memory[STRIDE - 1 :: STRIDE] = self.marks(extent, self.mark)
        self.live[extent] = self.mark
        if sealed:
            self.arena.seal(extent)
        return extent

    @hypothesis.stateful.rule(extent=extents)
    def seal(self, extent: Extent) -> None:
        if extent.state is ExtentState.FILLING:
            self.arena.seal(extent)

    @hypothesis.stateful.rule(extent=extents)
    def lease(self, extent: Extent) -> None:
        if extent.state is ExtentState.SEALED:
            self.arena.lease(extent)
            self.pinned[extent] = extent.offset

    @hypothesis.stateful.rule(extent=extents)
    def release(self, extent: Extent) -> None:
        if extent.num_leases:
            self.arena.release(extent)
            if not extent.num_leases:
                del self.pinned[extent]

    @hypothesis.stateful.rule(extent=extents)
    def free(self, extent: Extent) -> None:
        if extent not in self.live:
            return
        if extent.num_leases:
            with pytest.raises(ConflictError):
                self.arena.free(extent)
        else:
            self.arena.free(extent)
            del self.live[extent]

    @hypothesis.stateful.rule(first=extents, second=extents)
    def copy_out(self, first: Extent, second: Extent) -> None:
        wanted = [each for each in (first, second) if each.state is ExtentState.SEALED]
        fd = self.arena.copy_out([place_of(each) for each in wanted])
        try:
            assert os.fstat(fd).st_size == sum(each.num_bytes for each in wanted)
            copy = os.pread(fd, 10 * PAGE, 0)
        finally:
            os.close(fd)
        assert copy[::STRIDE] == b"".join(self.marks(each, self.live[each]) for each in wanted)

    @hypothesis.stateful.rule()
    def compact(self) -> None:
        """As `allocate` does when only scattered gaps are left."""
        with self.arena._lock:
            self.arena._compact()

    @staticmethod
    def marks(extent: Extent, mark: int) -> bytes:
        return bytes([mark]) * (extent.num_bytes // STRIDE)

    @hypothesis.stateful.invariant()
    def memory_is_conserved(self) -> None:
        usage = self.arena.usage()
        assert usage.used + usage.free == usage.total == 12 * PAGE
        assert usage.used == sum(extent.num_bytes for extent in self.live)

    @hypothesis.stateful.invariant()
    def extents_are_apart_and_whole(self) -> None:
        end = 0
        for extent in sorted(self.live, key=lambda each: each.offset):
            assert extent.offset >= end
            assert extent.offset % PAGE == 0
            end = extent.end
            with self.arena.memory(extent) as memory:
                marks = self.marks(extent, self.live[extent])
                assert memory[::STRIDE] == memory[STRIDE - 1 :: STRIDE] == marks
        assert end <= 12 * PAGE

    @hypothesis.stateful.invariant()
    def leased_extents_stay(self) -> None:
        for extent, offset in self.pinned.items():
            assert extent.offset == offset


TestArenaMachine = ArenaMachine.TestCase
TestArenaMachine.settings = hypothesis.settings(
    max_examples=60, stateful_step_count=40, deadline=None
)
