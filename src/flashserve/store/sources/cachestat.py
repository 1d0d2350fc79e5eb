"""Asks the kernel how much of a file its page cache holds, without reading anything."""

from __future__ import annotations

import ctypes
import errno
import os

# cachestat(2), Linux 6.5; the same number on every architecture, and not yet in libc.
_SYS_CACHESTAT = 451
_UNKNOWN = {errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP}


class _Range(ctypes.Structure):
    _fields_ = (("off", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _Stat(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64)
        for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    )


_libc = ctypes.CDLL(None, use_errno=True)


def num_cached_pages(descriptor: int, begin: int, num_bytes: int) -> int | None:
    """Of the pages that hold the bytes [begin, begin + num_bytes); None if the kernel won't say.

    It says it of files that the caller owns or may write, from Linux 6.5 on.

    Raises:
        OSError: the descriptor is not one of a file.
    """
    wanted, found = _Range(begin, num_bytes), _Stat()
    failed = _libc.syscall(
        ctypes.c_long(_SYS_CACHESTAT),
        ctypes.c_uint(descriptor),
        ctypes.byref(wanted),
        ctypes.byref(found),
        ctypes.c_uint(0),
    )
    if not failed:
        return int(found.cached)
    code = ctypes.get_errno()
    if code in _UNKNOWN:
        return None
    raise OSError(code, os.strerror(code))
