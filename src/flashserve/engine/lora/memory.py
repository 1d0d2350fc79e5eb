"""The adapters' memory on a device, and where an adapter's matrices lie in it.

One tensor, [layers, pages, page_elements]; whatever an adapter has in one layer, it has at the same
place in every layer, and a layer that it leaves alone holds zeros there. In a layer lie

  B, transposed, of each linear layer: one row for each rank, in neighbouring pages;
  A, transposed, of all linear layers of a group side by side: a row for each feature of their
  input, as wide as their ranks together, padded to an equal part of a page or to whole pages.

A row of a module outside the decoder layers, as long as the vocabulary perhaps, goes through its
pages of all layers in turn.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch

from flashserve.engine.lora.pages import PagePool, Rows
from flashserve.engine.lora.targets import Group, Target, Targets
from flashserve.errors import UnavailableError
from flashserve.messages.work import AdapterImage, LoraLayer
from flashserve.types import TensorSlice

Reader: TypeAlias = Callable[[TensorSlice], torch.Tensor]
"""The tensor that lies in a slice of the arena; see store.device.bind.reader."""

_serials = itertools.count()


@dataclasses.dataclass(frozen=True, slots=True)
class PlacedLinear:
    """What one linear layer's update needs beside its group's A: out += scaling * y[columns] B^T.

    b: rows of B transposed, as many as the rank.
    """

    columns: slice
    b: Rows
    scaling: float

    @property
    def rank(self) -> int:
        return len(self.b.starts)


@dataclasses.dataclass(frozen=True, eq=False)
class PlacedGroup:
    """A, transposed, of a group's linear layers: [in_features, width].

    unit, units: a row is padded to so many equal parts of a page, of so many elements.
    chunks: a page with the next rows, or the pages of one row.
    linears: by their place in the group; those that the adapter leaves alone are not there.
    offsets: [in_features] where each row begins in a layer, in elements.
    """

    width: int
    unit: int
    units: int
    chunks: Rows
    linears: Mapping[int, PlacedLinear]
    offsets: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class PlacedOutside:
    """Rows of A, and of B transposed, of a module outside the decoder layers."""

    a: Rows
    b: Rows
    scaling: float


@dataclasses.dataclass(frozen=True, eq=False)
class Placed:
    """An adapter in memory. `serial` is of this placement: one that is loaded again has another.

    groups: by their number; outside: by target.
    """

    groups: Mapping[int, PlacedGroup]
    outside: Mapping[Target, PlacedOutside]
    serial: int = dataclasses.field(default_factory=lambda: next(_serials))

    @functools.cached_property
    def rows(self) -> list[Rows]:
        found = [rows for item in self.outside.values() for rows in (item.a, item.b)]
        for group in self.groups.values():
            found += [group.chunks, *(linear.b for linear in group.linears.values())]
        return found

    @functools.cached_property
    def num_pages(self) -> int:
        return sum(rows.num_pages for rows in self.rows)


@dataclasses.dataclass(slots=True)
class _Shape:
    """The largest rank of a target over the layers, and its scaling in the first of them."""

    rank: int
    scaling: float


class AdapterMemory:
    """Room for adapters of one model.

    Args:
        groups: the linear layers of a decoder layer by their input, as the forward computes them.
        num_bytes: taken now; what does not fill a page is left.
        dtype: the model's; adapters are converted.
        read: gives the tensors of images.

    Raises:
        UnavailableError: the device does not have that much.
    """

    def __init__(
        self,
        targets: Targets,
        groups: Sequence[Group],
        num_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        read: Reader,
    ) -> None:
        self.groups = groups
        self._targets = targets
        self._read = read
        self.page_bytes = targets.num_layers * targets.page_elements * int(dtype.itemsize)
        shape = (targets.num_layers, num_bytes // self.page_bytes, targets.page_elements)
        try:
            self.pool = torch.empty(shape, dtype=dtype, device=device)
        except RuntimeError as error:
            raise UnavailableError(
                f"no memory on {device} for adapters of {num_bytes} bytes; lower "
                "engine.adapter_bytes"
            ) from error
        self.layers: list[torch.Tensor] = list(self.pool.unbind())
        self.pages = PagePool(shape[1])
        self._rows: dict[int, list[torch.Tensor]] = {}

    @property
    def page_elements(self) -> int:
        return self._targets.page_elements

    def num_pages(self, image: AdapterImage) -> int:
        """Pages that the adapter takes."""
        return sum(count * width for count, width in self._wanted(self._shapes(image)))

    def place(self, image: AdapterImage) -> Placed | None:
        """Finds room for an adapter that `Targets.check` has passed; None if there is none now."""
        shapes = self._shapes(image)
        found = self.pages.allocate(self._wanted(shapes))
        if found is None:
            return None
        rows = iter(found)
        outside = {
            target: PlacedOutside(next(rows), next(rows), shape.scaling)
            for target, shape in shapes.items()
            if target.is_outside
        }
        groups = {
            index: self._place_group(group, shapes, rows)
            for index, group in enumerate(self.groups)
            if any(target in shapes for target in group)
        }
        return Placed(groups, outside)

    def fill(self, placed: Placed, image: AdapterImage) -> None:
        """Copies the adapter's bytes from the arena."""
        pages = torch.cat([self._page_index(rows) for rows in placed.rows])
        self.pool.index_fill_(1, pages, 0)
        for layer in image.layers:
            self._fill_layer(placed, layer)

    def release(self, placed: Placed) -> None:
        self.pages.release(placed.rows)

    def rows(self, layer: int, num_elements: int) -> torch.Tensor:
        """One layer's memory as overlapping rows, [elements, num_elements]: one from each element.

        The row of an offset is the one that begins there.
        """
        if num_elements not in self._rows:
            count = max(0, self.layers[0].numel() - num_elements + 1)
            self._rows[num_elements] = [
                table.as_strided((count, num_elements), (1, 1)) for table in self.layers
            ]
        return self._rows[num_elements][layer]

    def units(self, layer: int, unit: int) -> torch.Tensor:
        """One layer's memory as rows of `unit` elements, which whole pages are multiples of."""
        return self.layers[layer].view(-1, unit)

    def offsets(self, rows: Rows) -> torch.Tensor:
        """Where each of the rows begins in a layer, in elements."""
        return torch.tensor(rows.starts, device=self.pool.device) * self.page_elements

    def spread(self, rows: Rows, num_elements: int) -> torch.Tensor:
        """Rows of a module outside the decoder layers, [rank, num_elements], copied together."""
        found = self.pool.index_select(1, self._page_index(rows))
        found = found.view(len(self.layers), len(rows.starts), -1)
        return found.transpose(0, 1).flatten(1)[:, :num_elements]

    def _page_index(self, rows: Rows) -> torch.Tensor:
        pages = [page for start in rows.starts for page in range(start, start + rows.width)]
        return torch.tensor(pages, dtype=torch.int64, device=self.pool.device)

    def _wanted(self, shapes: Mapping[Target, _Shape]) -> list[tuple[int, int]]:
        """Rows for `PagePool.allocate`, in the order in which `place` takes them."""
        wanted: list[tuple[int, int]] = []
        for target, shape in shapes.items():
            if target.is_outside:
                sizes = (target.in_features, target.out_features)
                wanted += [(shape.rank, self._targets.pages(target, size)) for size in sizes]
        for group in self.groups:
            members = [target for target in group if target in shapes]
            if members:
                width = sum(shapes[target].rank for target in members)
                wanted.append(self._chunks(group[0].in_features, width))
            for target in members:
                num_pages = self._targets.pages(target, target.out_features)
                wanted.append((shapes[target].rank, num_pages))
        return wanted

    def _chunks(self, num_rows: int, width: int) -> tuple[int, int]:
        """How many chunks, of how many pages, hold so many rows of `width` elements."""
        unit, units = self._units(width)
        rows_per_page = self.page_elements // unit
        return (-(-num_rows // rows_per_page), 1) if units == 1 else (num_rows, units)

    def _units(self, width: int) -> tuple[int, int]:
        """Elements and number of the units that a row is padded to: equal parts of a page."""
        size = self.page_elements
        if width > size:
            return size, -(-width // size)
        return next(unit for unit in range(width, size + 1) if size % unit == 0), 1

    def _place_group(
        self, group: Group, shapes: Mapping[Target, _Shape], rows: Iterator[Rows]
    ) -> PlacedGroup:
        chunks = next(rows)
        linears: dict[int, PlacedLinear] = {}
        width = 0
        for index, target in enumerate(group):
            if (shape := shapes.get(target)) is not None:
                columns = slice(width, width + shape.rank)
                linears[index] = PlacedLinear(columns, next(rows), shape.scaling)
                width += shape.rank
        unit, units = self._units(width)
        rows_per_chunk = self.page_elements // unit if units == 1 else 1
        within = torch.arange(rows_per_chunk, device=self.pool.device) * unit
        offsets = (self.offsets(chunks)[:, None] + within).flatten()
        offsets = offsets[: group[0].in_features]
        return PlacedGroup(width, unit, units, chunks, linears, offsets)

    def _shapes(self, image: AdapterImage) -> dict[Target, _Shape]:
        shapes: dict[Target, _Shape] = {}
        for layer in image.layers:
            _, target = self._place(layer)
            shape = shapes.setdefault(target, _Shape(0, 0.0))
            shape.rank = max(shape.rank, layer.a.shape[0])
            shape.scaling = shape.scaling or self._kept_scaling(layer.scaling)
        return shapes

    def _kept_scaling(self, scaling: float) -> float:
        """1 where B can be multiplied ahead without being rounded, but for float32's last bit."""
        is_exact = abs(math.frexp(scaling)[0]) == 0.5
        return 1.0 if is_exact or self.pool.dtype == torch.float32 else scaling

    def _place(self, layer: LoraLayer) -> tuple[int, Target]:
        place = self._targets.place(layer.module)
        assert place is not None
        return place

    def _fill_layer(self, placed: Placed, layer: LoraLayer) -> None:
        index, target = self._place(layer)
        a, b = self._read(layer.a), self._read(layer.b).t()
        if target.is_outside:
            outside = placed.outside[target]
            self._write_spread(a, outside.a)
            self._write_spread(_scaled(b, layer.scaling, outside.scaling), outside.b)
            return
        number, place = next(
            (number, group.index(target))
            for number, group in enumerate(self.groups)
            if target in group
        )
        found = placed.groups[number]
        linear = found.linears[place]
        begin = linear.columns.start
        columns = torch.arange(begin, begin + len(a), device=self.pool.device)
        self._write(index, a.t(), found.offsets[:, None] + columns)
        places = self.offsets(linear.b)[: len(a), None]
        across = torch.arange(target.out_features, device=self.pool.device)
        self._write(index, _scaled(b, layer.scaling, linear.scaling), places + across)

    def _write(self, layer: int, values: torch.Tensor, places: torch.Tensor) -> None:
        """Args: values, places: of one shape; places are of elements in a layer."""
        wanted = values.to(self.pool.device, self.pool.dtype).reshape(-1)
        self.layers[layer].view(-1).index_copy_(0, places.reshape(-1), wanted)

    def _write_spread(self, values: torch.Tensor, rows: Rows) -> None:
        piece = rows.width * self.page_elements
        for start, row in zip(rows.starts, values, strict=False):
            for table, part in zip(self.layers, row.split(piece), strict=False):
                table[start : start + rows.width].view(-1)[: len(part)].copy_(part)


def _scaled(b: torch.Tensor, wanted: float, kept: float) -> torch.Tensor:
    """B times what `kept`, which is multiplied later, lacks of the wanted scaling."""
    return b if wanted == kept else b.float() * (wanted / kept)
