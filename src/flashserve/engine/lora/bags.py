"""Makes the updates of adapters with few rows each, from what each contributes to them."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections.abc import Sequence

import torch

from flashserve.engine.lora.kernels import Bags, Gathered, Pair, Products, Tabled, Update
from flashserve.engine.lora.memory import AdapterMemory, Placed
from flashserve.engine.lora.segments import Span
from flashserve.engine.lora.tables import RowsOfA, Table, Tables, padded
from flashserve.engine.lora.targets import Group

# So many rows for each adapter, or fewer, are multiplied one by one in float32: products of all
# rows with all adapters would waste more arithmetic than they save in calls.
_FEW_ROWS_EACH = 2
# A table multiplies as many rows for each adapter as the one with the most has.
_MOST_ROWS = 4


@dataclasses.dataclass(frozen=True, slots=True)
class _OwnRows:
    """What one adapter contributes to the Bags of a group; see there."""

    a: RowsOfA
    columns: torch.Tensor
    scales: torch.Tensor
    pages: torch.Tensor
    lengths: torch.Tensor


class BagMaker:
    """Args: table_bytes: what tables may take, beside the memory itself."""

    def __init__(self, memory: AdapterMemory, groups: Sequence[Group], table_bytes: int) -> None:
        self._memory = memory
        self._groups = groups
        self._own: weakref.WeakKeyDictionary[Placed, list[_OwnRows]] = weakref.WeakKeyDictionary()
        self.tables = Tables(memory, groups, table_bytes)

    def build_tables(self, spans: Sequence[Span]) -> None:
        """For steps to come that have the adapters of these spans."""
        own = [self._own_rows(span.placed) for span in spans]
        rows = [[item[index].a for item in own] for index in range(len(self._groups))]
        self.tables.build([span.placed for span in spans], rows)

    def make(self, group: int, spans: Sequence[Span], *, use_tables: bool) -> Update | None:
        """Of spans that are neighbours; None if none of their adapters changes the group.

        Args:
            use_tables: they are those of these spans' adapters.
        """
        own = [self._own_rows(span.placed)[group] for span in spans]
        if not any(len(item.a.starts) for item in own):
            return None
        begin, end = spans[0].begin, spans[-1].end
        counts = [span.end - span.begin for span in spans]
        table = self.tables.of(group) if use_tables else None
        if table is not None and table.b is not None:
            return Pair(begin, end, table.a[:, 0], table.b)
        products: Products
        if table is not None and len(spans) * max(counts) <= _MOST_ROWS * (end - begin):
            products, firsts = _tabled(table, counts)
        else:
            products, firsts = self._gathered(group, own, counts)
        take = [
            item.columns + first
            for item, of_span in zip(own, firsts, strict=True)
            for first in of_span
        ]
        scales = None if isinstance(products, Tabled) else self._repeat(own, counts, "scales")
        lengths = self._repeat(own, counts, "lengths")
        zero = torch.zeros(1, dtype=torch.int64, device=lengths.device)
        size = self._memory.page_elements
        return Bags(
            memory=self._memory,
            begin=begin,
            end=end,
            products=products,
            take=torch.cat(take),
            scales=scales,
            pages=self._repeat(own, counts, "pages"),
            offsets=torch.cat((zero, lengths.cumsum(0))),
            is_joined=all(target.out_features % size == 0 for target in self._groups[group]),
        )

    def _gathered(
        self, group: int, own: Sequence[_OwnRows], counts: Sequence[int]
    ) -> tuple[Products, list[list[int]]]:
        """Also, for each row of each span, where its adapter's first product will be."""
        num_rows = sum(counts)
        ends = list(itertools.accumulate(counts))
        by_row = self._multiplies_by_row(num_rows, len(own))
        if by_row:
            num_columns = max(len(item.a.starts) for item in own)
            columns = [0] * len(own)
            starts = torch.cat(
                [
                    padded(item.a.starts, num_columns).expand(count, -1)
                    for item, count in zip(own, counts, strict=True)
                ]
            )
        else:
            sizes = [len(item.a.starts) for item in own]
            num_columns = sum(sizes)
            columns = [0, *itertools.accumulate(sizes)][:-1]
            starts = torch.cat([item.a.starts for item in own])
        firsts = [
            [row * num_columns + column for row in range(end - count, end)]
            for column, end, count in zip(columns, ends, counts, strict=True)
        ]
        in_features = self._groups[group][0].in_features
        return Gathered(self._memory, in_features, starts, by_row), firsts

    def _multiplies_by_row(self, num_rows: int, num_adapters: int) -> bool:
        is_wide = self._memory.pool.dtype == torch.float32
        return is_wide and num_adapters > 1 and num_rows <= _FEW_ROWS_EACH * num_adapters

    def _own_rows(self, placed: Placed) -> list[_OwnRows]:
        if placed not in self._own:
            self._own[placed] = [self._own_group(placed, group) for group in self._groups]
        return self._own[placed]

    def _own_group(self, placed: Placed, group: Group) -> _OwnRows:
        starts: list[int] = []
        a_scales: list[float] = []
        columns: list[int] = []
        scales: list[float] = []
        pages: list[int] = []
        lengths: list[int] = []
        for target in group:
            num_chunks = -(-target.out_features // self._memory.page_elements)
            found = placed.targets.get(target)
            if found is None:
                lengths += [0] * num_chunks
                continue
            for chunk in range(num_chunks):
                pages += [start + chunk for start in found.b.starts]
                columns += range(len(starts), len(starts) + found.rank)
            scales += [found.scaling] * (num_chunks * found.rank)
            a_scales += [found.scaling] * found.rank
            lengths += [found.rank] * num_chunks
            starts += found.a.starts
        device, dtype = self._memory.pool.device, self._memory.pool.dtype
        return _OwnRows(
            a=RowsOfA(
                torch.tensor(starts, dtype=torch.int64, device=device),
                torch.tensor(a_scales, dtype=torch.float32, device=device),
            ),
            columns=torch.tensor(columns, dtype=torch.int64, device=device),
            scales=torch.tensor(scales, dtype=dtype, device=device),
            pages=torch.tensor(pages, dtype=torch.int64, device=device),
            lengths=torch.tensor(lengths, dtype=torch.int64, device=device),
        )

    def _repeat(self, own: Sequence[_OwnRows], counts: Sequence[int], name: str) -> torch.Tensor:
        return torch.cat(
            [getattr(item, name).repeat(count) for item, count in zip(own, counts, strict=True)]
        )


def _tabled(table: Table, counts: Sequence[int]) -> tuple[Tabled, list[list[int]]]:
    """As `_gathered`."""
    each, device = max(counts), table.a.device
    order = None
    if len(set(counts)) > 1:
        begins = [0, *itertools.accumulate(counts)][:-1]
        rows = [
            begin + min(row, count - 1)
            for begin, count in zip(begins, counts, strict=True)
            for row in range(each)
        ]
        order = torch.tensor(rows, dtype=torch.int64, device=device)
    firsts = [
        [(index * each + row) * table.num_rows for row in range(count)]
        for index, count in enumerate(counts)
    ]
    return Tabled(table, each, order), firsts
