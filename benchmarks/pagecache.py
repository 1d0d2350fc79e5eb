"""Which of a checkpoint's bytes the kernel keeps in memory: none, or all of them."""

from __future__ import annotations

import ctypes
import mmap
import os
import pathlib
import time

_ATTEMPTS = 20
_libc = ctypes.CDLL(None, use_errno=True)
_libc.mincore.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p)


def drop(path: pathlib.Path) -> None:
    """Takes every page of the file, or of the directory's files, out of the page cache.

    Raises:
        SystemExit: pages stay there, so that nothing read from here on would be cold.
    """
    for file in _files(path):
        for _ in range(_ATTEMPTS):
            descriptor = os.open(file, os.O_RDONLY)
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
            if not (left := resident_pages(file)):
                break
            time.sleep(0.05)
        else:
            raise SystemExit(f"{left} pages of {file.name} stay in the page cache")


def fill(path: pathlib.Path) -> None:
    """Reads every file, so that the page cache has it."""
    buffer = bytearray(8 << 20)
    for file in _files(path):
        with file.open("rb", buffering=0) as opened:
            while opened.readinto(buffer):
                pass


def resident_pages(file: pathlib.Path) -> int:
    """How many pages of the file are in the page cache (mincore)."""
    num_bytes = file.stat().st_size
    if not num_bytes:
        return 0
    with file.open("rb") as opened:
        # A private writable mapping, because ctypes takes the address of nothing else.
        mapping = mmap.mmap(opened.fileno(), 0, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE)
    anchor = ctypes.c_ubyte.from_buffer(mapping)
    found = (ctypes.c_ubyte * (-(-num_bytes // mmap.PAGESIZE)))()
    try:
        if _libc.mincore(ctypes.addressof(anchor), num_bytes, found):
            raise OSError(ctypes.get_errno(), "mincore failed")
    finally:
        del anchor
        mapping.close()
    return sum(page & 1 for page in bytes(found))


def refuse_tmpfs(directory: pathlib.Path) -> None:
    """A checkpoint in memory is never cold: the directory has to lie on a disk."""
    best, kind = "", ""
    for line in pathlib.Path("/proc/self/mountinfo").read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        point = fields.split()[4]
        if directory.resolve().is_relative_to(point) and len(point) >= len(best):
            best, kind = point, rest.split()[0]
    if kind in {"tmpfs", "ramfs"}:
        raise SystemExit(f"{directory} lies on {kind}: set TMPDIR to a directory on a disk")


def _files(path: pathlib.Path) -> list[pathlib.Path]:
    return sorted(path.iterdir()) if path.is_dir() else [path]
