"""What the kernel is asked about shared memory: how large its pages are, where they lie, copies."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import fcntl
import mmap
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from flashserve.errors import UnavailableError

_SYSFS = Path("/sys")
_GIVES_HUGE_PAGES = {"always", "within_size", "advise", "force"}
_MPOL_INTERLEAVE = 3
_SYS_MBIND = {"x86_64": 237, "aarch64": 235, "riscv64": 235}
_MASK_BITS = 8 * ctypes.sizeof(ctypes.c_ulong)


class Kernel(Protocol):
    """The calls that place memory. Each raises OSError."""

    def advise_huge(self, address: int, num_bytes: int) -> None: ...

    def interleave(self, address: int, num_bytes: int, nodes: tuple[int, ...]) -> None: ...


class Linux:
    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        self._libc.syscall.restype = ctypes.c_long

    def advise_huge(self, address: int, num_bytes: int) -> None:
        _check(self._libc.madvise(address, num_bytes, mmap.MADV_HUGEPAGE))

    def interleave(self, address: int, num_bytes: int, nodes: tuple[int, ...]) -> None:
        number = _SYS_MBIND.get(platform.machine())
        if number is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        mask = node_mask(nodes)
        num_bits = len(mask) * _MASK_BITS + 1  # the kernel takes one less than it is told
        _check(
            self._libc.syscall(
                ctypes.c_long(number),
                ctypes.c_void_p(address),
                ctypes.c_ulong(num_bytes),
                ctypes.c_long(_MPOL_INTERLEAVE),
                mask,
                ctypes.c_ulong(num_bits),
                ctypes.c_ulong(0),
            )
        )


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """What was got.

    huge_pages: the kernel has been asked for them, and has them for shared memory. numa_nodes: over
    which pages are spread in turn, empty where there is nothing to choose. refusals: one line each.
    """

    huge_pages: bool = False
    numa_nodes: tuple[int, ...] = ()
    refusals: tuple[str, ...] = ()


def place(
    address: int,
    num_bytes: int,
    *,
    huge_pages: bool,
    kernel: Kernel | None = None,
    sysfs: Path = _SYSFS,
) -> Placement:
    """Asks for the best pages for a shared mapping of which nothing has been touched yet.

    On a machine of several NUMA nodes its pages are spread over all of them, because workers on
    each read the same bytes. A kernel that refuses is no failure: memory is then where and as it
    always is.
    """
    kernel = kernel or Linux()
    refusals: list[str] = []
    has_huge_pages = huge_pages and _gives_huge_pages(sysfs)
    if has_huge_pages:
        try:
            kernel.advise_huge(address, num_bytes)
        except OSError as error:
            has_huge_pages = False
            refusals.append(f"huge pages: {error.strerror}")
    nodes = memory_nodes(sysfs)
    if len(nodes) < 2:
        return Placement(has_huge_pages, (), tuple(refusals))
    try:
        kernel.interleave(address, num_bytes, nodes)
    except OSError as error:
        nodes = ()
        refusals.append(f"NUMA interleaving: {error.strerror}")
    return Placement(has_huge_pages, nodes, tuple(refusals))


def memory_nodes(sysfs: Path = _SYSFS) -> tuple[int, ...]:
    """The NUMA nodes that have memory; empty where the kernel does not say."""
    nodes: list[int] = []
    for part in _read(sysfs / "devices/system/node/has_memory").split(","):
        first, _, last = part.partition("-")
        if first.isdecimal():
            nodes += range(int(first), int(last or first) + 1)
    return tuple(nodes)


def node_mask(nodes: tuple[int, ...]) -> ctypes.Array[ctypes.c_ulong]:
    """A bit per node, as the kernel counts them."""
    mask = (ctypes.c_ulong * (max(nodes) // _MASK_BITS + 1))()
    for node in nodes:
        mask[node // _MASK_BITS] |= 1 << node % _MASK_BITS
    return mask


def huge_page_bytes(address: int, smaps: Path = Path("/proc/self/smaps")) -> int:
    """Bytes of the shared mapping at `address` in huge pages; 0 where the kernel is silent."""
    begin = f"{address:x}-"
    is_ours = False
    try:
        with smaps.open() as lines:
            for line in lines:
                name, _, rest = line.partition(" ")
                if not name.endswith(":"):  # a range of addresses opens a mapping's lines
                    is_ours = name.startswith(begin)
                elif is_ours and name == "ShmemPmdMapped:":
                    return int(rest.split()[0]) * 1024
    except OSError:
        return 0
    return 0


def sealed_copy(pieces: Iterable[memoryview]) -> int:
    """A new memfd with the bytes of `pieces` one after another, which nobody can change any more.

    It can be mapped MAP_PRIVATE and read. The caller closes it.

    Raises:
        UnavailableError: the machine has no memory for it.
    """
    fd = os.memfd_create("flashserve-copy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(fd, 0o600)
        for piece in pieces:
            done = 0
            while done < len(piece):
                with piece[done:] as rest:
                    done += os.write(fd, rest)
        fcntl.fcntl(
            fd,
            fcntl.F_ADD_SEALS,
            fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL,
        )
    except BaseException as error:
        os.close(fd)
        if isinstance(error, OSError) and error.errno in {errno.ENOMEM, errno.ENOSPC, errno.EFBIG}:
            raise UnavailableError(f"no memory for a copy: {error.strerror}") from None
        raise
    return fd


def _gives_huge_pages(sysfs: Path) -> bool:
    """Whether shared memory that asks for pages of 2 MiB can get them."""
    base = sysfs / "kernel/mm/transparent_hugepage"
    chosen = _chosen(base / "hugepages-2048kB/shmem_enabled")
    if chosen in {"", "inherit"}:  # an older kernel has one setting for all sizes
        chosen = _chosen(base / "shmem_enabled")
    return chosen in _GIVES_HUGE_PAGES


def _chosen(path: Path) -> str:
    """Of "always advise [never]", the word in brackets; empty where there is none."""
    return _read(path).partition("[")[2].partition("]")[0]


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""  # a kernel without that feature has no such file


def _check(result: int) -> None:
    if result:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
