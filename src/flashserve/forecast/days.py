"""The arrivals of one series on one day (UTC): compact in memory, a compressed blob on disk."""

from __future__ import annotations

import array
import bisect
import zlib
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from flashserve.forecast.core import MAX_COUNT

DAY_MINUTES = 1440
_FORMAT = b"\x01"
_ENTRY_BYTES = 10
_MOST = int(MAX_COUNT)


def day_of(minute: int) -> int:
    """The whole number of days since 1970 (UTC)."""
    return minute // DAY_MINUTES


class DayCounts:
    """Counts by minute of the day, in order of minutes; quiet minutes take nothing."""

    __slots__ = ("_counts", "_minutes")

    def __init__(self) -> None:
        self._minutes = array.array("H")
        self._counts = array.array("Q")

    def __len__(self) -> int:
        return len(self._minutes)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Minute of the day and count, oldest first."""
        return zip(self._minutes, self._counts, strict=True)

    def add(self, minute: int, count: int) -> None:
        """`count` more arrivals in that minute of the day; no minute holds more than MAX_COUNT."""
        minutes, counts = self._minutes, self._counts
        at = len(minutes)
        if at and minute <= minutes[-1]:
            at = bisect.bisect_left(minutes, minute)
            if minutes[at] == minute:
                counts[at] = min(counts[at] + count, _MOST)
                return
        minutes.insert(at, minute)
        counts.insert(at, min(count, _MOST))

    def merge(self, other: DayCounts) -> None:
        """Add what another record of the same day says."""
        for minute, count in other:
            self.add(minute, count)

    def arrays(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Minutes of the day and counts: [entries] each."""
        minutes = np.frombuffer(self._minutes, dtype=np.uint16).astype(np.int64)
        return minutes, np.frombuffer(self._counts, dtype=np.uint64).astype(np.float32)

    def pack(self) -> bytes:
        """A version byte, then the deflated minutes (uint16) and counts (uint64), little-endian."""
        minutes = np.frombuffer(self._minutes, dtype=np.uint16).astype("<u2")
        counts = np.frombuffer(self._counts, dtype=np.uint64).astype("<u8")
        return _FORMAT + zlib.compress(minutes.tobytes() + counts.tobytes())

    @classmethod
    def unpack(cls, blob: bytes) -> DayCounts:
        """What `pack` made.

        Raises:
            ValueError: it is damaged, or of another version.
        """
        if blob[:1] != _FORMAT:
            raise ValueError("counts of a day in a format that is not known")
        inflater = zlib.decompressobj()
        try:
            raw = inflater.decompress(blob[1:], DAY_MINUTES * _ENTRY_BYTES + 1)
        except zlib.error as error:
            raise ValueError(f"counts of a day are damaged: {error}") from None
        size, rest = divmod(len(raw), _ENTRY_BYTES)
        minutes = np.frombuffer(raw, dtype="<u2", count=size)
        counts = np.frombuffer(raw, dtype="<u8", count=size, offset=2 * size)
        is_whole = inflater.eof and not rest and (np.diff(minutes.astype(np.int64)) > 0).all()
        if not is_whole or (minutes >= DAY_MINUTES).any() or (counts > _MOST).any():
            raise ValueError("counts of a day are damaged")
        day = cls()
        day._minutes = array.array("H", minutes.tolist())
        day._counts = array.array("Q", counts.tolist())
        return day
