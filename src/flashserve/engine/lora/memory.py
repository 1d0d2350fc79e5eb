"""The adapters' memory on a device, and where an adapter's rows lie in it.

One tensor, [layers, pages, page_elements]. A row (of A, or of B transposed) has the same pages in
every layer; a layer that an adapter leaves alone holds zeros there. A row of a module outside the
decoder layers, as long as the vocabulary perhaps, goes through its pages of all layers in turn.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch

from flashserve.engine.lora.pages import PagePool, Rows
from flashserve.engine.lora.targets import Target, Targets
from flashserve.errors import UnavailableError
from flashserve.messages.work import AdapterImage, LoraLayer
from flashserve.types import TensorSlice

Reader: TypeAlias = Callable[[TensorSlice], torch.Tensor]
"""The tensor that lies in a slice of the arena; see store.device.bind.reader."""

_serials = itertools.count()


@dataclasses.dataclass(frozen=True, slots=True)
class PlacedTarget:
    """Rows of A and of B transposed, as many as the rank: out += scaling * (x A^T) B^T."""

    target: Target
    a: Rows
    b: Rows
    scaling: float

    @property
    def rank(self) -> int:
        return len(self.a.starts)


@dataclasses.dataclass(frozen=True, eq=False)
class Placed:
    """An adapter in memory. `serial` is of this placement: one that is loaded again has another."""

    targets: Mapping[Target, PlacedTarget]
    serial: int = dataclasses.field(default_factory=lambda: next(_serials))

    def rows(self) -> list[Rows]:
        return [rows for item in self.targets.values() for rows in (item.a, item.b)]

    @functools.cached_property
    def num_pages(self) -> int:
        return sum(rows.num_pages for rows in self.rows())


class AdapterMemory:
    """Room for adapters of one model.

    Args:
        num_bytes: taken now; what does not fill a page is left.
        dtype: the model's; adapters are converted.
        read: gives the tensors of images.

    Raises:
        UnavailableError: the device does not have that much.
    """

    def __init__(
        self,
        targets: Targets,
        num_bytes: int,
        dtype: torch.dtype,
        device: torch.device,
        read: Reader,
    ) -> None:
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
        return sum(
            rank * sum(self._widths(target)) for target, (rank, _) in self._shapes(image).items()
        )

    def place(self, image: AdapterImage) -> Placed | None:
        """Finds room for an adapter that `Targets.check` has passed; None if there is none now."""
        shapes = self._shapes(image)
        wanted = [
            (rank, width) for target, (rank, _) in shapes.items() for width in self._widths(target)
        ]
        found = self.pages.allocate(wanted)
        if found is None:
            return None
        pairs = zip(found[::2], found[1::2], strict=True)
        return Placed(
            {
                target: PlacedTarget(target, a, b, scaling)
                for (target, (_, scaling)), (a, b) in zip(shapes.items(), pairs, strict=True)
            }
        )

    def fill(self, placed: Placed, image: AdapterImage) -> None:
        """Copies the adapter's bytes from the arena."""
        index = [
            torch.tensor(
                [page for start in rows.starts for page in range(start, start + rows.width)],
                device=self.pool.device,
            )
            for rows in placed.rows()
        ]
        self.pool.index_fill_(1, torch.cat(index), 0)
        for layer in image.layers:
            self._fill_layer(placed, layer)

    def release(self, placed: Placed) -> None:
        self.pages.release(placed.rows())

    def rows(self, layer: int, num_elements: int) -> torch.Tensor:
        """One layer's memory as rows of `num_elements`, one from the start of each page.

        [pages, num_elements]; the rows overlap. Pages so near the end that no row of this length
        starts there are left out.
        """
        if num_elements not in self._rows:
            pages, size = self.pages.num_pages, self.page_elements
            count = max(0, pages - -(-num_elements // size) + 1)
            self._rows[num_elements] = [
                table.as_strided((count, num_elements), (size, 1)) for table in self.layers
            ]
        return self._rows[num_elements][layer]

    def spread(self, rows: Rows, num_elements: int) -> torch.Tensor:
        """Rows of a module outside the decoder layers, [rank, num_elements], copied together."""
        pages = [page for start in rows.starts for page in range(start, start + rows.width)]
        index = torch.tensor(pages, device=self.pool.device)
        found = self.pool.index_select(1, index).view(len(self.layers), len(rows.starts), -1)
        return found.transpose(0, 1).flatten(1)[:, :num_elements]

    def _widths(self, target: Target) -> tuple[int, int]:
        sizes = (target.in_features, target.out_features)
        return self._targets.width(target, sizes[0]), self._targets.width(target, sizes[1])

    def _shapes(self, image: AdapterImage) -> dict[Target, tuple[int, float]]:
        """The largest rank of each target over the layers, and the scaling in the first of them."""
        shapes: dict[Target, tuple[int, float]] = {}
        for layer in image.layers:
            _, target = self._place(layer)
            rank, scaling = shapes.get(target, (0, layer.scaling))
            shapes[target] = (max(rank, layer.a.shape[0]), scaling or layer.scaling)
        return shapes

    def _place(self, layer: LoraLayer) -> tuple[int, Target]:
        place = self._targets.place(layer.module)
        assert place is not None
        return place

    def _fill_layer(self, placed: Placed, layer: LoraLayer) -> None:
        index, target = self._place(layer)
        found = placed.targets[target]
        a, b = self._read(layer.a), self._read(layer.b).t()
        if layer.scaling != found.scaling:  # a pattern gives this layer another than the first
            b = b.float() * (layer.scaling / found.scaling)
        for values, rows in ((a, found.a), (b, found.b)):
            if target.is_outside:
                self._write_spread(values, rows)
            else:
                self._write(index, values, rows)

    def _write(self, layer: int, values: torch.Tensor, rows: Rows) -> None:
        """values: [rank, elements], at most as many rows as were placed."""
        count = len(values)
        table = self.rows(layer, values.shape[1])
        first = rows.starts[0]
        size = self.page_elements
        if rows.starts[:count] == tuple(range(first, first + count * rows.width, rows.width)):
            room = self.layers[layer].as_strided(
                tuple(values.shape),
                (rows.width * size, 1),
                self.layers[layer].storage_offset() + first * size,
            )
            room.copy_(values)
            return
        for start, row in zip(rows.starts, values, strict=False):
            table[start].copy_(row)

    def _write_spread(self, values: torch.Tensor, rows: Rows) -> None:
        piece = rows.width * self.page_elements
        for start, row in zip(rows.starts, values, strict=False):
            for table, part in zip(self.layers, row.split(piece), strict=False):
                table[start : start + rows.width].view(-1)[: len(part)].copy_(part)
