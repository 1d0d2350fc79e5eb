import ctypes
import errno
import fcntl
import mmap
import os
from pathlib import Path

import pytest

from flashserve.errors import UnavailableError
from flashserve.store.dram import memory
from flashserve.store.dram.memory import Placement, memory_nodes, node_mask, place, sealed_copy

THP = "kernel/mm/transparent_hugepage"


class FakeKernel:
    """Records what it is asked, and refuses where told to."""

    def __init__(self, refuses: bool = False) -> None:
        self.refuses = refuses
        self.calls: list[tuple[object, ...]] = []

    def advise_huge(self, address: int, num_bytes: int) -> None:
        self._record("huge", address, num_bytes)

    def interleave(self, address: int, num_bytes: int, nodes: tuple[int, ...]) -> None:
        self._record("interleave", address, num_bytes, nodes)

    def _record(self, *call: object) -> None:
        self.calls.append(call)
        if self.refuses:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))


def sysfs_of(root: Path, *, shmem: str | None = None, pmd: str = "", nodes: str = "0") -> Path:
    """A /sys with these words; shmem None is a kernel without huge pages."""
    texts = {"devices/system/node/has_memory": nodes}
    if shmem is not None:
        texts[f"{THP}/shmem_enabled"] = shmem
    if pmd:
        texts[f"{THP}/hugepages-2048kB/shmem_enabled"] = pmd
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")
    return root


@pytest.mark.parametrize(
    ("shmem", "pmd", "expected"),
    [
        ("always within_size [advise] never deny force", "", True),
        ("[always] within_size advise never deny force", "", True),
        ("always [within_size] advise never deny force", "", True),
        ("always within_size advise [never] deny force", "", False),
        ("always within_size advise never [deny] force", "", False),
        (None, "", False),
        ("always within_size [advise] never", "always [inherit] within_size advise never", True),
        ("always within_size [advise] never", "always inherit within_size advise [never]", False),
        ("always within_size advise [never]", "always inherit within_size [advise] never", True),
        ("garbage", "", False),
    ],
)
def test_huge_pages_are_asked_for_where_the_kernel_has_them(tmp_path, shmem, pmd, expected):
    kernel = FakeKernel()
    sysfs = sysfs_of(tmp_path, shmem=shmem, pmd=pmd)
    placement = place(4096, 8192, huge_pages=True, kernel=kernel, sysfs=sysfs)
    assert placement == Placement(huge_pages=expected)
    assert kernel.calls == ([("huge", 4096, 8192)] if expected else [])


def test_huge_pages_can_be_turned_off(tmp_path):
    kernel = FakeKernel()
    sysfs = sysfs_of(tmp_path, shmem="[always] never")
    assert place(0, 1, huge_pages=False, kernel=kernel, sysfs=sysfs) == Placement()
    assert kernel.calls == []


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [("0-1", (0, 1)), ("0,2", (0, 2)), ("0-2,7,9-10", (0, 1, 2, 7, 9, 10)), ("0", ()), ("", ())],
)
def test_pages_are_spread_over_the_nodes_that_have_memory(tmp_path, nodes, expected):
    kernel = FakeKernel()
    sysfs = sysfs_of(tmp_path, nodes=nodes)
    placement = place(4096, 8192, huge_pages=True, kernel=kernel, sysfs=sysfs)
    assert placement == Placement(numa_nodes=expected)
    assert kernel.calls == ([("interleave", 4096, 8192, expected)] if expected else [])


def test_a_kernel_that_refuses_is_named_and_no_failure(tmp_path):
    kernel = FakeKernel(refuses=True)
    sysfs = sysfs_of(tmp_path, shmem="[always] never", nodes="0-1")
    placement = place(0, 1, huge_pages=True, kernel=kernel, sysfs=sysfs)
    assert len(kernel.calls) == 2
    assert (placement.huge_pages, placement.numa_nodes) == (False, ())
    assert placement.refusals == (
        "huge pages: Operation not permitted",
        "NUMA interleaving: Operation not permitted",
    )


def test_a_machine_without_sysfs_is_left_alone(tmp_path):
    kernel = FakeKernel()
    assert place(0, 1, huge_pages=True, kernel=kernel, sysfs=tmp_path) == Placement()
    assert memory_nodes(tmp_path) == ()
    assert kernel.calls == []


@pytest.mark.parametrize(
    ("nodes", "words"),
    [((0,), [1]), ((0, 1, 5), [35]), ((63, 64), [1 << 63, 1]), ((130,), [0, 0, 4])],
)
def test_a_mask_has_one_bit_per_node(nodes, words):
    if ctypes.sizeof(ctypes.c_ulong) != 8:
        pytest.skip("words of this machine have another size")
    assert list(node_mask(nodes)) == words


def test_the_real_calls_are_understood_by_the_kernel():
    """Interleaving, were it over one node, shows in the kernel's own account of the mapping."""
    if not memory_nodes() or not Path("/sys", THP).is_dir():
        pytest.skip("a kernel without NUMA or without huge pages")
    fd = os.memfd_create("flashserve-test")
    os.ftruncate(fd, 4 << 20)
    mapping = mmap.mmap(fd, 4 << 20)
    anchor = ctypes.c_char.from_buffer(mapping)
    address = ctypes.addressof(anchor)
    try:
        memory.Linux().interleave(address, 4 << 20, memory_nodes())
        memory.Linux().advise_huge(address, 4 << 20)
        lines = Path("/proc/self/numa_maps").read_text().splitlines()
        policies = [line.split()[1] for line in lines if int(line.split()[0], 16) == address]
        assert policies
        assert policies[0].startswith("interleave:")
        with pytest.raises(OSError, match="Invalid argument"):
            memory.Linux().advise_huge(address + 1, 4096)
        with pytest.raises(OSError, match="Invalid argument"):
            memory.Linux().interleave(address, 4096, (900,))
    finally:
        del anchor
        mapping.close()
        os.close(fd)


def test_a_sealed_copy_holds_the_pieces_and_never_changes():
    with memoryview(b"first") as first, memoryview(bytes(5000)) as second:
        fd = sealed_copy([first, second, first])
    reopened = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    try:
        expected = b"first" + bytes(5000) + b"first"
        for each in (fd, reopened):
            assert os.pread(each, 10_000, 0) == expected
            for attempt in (
                lambda each=each: os.pwrite(each, b"x", 0),
                lambda each=each: os.ftruncate(each, 1),
                lambda each=each: os.ftruncate(each, 1 << 20),
                lambda each=each: mmap.mmap(each, 4096, mmap.MAP_SHARED, mmap.PROT_WRITE),
                lambda each=each: fcntl.fcntl(each, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL),
            ):
                with pytest.raises(PermissionError):
                    attempt()
        with mmap.mmap(
            fd, len(expected), mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE
        ) as own:
            own[:5] = b"other"
        assert os.pread(fd, 5, 0) == b"first"
    finally:
        os.close(fd)
        os.close(reopened)


def test_a_copy_without_memory_is_refused_and_leaves_nothing(monkeypatch):
    before = {entry.name for entry in Path("/proc/self/fd").iterdir()}

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with memoryview(b"bytes") as piece, pytest.raises(UnavailableError, match="no memory"):
        sealed_copy([piece])
    assert {entry.name for entry in Path("/proc/self/fd").iterdir()} == before
