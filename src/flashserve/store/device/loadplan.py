"""The plan of one load: where tensors come to lie on the device, and which copies bring them there.

Pure arithmetic. The layout is made once for a model and never changes, so that addresses stay
stable from sleep to wake; the copies are planned for every load, because the arena may have moved
the bytes meanwhile.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from flashserve.errors import CheckpointError, UnsupportedModelError
from flashserve.store.checkpoint.layout import DTYPE_BITS
from flashserve.store.device.slices import Part, whole
from flashserve.types import TensorSlice

COPY_BYTES = 64 << 20
"""A longer run is copied in equal pieces of half of that or more."""
_ALIGNMENT = 256
_FOLLOWING_ALIGNMENT = 16
"""Enough for a tensor that follows another in its file: both can then be one copy."""
_FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})


@dataclasses.dataclass(frozen=True, slots=True)
class Placement:
    """A tensor on the device: bytes [offset, offset + num_bytes) of the region.

    part is what it holds of the stored tensor. A tensor whose dtype differs from `stored` arrives
    at `staged_at`, in the region's scratch, and is converted from there.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int
    stored: str
    part: Part
    staged_at: int | None = None

    @property
    def arrives_at(self) -> int:
        return self.offset if self.staged_at is None else self.staged_at


@dataclasses.dataclass(frozen=True, slots=True)
class RegionLayout:
    """A model's region: groups in execution order, one after another, then the scratch.

    The scratch is used anew by each group, in the order of the copy stream.
    """

    groups: tuple[tuple[Placement, ...], ...]
    num_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class Copy:
    """From the arena to the region: num_rows runs of row_bytes, packed at the target.

    Run i is read at source + i * pitch_bytes. One run is contiguous.
    """

    source: int
    target: int
    row_bytes: int
    num_rows: int = 1
    pitch_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        return self.row_bytes * self.num_rows

    @property
    def source_end(self) -> int:
        return self.source + (self.num_rows - 1) * self.pitch_bytes + self.row_bytes


def lay_out(
    tensors: Iterable[TensorSlice],
    groups: Sequence[Sequence[str]],
    *,
    parts: Mapping[str, Part] | None = None,
    float_dtype: str | None = None,
) -> RegionLayout:
    """Places tensors so that a group's lie together and those that follow in a file stay so.

    Args:
        groups: names in execution order; every tensor is in exactly one of them.
        parts: what this rank needs of a tensor; the whole of one that is not named.
        float_dtype: what floating-point tensors become; None leaves each as it is stored.

    Raises:
        UnsupportedModelError: a tensor's type is not known.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    names = list(itertools.chain.from_iterable(groups))
    assert sorted(names) == sorted(by_name), "the groups do not hold every tensor exactly once"
    builder = _Builder(parts or {}, float_dtype)
    for group in groups:
        builder.add(sorted((by_name[name] for name in group), key=lambda each: each.offset))
    return builder.finish()


class _Builder:
    def __init__(self, parts: Mapping[str, Part], float_dtype: str | None) -> None:
        self._parts = parts
        self._float_dtype = float_dtype
        self._groups: list[list[Placement]] = []
        self._end = 0
        self._scratch_bytes = 0

    def add(self, tensors: list[TensorSlice]) -> None:
        placed: list[Placement] = []
        scratch = 0
        previous_end = -1
        for tensor in tensors:
            part = self._parts.get(tensor.name) or whole(tensor)
            dtype = self._dtype(tensor)
            staged_at = None
            if dtype != tensor.dtype and part.num_bytes:
                staged_at, scratch = scratch, _aligned(scratch + part.num_bytes, _ALIGNMENT)
            begin = tensor.offset + part.offset
            follows = begin == previous_end and staged_at is None and part.num_rows == 1
            previous_end = begin + part.num_bytes if part.num_rows == 1 else -1
            offset = _aligned(self._end, _FOLLOWING_ALIGNMENT if follows else _ALIGNMENT)
            num_bytes = part.num_bytes
            if dtype != tensor.dtype:
                num_bytes = math.prod(part.shape) * DTYPE_BITS[dtype] // 8
            placed.append(
                Placement(
                    tensor.name,
                    dtype,
                    part.shape,
                    offset,
                    num_bytes,
                    tensor.dtype,
                    part,
                    staged_at,
                )
            )
            self._end = offset + num_bytes
        self._groups.append(placed)
        self._scratch_bytes = max(self._scratch_bytes, scratch)

    def finish(self) -> RegionLayout:
        start = _aligned(self._end, _ALIGNMENT)
        groups = tuple(
            tuple(
                place
                if place.staged_at is None
                else dataclasses.replace(place, staged_at=start + place.staged_at)
                for place in group
            )
            for group in self._groups
        )
        return RegionLayout(groups, start + self._scratch_bytes)

    def _dtype(self, tensor: TensorSlice) -> str:
        if tensor.dtype not in DTYPE_BITS:
            raise UnsupportedModelError(f"tensor {tensor.name} has type {tensor.dtype}")
        if self._float_dtype is not None and tensor.dtype in _FLOATS:
            return self._float_dtype
        return tensor.dtype


def plan_copies(
    layout: RegionLayout,
    tensors: Iterable[TensorSlice],
    arena_bytes: int,
    boundaries: Sequence[int] = (),
) -> tuple[tuple[Copy, ...], ...]:
    """The copies of each group, in the order of their sources.

    Args:
        tensors: where they lie in the arena now.
        boundaries: arena offsets, ascending, that no copy may cross.

    Raises:
        CheckpointError: a tensor lacks, has other bytes than the layout, or lies out of the arena.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    return tuple(
        tuple(_group_copies(group, by_name, arena_bytes, boundaries)) for group in layout.groups
    )


def _group_copies(
    group: Sequence[Placement],
    by_name: Mapping[str, TensorSlice],
    arena_bytes: int,
    boundaries: Sequence[int],
) -> Iterator[Copy]:
    wanted = [_copy(place, by_name.get(place.name), arena_bytes) for place in group]
    for run in _merged(sorted((copy for copy in wanted if copy.num_bytes), key=_by_source)):
        for whole_copy in _uncrossed(run, boundaries):
            yield from _bounded(whole_copy)


def _copy(place: Placement, tensor: TensorSlice | None, arena_bytes: int) -> Copy:
    part = place.part
    if tensor is None:
        raise CheckpointError(f"the checkpoint lacks tensor {place.name}, which the device holds")
    if tensor.offset < 0 or tensor.offset + tensor.num_bytes > arena_bytes:
        raise CheckpointError(
            f"tensor {tensor.name} does not lie at bytes {tensor.offset} to "
            f"{tensor.offset + tensor.num_bytes} of the arena"
        )
    copy = Copy(
        tensor.offset + part.offset,
        place.arrives_at,
        part.row_bytes,
        part.num_rows,
        part.pitch_bytes,
    )
    if tensor.dtype != place.stored or copy.source_end > tensor.offset + tensor.num_bytes:
        raise CheckpointError(f"tensor {tensor.name} is another one than the device holds")
    return copy


def _by_source(copy: Copy) -> int:
    return copy.source


def _merged(copies: Iterable[Copy]) -> Iterator[Copy]:
    """Joins contiguous copies that follow each other at both ends."""
    last: Copy | None = None
    for copy in copies:
        if (
            last is not None
            and last.num_rows == copy.num_rows == 1
            and last.source + last.row_bytes == copy.source
            and last.target + last.row_bytes == copy.target
        ):
            last = dataclasses.replace(last, row_bytes=last.row_bytes + copy.row_bytes)
            continue
        if last is not None:
            yield last
        last = copy
    if last is not None:
        yield last


def _uncrossed(copy: Copy, boundaries: Sequence[int]) -> Iterator[Copy]:
    """The same bytes in copies that cross no boundary."""
    index = bisect.bisect_right(boundaries, copy.source)
    if index == len(boundaries) or boundaries[index] >= copy.source_end:
        yield copy
        return
    boundary = boundaries[index]
    if copy.num_rows == 1:
        head = boundary - copy.source
        yield Copy(copy.source, copy.target, head)
        rest = Copy(boundary, copy.target + head, copy.row_bytes - head)
        yield from _uncrossed(rest, boundaries)
        return
    # Rows that end at or before the boundary, the one across it (if any), and those after it.
    before = max(0, (boundary - copy.source - copy.row_bytes) // copy.pitch_bytes + 1)
    if before:
        yield _rows(copy, 0, before)
    if before < copy.num_rows:
        yield from _uncrossed(_rows(copy, before, before + 1), boundaries)
    if before + 1 < copy.num_rows:
        yield from _uncrossed(_rows(copy, before + 1, copy.num_rows), boundaries)


def _rows(copy: Copy, begin: int, end: int) -> Copy:
    is_one = end - begin == 1
    return Copy(
        copy.source + begin * copy.pitch_bytes,
        copy.target + begin * copy.row_bytes,
        copy.row_bytes,
        end - begin,
        0 if is_one else copy.pitch_bytes,
    )


def _bounded(copy: Copy) -> Iterator[Copy]:
    """Pieces of at most COPY_BYTES; strided copies are cut between rows, a longer row is kept."""
    if copy.num_bytes <= COPY_BYTES:
        yield copy
    elif copy.num_rows == 1:
        num_pieces = -(-copy.num_bytes // COPY_BYTES)
        size = _aligned(-(-copy.row_bytes // num_pieces), 4096)
        for begin in range(0, copy.row_bytes, size):
            yield Copy(copy.source + begin, copy.target + begin, min(size, copy.row_bytes - begin))
    else:
        num_rows = max(1, COPY_BYTES // copy.row_bytes)
        for begin in range(0, copy.num_rows, num_rows):
            yield _rows(copy, begin, min(begin + num_rows, copy.num_rows))


def _aligned(value: int, alignment: int) -> int:
    return -(-value // alignment) * alignment
