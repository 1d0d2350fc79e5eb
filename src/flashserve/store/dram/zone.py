"""Gives out a range of memory in extents, and moves them together when only gaps are left."""

from __future__ import annotations

import bisect
import ctypes
import dataclasses
import enum
import threading

from flashserve.errors import ConflictError, ModelTooLargeError, UnavailableError

EXTENT_ALIGNMENT = 2 << 20
PACKED_ALIGNMENT = 64 << 10


def extent_bytes(num_bytes: int, alignment: int = EXTENT_ALIGNMENT) -> int:
    """What an image of `num_bytes` takes of an arena."""
    return max(-(-num_bytes // alignment), 1) * alignment


class ExtentState(enum.Enum):
    FILLING = "filling"
    SEALED = "sealed"
    FREED = "freed"


@dataclasses.dataclass(slots=True, eq=False)
class Extent:
    """A range of the arena. Only its zone writes these fields.

    offset counts from the arena's start, and is stable while the extent is filling or leased;
    otherwise making room may move it.
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


class Zone:
    """The bytes [begin, end) of the arena, given out in whole multiples of the alignment.

    Thread-safe. An extent goes FILLING -> SEALED -> FREED, or FILLING -> FREED when reading it
    failed. A leased extent is neither freed nor moved.

    Args:
        view: the whole arena's bytes, which start at `address`.
        setting: says how large the zone is; for messages.
    """

    def __init__(
        self,
        view: memoryview,
        address: int,
        bounds: tuple[int, int],
        alignment: int,
        setting: str,
    ) -> None:
        self._view = view
        self._address = address
        self._begin, self._end = bounds
        self._alignment = alignment
        self.setting = setting
        self._lock = threading.Lock()
        # Sorted by offset. Extents do not overlap; what lies between them is free.
        self._extents: list[Extent] = []

    def extent_bytes(self, num_bytes: int) -> int:
        """What an image of `num_bytes` takes of this zone."""
        return extent_bytes(num_bytes, self._alignment)

    def usage(self) -> ArenaUsage:
        with self._lock:
            return self._usage()

    def allocate(self, num_bytes: int) -> Extent:
        """A FILLING extent of at least `num_bytes`, in the smallest gap that holds it.

        When only scattered gaps are left, extents that nobody leases are moved together.

        Raises:
            ModelTooLargeError: the whole zone is smaller.
            UnavailableError: there is no room now.
        """
        size = self.extent_bytes(num_bytes)
        with self._lock:
            usage = self._usage()
            if size > usage.total:
                raise ModelTooLargeError(
                    f"{num_bytes} bytes do not fit into the arena of {usage.total} bytes: raise "
                    f"{self.setting}"
                )
            offset = self._find(size) if size <= usage.free else None
            if offset is None and size <= usage.free:
                self._compact()
                offset = self._find(size)
            if offset is None:
                raise UnavailableError(
                    f"no room for {size} bytes: {usage.free} of the arena's {usage.total} are "
                    "free, the rest is taken"
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

    def _usage(self) -> ArenaUsage:
        total, used = self._end - self._begin, sum(each.num_bytes for each in self._extents)
        return ArenaUsage(total, used, total - used)

    def _find(self, size: int) -> int | None:
        """The offset of the smallest gap of at least `size` bytes."""
        gaps: list[tuple[int, int]] = []
        begin = self._begin
        for end, after in [(each.offset, each.end) for each in self._extents] + [
            (self._end, self._end)
        ]:
            if end - begin >= size:
                gaps.append((end - begin, begin))
            begin = after
        return min(gaps)[1] if gaps else None

    def _compact(self) -> None:
        """Moves every sealed extent without a lease down to the end of the one before it."""
        begin = self._begin
        for extent in self._extents:
            is_movable = extent.state is ExtentState.SEALED and not extent.num_leases
            if is_movable and extent.offset > begin:
                ctypes.memmove(
                    self._address + begin, self._address + extent.offset, extent.num_bytes
                )
                extent.offset = begin
            begin = extent.end
