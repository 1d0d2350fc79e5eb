"""Matrices of the adapters that decode just now, gathered once for many steps.

While a batch decodes, the same adapters come in every step. Their rows of A are then copied out of
the paged memory into one table for each group of layers, in float32, whatever the model computes
in: a product of a few rows costs processors less in float32 than it does in bfloat16, and gathering
every step costs as much as the product itself. Of a single adapter B is copied as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch

from flashserve.engine.lora.memory import AdapterMemory, Placed
from flashserve.engine.lora.targets import Group

_MOST_PADDING = 2
"""Ranks that differ by more leave a table too empty."""


@dataclasses.dataclass(frozen=True, slots=True)
class RowsOfA:
    """Of one adapter in one group of layers: first pages of its rows, and what scales them."""

    starts: torch.Tensor
    scales: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Table:
    """Of one group.

    a: [layers, adapters, rows, in_features], float32, scaled; adapters of lower rank than others
        are padded with what nobody takes.
    b: of a single adapter, [layers, rows, out_features of all layers of the group], float32: its
        matrices B, transposed, as blocks of a diagonal.
    """

    a: torch.Tensor
    b: torch.Tensor | None = None

    @property
    def num_rows(self) -> int:
        """Of each adapter."""
        return int(self.a.shape[2])

    @property
    def num_bytes(self) -> int:
        return int(self.a.nbytes + (0 if self.b is None else self.b.nbytes))


class Tables:
    """The tables of one set of adapters at a time.

    Args:
        max_bytes: what they may take together.
    """

    def __init__(self, memory: AdapterMemory, groups: Sequence[Group], max_bytes: int) -> None:
        self._memory = memory
        self._groups = groups
        self._max_bytes = max_bytes
        self._adapters: list[Placed] = []
        self._tables: list[Table | None] = []

    def are_of(self, adapters: Sequence[Placed]) -> bool:
        """Whether they were last built for these adapters, in this order."""
        return bool(adapters) and self._adapters == list(adapters)

    @property
    def num_bytes(self) -> int:
        return sum(table.num_bytes for table in self._tables if table is not None)

    def release(self) -> None:
        self._adapters, self._tables = [], []

    def build(self, adapters: Sequence[Placed], rows: Sequence[Sequence[RowsOfA]]) -> None:
        """Replaces the tables, if those of these adapters are not too large.

        Nobody may compute from the tables before: their memory is used again.

        Args:
            rows: by group, and by adapter.
        """
        before = self._tables or [None] * len(self._groups)
        self._adapters, self._tables = list(adapters), []
        sizes = [self._sizes(group, own) for group, own in zip(self._groups, rows, strict=True)]
        a_bytes, b_bytes = (sum(column) for column in zip(*sizes, strict=True))
        if a_bytes > self._max_bytes:
            return
        has_b = len(adapters) == 1 and a_bytes + b_bytes <= self._max_bytes
        for index, (group, own) in enumerate(zip(self._groups, rows, strict=True)):
            old, before[index] = before[index], None
            if not _is_even(own):
                self._tables.append(None)
                continue
            a = self._a(group, own, old.a if old else None)
            self._tables.append(
                Table(a, self._b(group, adapters[0], len(a[0, 0])) if has_b else None)
            )

    def of(self, group: int) -> Table | None:
        """None where no adapter changes the group, or they differ too much."""
        return self._tables[group] if self._tables else None

    def _sizes(self, group: Group, own: Sequence[RowsOfA]) -> tuple[int, int]:
        """Bytes of a and b of a group."""
        if not _is_even(own):
            return 0, 0
        row_bytes = 4 * len(self._memory.layers) * _most(own)
        width = sum(target.out_features for target in group)
        return row_bytes * len(own) * group[0].in_features, row_bytes * width

    def _a(self, group: Group, own: Sequence[RowsOfA], old: torch.Tensor | None) -> torch.Tensor:
        size, most = group[0].in_features, _most(own)
        shape = (len(self._memory.layers), len(own), most, size)
        values = old if old is not None and old.shape == shape else self._zeros(shape)
        starts = torch.cat([padded(item.starts, most) for item in own])
        scales = torch.cat([padded(item.scales, most) for item in own])
        for layer, room in enumerate(values.flatten(1, 2)):
            room.copy_(self._memory.rows(layer, size).index_select(0, starts)).mul_(scales[:, None])
        return values

    def _b(self, group: Group, adapter: Placed, num_rows: int) -> torch.Tensor:
        width = sum(target.out_features for target in group)
        values = self._zeros((len(self._memory.layers), num_rows, width))
        row = column = 0
        for target in group:
            size = target.out_features
            if (found := adapter.targets.get(target)) is not None:
                starts = torch.tensor(found.b.starts, device=values.device)
                blocks = values[:, row : row + found.rank, column : column + size]
                for layer, room in enumerate(blocks):
                    room.copy_(self._memory.rows(layer, size).index_select(0, starts))
                row += found.rank
            column += size
        return values

    def _zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        return torch.zeros(shape, dtype=torch.float32, device=self._memory.pool.device)


def _most(own: Sequence[RowsOfA]) -> int:
    return max(len(item.starts) for item in own)


def _is_even(own: Sequence[RowsOfA]) -> bool:
    total = sum(len(item.starts) for item in own)
    return 0 < len(own) * _most(own) <= _MOST_PADDING * total


def padded(values: torch.Tensor, count: int) -> torch.Tensor:
    """Further rows, whose products nobody takes, are those of page 0."""
    return torch.nn.functional.pad(values, (0, count - len(values)))
