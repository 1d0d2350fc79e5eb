"""The DRAM tier's memory: one memfd, mapped by its owner, sealed for everybody else.

Workers inherit the descriptor and `attach` to it read-only. No other process can write the bytes,
neither through the descriptor nor by opening it again through /proc, and none can resize it.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import dataclasses
import enum
import errno
import fcntl
import mmap
import os
import threading
from collections.abc import Iterable

from flashserve.errors import ConflictError, InputError, ModelTooLargeError, UnavailableError
from flashserve.store.dram.memory import Placement, huge_page_bytes, place, sealed_copy

EXTENT_ALIGNMENT = 2 << 20

_MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module of 3.11 does not name it
_PREFAULT_PIECE_BYTES = 16 << 20
_F_SEAL_FUTURE_WRITE = 0x10  # Linux 5.1; the fcntl module does not name it

# Calls through ctypes let other threads run; mmap.madvise holds the interpreter lock.
_libc = ctypes.CDLL(None, use_errno=True)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


def extent_bytes(num_bytes: int) -> int:
    """What an image of `num_bytes` takes of an arena."""
    return max(-(-num_bytes // EXTENT_ALIGNMENT), 1) * EXTENT_ALIGNMENT


def attach(fd: int, num_bytes: int) -> mmap.mmap:
    """Maps an inherited arena read-only, whole."""
    return mmap.mmap(fd, num_bytes, mmap.MAP_SHARED, mmap.PROT_READ)


class ExtentState(enum.Enum):
    FILLING = "filling"
    SEALED = "sealed"
    FREED = "freed"


@dataclasses.dataclass(slots=True, eq=False)
class Extent:
    """A range of the arena. Only the arena writes these fields.

    offset is stable while the extent is filling or leased; otherwise making room may move it.
    """

    offset: int
    num_bytes: int
    state: ExtentState = ExtentState.FILLING
    num_leases: int = 0

    @property
    def end(self) -> int:
        return self.offset + self.num_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class ArenaUsage:
    """Bytes: used + free == total."""

    total: int
    used: int
    free: int


class Arena:
    """A fixed amount of shared memory, given out in extents of whole 2 MiB.

    Thread-safe. An extent goes FILLING -> SEALED -> FREED, or FILLING -> FREED when reading it
    failed. A leased extent is neither freed nor moved.
    """

    def __init__(self, num_bytes: int, *, prefault: bool = False, huge_pages: bool = True) -> None:
        """Takes `num_bytes`, rounded down to whole 2 MiB.

        Args:
            num_bytes: the size for good.
            prefault: take the memory from the kernel at once, in the background.
            huge_pages: ask for huge pages where the kernel has them for shared memory.

        Raises:
            InputError: less than 2 MiB, or more than the kernel maps.
        """
        self.num_bytes = num_bytes // EXTENT_ALIGNMENT * EXTENT_ALIGNMENT
        if self.num_bytes <= 0:
            raise InputError(f"an arena of {num_bytes} bytes is too small: give it 2 MiB or more")
        self.fd, self._map = _create(self.num_bytes)
        self._view = memoryview(self._map)
        self._address = ctypes.addressof(ctypes.c_ubyte.from_buffer(self._view))
        self.placement: Placement = place(self._address, self.num_bytes, huge_pages=huge_pages)
        self._lock = threading.Lock()
        # Sorted by offset. Extents do not overlap; what lies between them is free.
        self._extents: list[Extent] = []
        self._prefaulter = _Prefaulter(self._address, self.num_bytes) if prefault else None

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

    def usage(self) -> ArenaUsage:
        with self._lock:
            used = sum(extent.num_bytes for extent in self._extents)
        return ArenaUsage(self.num_bytes, used, self.num_bytes - used)

    def allocate(self, num_bytes: int) -> Extent:
        """A FILLING extent of at least `num_bytes`, in the smallest gap that holds it.

        When only scattered gaps are left, extents that nobody leases are moved together.

        Raises:
            ModelTooLargeError: the whole arena is smaller.
            UnavailableError: there is no room now.
        """
        size = extent_bytes(num_bytes)
        if size > self.num_bytes:
            raise ModelTooLargeError(
                f"{num_bytes} bytes do not fit into the arena of {self.num_bytes} bytes: raise "
                "node.dram_bytes"
            )
        with self._lock:
            free = self.num_bytes - sum(extent.num_bytes for extent in self._extents)
            offset = self._find(size) if size <= free else None
            if offset is None and size <= free:
                self._compact()
                offset = self._find(size)
            if offset is None:
                raise UnavailableError(
                    f"no room for {size} bytes: {free} of the arena's {self.num_bytes} are free, "
                    "the rest holds other models"
                )
            extent = Extent(offset, size)
            bisect.insort(self._extents, extent, key=lambda each: each.offset)
            return extent

    def memory(self, extent: Extent) -> memoryview:
        """The bytes of a filling or leased extent. Release the view before the extent."""
        return self._view[extent.offset : extent.end]

    def seal(self, extent: Extent) -> None:
        """The extent's bytes are complete and will not change again."""
        with self._lock:
            assert extent.state is ExtentState.FILLING
            extent.state = ExtentState.SEALED

    def lease(self, extent: Extent) -> None:
        """Keeps a sealed extent where it is until `release`."""
        with self._lock:
            assert extent.state is ExtentState.SEALED
            extent.num_leases += 1

    def release(self, extent: Extent) -> None:
        with self._lock:
            assert extent.num_leases > 0
            extent.num_leases -= 1

    def free(self, extent: Extent) -> None:
        """Makes the extent's bytes available.

        Raises:
            ConflictError: it is leased.
        """
        with self._lock:
            if extent.num_leases:
                raise ConflictError(f"an extent with {extent.num_leases} leases cannot be freed")
            self._extents.remove(extent)
            extent.state = ExtentState.FREED

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

    def _find(self, size: int) -> int | None:
        """The offset of the smallest gap of at least `size` bytes."""
        gaps: list[tuple[int, int]] = []
        begin = 0
        for end, after in [(each.offset, each.end) for each in self._extents] + [
            (self.num_bytes, self.num_bytes)
        ]:
            if end - begin >= size:
                gaps.append((end - begin, begin))
            begin = after
        return min(gaps)[1] if gaps else None

    def _compact(self) -> None:
        """Moves every sealed extent without a lease down to the end of the one before it."""
        begin = 0
        for extent in self._extents:
            is_movable = extent.state is ExtentState.SEALED and not extent.num_leases
            if is_movable and extent.offset > begin:
                ctypes.memmove(
                    self._address + begin, self._address + extent.offset, extent.num_bytes
                )
                extent.offset = begin
            begin = extent.end


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
