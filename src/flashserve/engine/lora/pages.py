"""Who holds which page of the adapters' memory.

A page has one owner or none, and used + free == num_pages after every call. A row of an adapter
(a row of A, or a column of B) takes neighbouring pages; the rows of an adapter need not be
neighbours of each other, so adapters of all ranks fill the same memory without gaps.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Iterable, Sequence


@dataclasses.dataclass(frozen=True, slots=True)
class Rows:
    """Rows of `width` neighbouring pages each, by their first pages."""

    width: int
    starts: tuple[int, ...]

    @property
    def num_pages(self) -> int:
        return self.width * len(self.starts)


class PagePool:
    """Hands out pages 0 .. num_pages - 1."""

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        # Sorted, disjoint, non-touching free runs [start, end).
        self._starts: list[int] = [0] if num_pages else []
        self._ends: list[int] = [num_pages] if num_pages else []
        self._num_free = num_pages

    @property
    def num_free(self) -> int:
        return self._num_free

    @property
    def num_used(self) -> int:
        return self.num_pages - self._num_free

    def allocate(self, wanted: Sequence[tuple[int, int]]) -> list[Rows] | None:
        """Rows for each (count, width) of `wanted`; None, and nothing taken, if one finds no room.

        One run for all where there is one, the smallest that will do; else the widest rows choose
        first, so that narrow ones fill what is left between them.
        """
        total = sum(count * width for count, width in wanted)
        if total > self._num_free:
            return None
        if (run := self._tightest(total)) is not None:
            return self._carve(run, wanted)
        found: dict[int, Rows] = {}
        for index in sorted(range(len(wanted)), key=lambda item: -wanted[item][1]):
            starts = self._scatter(*wanted[index])
            if starts is None:
                self.release(found.values())
                return None
            found[index] = Rows(wanted[index][1], tuple(starts))
        return [found[index] for index in range(len(wanted))]

    def release(self, rows: Iterable[Rows]) -> None:
        """Gives pages back. Each was handed out by `allocate` and is given back once."""
        for item in rows:
            for start in item.starts:
                self._add(start, start + item.width)

    def _tightest(self, num_pages: int) -> int | None:
        """Index of the smallest run that holds `num_pages`, the first of equals."""
        sizes = ((end - start, index) for index, (start, end) in enumerate(self._runs()))
        return min((item for item in sizes if item[0] >= num_pages), default=(0, None))[1]

    def _runs(self) -> Iterable[tuple[int, int]]:
        return zip(self._starts, self._ends, strict=True)

    def _carve(self, run: int, wanted: Sequence[tuple[int, int]]) -> list[Rows]:
        rows = []
        for count, width in wanted:
            begin = self._take(run, count * width) if count * width else 0
            rows.append(Rows(width, tuple(begin + width * index for index in range(count))))
        return rows

    def _scatter(self, count: int, width: int) -> list[int] | None:
        """First pages of `count` rows, from the tightest runs; None, and nothing taken."""
        starts: list[int] = []
        while len(starts) < count:
            run = self._tightest((count - len(starts)) * width)
            if run is None:
                run = self._roomiest()
            num_rows = min(count - len(starts), self._size(run) // width) if run is not None else 0
            if run is None or num_rows == 0:
                self.release([Rows(width, tuple(starts))])
                return None
            begin = self._take(run, num_rows * width)
            starts += [begin + width * index for index in range(num_rows)]
        return starts

    def _size(self, run: int) -> int:
        return self._ends[run] - self._starts[run]

    def _roomiest(self) -> int | None:
        return max(range(len(self._starts)), key=self._size, default=None)

    def _take(self, run: int, num_pages: int) -> int:
        """The first pages of a run; the run may be gone afterwards."""
        begin = self._starts[run]
        self._starts[run] += num_pages
        assert self._starts[run] <= self._ends[run]
        self._num_free -= num_pages
        if self._starts[run] == self._ends[run]:
            del self._starts[run], self._ends[run]
        return begin

    def _add(self, start: int, end: int) -> None:
        index = bisect.bisect_right(self._starts, start)
        assert index == 0 or self._ends[index - 1] <= start, "a page was given back twice"
        assert index == len(self._starts) or end <= self._starts[index]
        joins_left = index > 0 and self._ends[index - 1] == start
        joins_right = index < len(self._starts) and self._starts[index] == end
        if joins_left and joins_right:
            self._ends[index - 1] = self._ends[index]
            del self._starts[index], self._ends[index]
        elif joins_left:
            self._ends[index - 1] = end
        elif joins_right:
            self._starts[index] = start
        else:
            self._starts.insert(index, start)
            self._ends.insert(index, end)
        self._num_free += end - start
