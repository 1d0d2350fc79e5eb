"""The adapters' memory on a device, and where an adapter's rows lie in it.

One tensor, [layers, pages, page_elements]. A row (of A, or of B transposed) has the same pages in
every layer; a layer that an adapter leaves alone holds zeros there. A row of a module outside the
decoder layers, as long as the vocabulary perhaps, goes through its pages of all layers in turn.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias

import torch
from torch import nn

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
        """Copies the adapter's bytes from the arena, those of a target's layers together.

        Every page of the adapter is written: what it has no values for becomes zero.
        """
        by_target: dict[Target, dict[int, LoraLayer]] = {}
        for layer in image.layers:
            index, target = self._place(layer)
            by_target.setdefault(target, {})[index] = layer
        for target, layers in by_target.items():
            found = placed.targets[target]
            a = self._stack(target, {index: self._read(item.a) for index, item in layers.items()})
            b = self._stack(
                target, {index: self._read(item.b).t() for index, item in layers.items()}
            )
            ratios = {index: item.scaling / found.scaling for index, item in layers.items()}
            if set(ratios.values()) != {1.0}:  # a pattern gives some another than the first
                factors = [ratios.get(index, 1.0) for index in range(len(b))]
                b = b.float() * torch.tensor(factors, device=b.device)[:, None, None]
            self._write(target, a, found.a)
            self._write(target, b, found.b)

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

    def _stack(self, target: Target, tensors: Mapping[int, torch.Tensor]) -> torch.Tensor:
        """[rank, elements] by layer -> [layers, rank, elements] on the device, 1 layer if outside.

        A layer that lacks one, or has a lower rank than another, has zeros there.
        """
        num_layers = 1 if target.is_outside else len(self.layers)
        ranks = {len(tensor) for tensor in tensors.values()}
        if len(tensors) == num_layers and len(ranks) == 1:
            ordered = [tensors[index] for index in sorted(tensors)]
            if not ordered[0].is_contiguous():  # stacked as they lie, B is read in one go
                turned = torch.stack([tensor.t() for tensor in ordered])
                return turned.to(self.pool.device).transpose(1, 2)
            return torch.stack(ordered).to(self.pool.device)
        num_elements = next(iter(tensors.values())).shape[1]
        shape = (num_layers, max(ranks), num_elements)
        stacked = torch.zeros(shape, device=self.pool.device)
        for index, tensor in tensors.items():
            stacked[index, : len(tensor)].copy_(tensor)
        return stacked

    def _write(self, target: Target, values: torch.Tensor, rows: Rows) -> None:
        """values: of `_stack`; the end of a row's last page becomes zero."""
        width = rows.width * self.page_elements
        if target.is_outside:
            padding = len(self.layers) * width - values.shape[2]
            padded = nn.functional.pad(values[0], (0, padding))
            values = padded.unflatten(1, (-1, width)).transpose(0, 1)
        num_elements = values.shape[2]
        for begin, end in _runs(rows):
            first = rows.starts[begin]
            pages = self.pool[:, first : first + (end - begin) * rows.width]
            room = pages.view(len(self.layers), end - begin, width)
            room[:, :, :num_elements].copy_(values[:, begin:end])
            room[:, :, num_elements:].zero_()


def _runs(rows: Rows) -> Iterator[tuple[int, int]]:
    """Which rows [begin, end) lie one behind the other."""
    begin = 0
    for index, (before, after) in enumerate(itertools.pairwise(rows.starts), start=1):
        if after != before + rows.width:
            yield begin, index
            begin = index
    yield begin, len(rows.starts)
