"""The DRAM tier's memory: one memfd, mapped by its owner, sealed for everybody else.

Workers inherit the descriptor and `attach` to it read-only. No other process can write the bytes,
neither through the descriptor nor by opening it again through /proc, and none can resize it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterable

from flashserve.errors import InputError
from flashserve.store.dram.memory import Placement, huge_page_bytes, place, sealed_copy
from flashserve.store.dram.zone import (
    EXTENT_ALIGNMENT,
    PACKED_ALIGNMENT,
    ArenaUsage,
    Extent,
    ExtentState,
    Zone,
    extent_bytes,
)

__all__ = [
    "EXTENT_ALIGNMENT",
    "Arena",
    "ArenaUsage",
    "Extent",
    "ExtentState",
    "Zone",
    "attach",
    "extent_bytes",
]

_MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module of 3.11 does not name it
_PREFAULT_PIECE_BYTES = 16 << 20
_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; the fcntl module does not name it

# Calls through ctypes let other threads run; mmap.madvise holds the interpreter lock.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def attach(fd: int, num_bytes: int) -> mmap.mmap:
    """Maps an inherited arena read-only, whole."""
    return mmap.mmap(fd, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ)


class Arena(Zone):
    """A fixed amount of shared memory. Itself it gives out extents of whole 2 MiB, for models.

    `packed` is the zone at its end, for adapters: many small files, in extents of whole 64 KiB.
    Neither takes room from the other.
    """

    def __init__(
        self,
        num_bytes: int,
        *,
        prefault: bool = False,
        huge_pages: bool = True,
        packed_bytes: int = 0,
    ) -> None:
        """Takes `num_bytes`, rounded down to whole 2 MiB.

        Args:
            num_bytes: the size for good.
            prefault: take the memory from the kernel at once, in the background.
            huge_pages: ask for huge pages where the kernel has them for shared memory.
            packed_bytes: how much of it is the zone for adapters, rounded down to whole 2 MiB.

        Raises:
            InputError: less than 2 MiB, or more than the kernel maps.
        """
        self.num_bytes = num_bytes // EXTENT_ALIGNMENT * EXTENT_ALIGNMENT
        packed_bytes = packed_bytes // EXTENT_ALIGNMENT * EXTENT_ALIGNMENT
        model_bytes = self.num_bytes - packed_bytes
        if model_bytes <= 0:
            raise InputError(
                f"an arena of {num_bytes} bytes, {packed_bytes} of them for adapters, is too "
                "small: give it 2 MiB or more for models"
            )
        self.fd, self._map = _create(self.num_bytes)
        view = memoryview(self._map)
        address = ctypes.addressof(ctypes.c_ubyte.from_buffer(view))
        super().__init__(view, address, (0, model_bytes), EXTENT_ALIGNMENT, "node.dram_bytes")
        bounds = (model_bytes, self.num_bytes)
        self.packed = Zone(view, address, bounds, PACKED_ALIGNMENT, "node.adapter_bytes")
        self.placement: Placement = place(address, self.num_bytes, huge_pages=huge_pages)
        self._prefaulter = _Prefaulter(address, self.num_bytes) if prefault else None

    @property
    def prefaulted_bytes(self) -> int:
        """How much memory the background thread has taken from the kernel so far."""
        return self._prefaulter.num_done if self._prefaulter else 0

    @property
    def prefault_refusal(self) -> str | None:
        """Why the kernel would not fault memory ahead, if so: it then comes on first use."""
        return self._prefaulter.refusal if self._prefaulter else None

    @property
    def is_prefaulting(self) -> bool:
        """Whether the background thread will take more."""
        return self._prefaulter is not None and self._prefaulter.is_running

    def huge_page_bytes(self) -> int:
        """How much of the arena is mapped with huge pages; asks the kernel where it may be any."""
        return huge_page_bytes(self._address) if self.placement.huge_pages else 0

    def copy_out(self, extents: Iterable[tuple[int, int]]) -> int:
        """A copy of some of the arena's bytes, for a process that is no worker.

        Args:
            extents: offset and bytes of each; the caller leases them. They are one after another
                in the copy.

        Returns:
            A memfd that nobody can change and only this user can open; the caller closes it.

        Raises:
            UnavailableError: the machine has no memory for it.
        """
        with contextlib.ExitStack() as stack:
            views = [self._view[offset : offset + size] for offset, size in extents]
            return sealed_copy([stack.enter_context(view) for view in views])

    def close(self) -> None:
        """Ends the prefault thread, unmaps, and closes the descriptor.

        Views that are still out keep the memory, but nothing else, until they are gone.
        """
        if self._prefaulter:
            self._prefaulter.stop()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        with contextlib.suppress(BufferError):
            self._view.release()
            self._map.close()


def _create(num_bytes: int) -> tuple[int, mmap.mmap]:
    fd = os.memfd_create("flashserve-arena", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.fchmod(fd, 0o600)  # a memfd is born open to all
        os.ftruncate(fd, num_bytes)
        mapping = mmap.mmap(fd, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        # The mapping above stays writable; no later one, by whomever, can be.
        fcntl.fcntl(
            fd,
            fcntl.F_ADD_SEALS,
            fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _F_SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL,
        )
    except (OSError, OverflowError) as error:
        os.close(fd)
        raise InputError(f"an arena of {num_bytes} bytes cannot be made: {error}") from None
    return fd, mapping


class _Prefaulter:
    """A thread that takes a mapping's memory from the kernel, from its start to its end.

    Reading into memory that has never been touched is several times slower.
    """

    def __init__(self, address: int, num_bytes: int) -> None:
        self.num_done = 0
        self.refusal: str | None = None
        self._address = address
        self._num_bytes = num_bytes
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="arena-prefault", daemon=True)
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        while self.num_done < self._num_bytes and not self._stopping.is_set():
            size = min(_PREFAULT_PIECE_BYTES, self._num_bytes - self.num_done)
            if _libc.madvise(self._address + self.num_done, size, _MADV_POPULATE_WRITE):
                code = ctypes.get_errno()
                if code == errno.EINTR:
                    continue
                self.refusal = f"MADV_POPULATE_WRITE: {os.strerror(code)}"
                return
            self.num_done += size
