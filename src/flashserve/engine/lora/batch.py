"""Who gets which adapter's update in one step: built once for a composition, used in every layer.

The rows of a step are sorted: those of the base model, then those of adapters with few rows, by
their ranks, then each adapter that has many. While a batch decodes, its composition stays the same
from step to step, and so does all that is built here.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import weakref
from collections.abc import Iterator, Sequence
from typing import TypeAlias

import torch

from flashserve.engine.lora.kernels import Bags, Run, RunPart, Shrink, add_bags, add_run
from flashserve.engine.lora.memory import AdapterMemory, Placed, PlacedGroup
from flashserve.engine.lora.targets import Group, Target

Owned: TypeAlias = tuple[Placed | None, int]
"""An adapter, or the base model alone, and how many rows in a row are its."""

MANY_ROWS = 64
"""From so many rows on, an adapter's are computed by plain products with its own matrices."""
_MAX_KEPT = 4


@dataclasses.dataclass(frozen=True, slots=True)
class _OwnRows:
    """What each row of one adapter contributes to the Bags of a group; see there.

    columns: places among the row's own products.
    """

    unit: int
    units: int
    places: torch.Tensor
    columns: torch.Tensor
    scales: torch.Tensor
    pages: torch.Tensor
    lengths: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class _Span:
    """Rows [begin, end) are of one adapter."""

    placed: Placed
    begin: int
    end: int


class LoraStep:
    """The updates of one step. Every `add` is in place, and does nothing where none is due."""

    def __init__(
        self,
        memory: AdapterMemory,
        bags: Sequence[Bags | None],
        runs: Sequence[Sequence[Run]],
        spans: Sequence[_Span],
        sampled: Sequence[_Span],
        embedding: Target,
        head: Target,
    ) -> None:
        self._memory = memory
        self._bags = bags
        self._runs = runs
        self._spans = spans
        self._sampled = sampled
        self._embedding = embedding
        self._head = head

    def add(self, layer: int, group: int, x: torch.Tensor, *outs: torch.Tensor) -> None:
        """Adds the update of a group of layers, given their input, [T, in_features].

        Args:
            outs: [T, out_features] of each.
        """
        bags = self._bags[group]
        if bags is not None:
            add_bags(self._memory, layer, bags, x, outs)
        for run in self._runs[group]:
            add_run(self._memory, layer, run, x, outs)

    def add_embedding(self, ids: torch.Tensor, hidden: torch.Tensor, scale: float = 1.0) -> None:
        """Args: ids: [T]; hidden: [T, hidden_size], their embeddings, times `scale`."""
        for span in self._spans:
            if (found := span.placed.outside.get(self._embedding)) is not None:
                a = self._memory.spread(found.a, self._embedding.in_features)
                b = self._memory.spread(found.b, self._embedding.out_features)
                rows = a.index_select(1, ids[span.begin : span.end]).t()
                hidden[span.begin : span.end].addmm_(rows, b, alpha=found.scaling * scale)

    def add_head(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """Args: hidden: [R, hidden_size] of the sampled rows; logits: [R, vocabulary]."""
        for span in self._sampled:
            if (found := span.placed.outside.get(self._head)) is not None:
                a = self._memory.spread(found.a, self._head.in_features)
                b = self._memory.spread(found.b, self._head.out_features)
                rows = torch.mm(hidden[span.begin : span.end], a.t())
                logits[span.begin : span.end].addmm_(rows, b, alpha=found.scaling)


class Composer:
    """Makes LoraSteps.

    Args:
        min_rows: above 1, each part of a step is computed by itself, with at least so many rows,
            so that no result depends on what else is there.
    """

    def __init__(
        self,
        memory: AdapterMemory,
        embedding: Target,
        head: Target,
        *,
        min_rows: int = 1,
    ) -> None:
        self._memory = memory
        self._embedding = embedding
        self._head = head
        self._min_rows = min_rows
        self._own: weakref.WeakKeyDictionary[Placed, list[_OwnRows]] = weakref.WeakKeyDictionary()
        self._kept: collections.OrderedDict[object, LoraStep] = collections.OrderedDict()

    def order(self, parts: Sequence[Owned]) -> list[int]:
        """The order in which `compose` wants the parts of a step: a permutation of their indices.

        Parts of one adapter stay in the order that they have.
        """
        totals: collections.Counter[int] = collections.Counter()
        for placed, count in parts:
            totals[_serial(placed)] += count

        def key(index: int) -> tuple[bool, tuple[int, ...], int]:
            placed, _ = parts[index]
            serial = _serial(placed)
            if placed is None:
                return False, (), serial
            widths = tuple(group.width for group in placed.groups.values())
            return self._is_run(totals[serial]), widths, serial

        return sorted(range(len(parts)), key=key)

    def compose(self, parts: Sequence[Owned], sampled: Sequence[Owned]) -> LoraStep | None:
        """The updates of a step; None if no part has an adapter.

        Args:
            parts: in the order that `order` says.
            sampled: the same of the rows whose logits are computed.
        """
        if all(placed is None for placed, _ in parts):
            return None
        key = (_key(parts), _key(sampled))
        if key not in self._kept:
            self._kept[key] = self._build(parts, sampled)
            while len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    def _is_run(self, num_rows: int) -> bool:
        return num_rows >= MANY_ROWS or self._min_rows > 1

    def _build(self, parts: Sequence[Owned], sampled: Sequence[Owned]) -> LoraStep:
        spans = _spans(parts)
        runs = [span for span in spans if self._is_run(span.end - span.begin)]
        few = [span for span in spans if not self._is_run(span.end - span.begin)]
        if self._min_rows > 1:
            runs = _spans(parts, join=False)
        return LoraStep(
            self._memory,
            [self._bags(index, few) for index in range(len(self._memory.groups))],
            [
                [run for span in runs if (run := self._run(group, span)) is not None]
                for group in range(len(self._memory.groups))
            ],
            spans,
            _spans(sampled),
            self._embedding,
            self._head,
        )

    def _bags(self, group: int, spans: Sequence[_Span]) -> Bags | None:
        own = [self._own_rows(span.placed)[group] for span in spans]
        if not any(item.units for item in own):
            return None
        begin, end = spans[0].begin, spans[-1].end
        counts = [span.end - span.begin for span in spans]
        take = []
        first = 0
        for item, count in zip(own, counts, strict=True):
            for _ in range(count):
                take.append(item.columns + first)
                first += item.unit * item.units
        scales = _repeated([item.scales for item in own], counts)
        lengths = _repeated([item.lengths for item in own], counts)
        return Bags(
            begin=begin,
            end=end,
            shrinks=tuple(self._shrinks(own, spans)),
            take=torch.cat(take),
            scales=None if bool((scales == 1).all()) else scales,
            pages=_repeated([item.pages for item in own], counts),
            offsets=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)),
        )

    def _shrinks(self, own: Sequence[_OwnRows], spans: Sequence[_Span]) -> Iterator[Shrink]:
        """One for neighbours of equal width; adapters are sorted so that they are neighbours."""
        pairs = zip(own, spans, strict=True)
        for (unit, units), found in itertools.groupby(
            pairs, key=lambda pair: (pair[0].unit, pair[0].units)
        ):
            if not units:
                continue
            same = list(found)
            begin, end = same[0][1].begin, same[-1][1].end
            places = _repeated(
                [item.places for item, _ in same], [span.end - span.begin for _, span in same]
            )
            step = len(places) // (units * (end - begin))
            offsets = torch.arange(0, len(places) + 1, step, device=places.device)
            yield Shrink(begin, end, unit, units, places, offsets)

    def _run(self, group: int, span: _Span) -> Run | None:
        found = span.placed.groups.get(group)
        if found is None:
            return None
        parts = tuple(
            RunPart(index, item.columns, self._memory.offsets(item.b), item.scaling)
            for index, item in found.linears.items()
        )
        return Run(span.begin, span.end, found.width, found.offsets, parts, self._min_rows)

    def _own_rows(self, placed: Placed) -> list[_OwnRows]:
        if placed not in self._own:
            self._own[placed] = [
                self._own_group(placed.groups.get(index), group)
                for index, group in enumerate(self._memory.groups)
            ]
        return self._own[placed]

    def _own_group(self, found: PlacedGroup | None, group: Group) -> _OwnRows:
        columns: list[int] = []
        scales: list[float] = []
        pages: list[int] = []
        lengths: list[int] = []
        for index, target in enumerate(group):
            num_chunks = -(-target.out_features // self._memory.page_elements)
            linear = found.linears.get(index) if found is not None else None
            if linear is None:
                lengths += [0] * num_chunks
                continue
            for chunk in range(num_chunks):
                pages += [start + chunk for start in linear.b.starts]
                columns += range(linear.columns.start, linear.columns.stop)
            scales += [linear.scaling] * (num_chunks * linear.rank)
            lengths += [linear.rank] * num_chunks
        places = self._tensor([])
        if found is not None:
            first = found.offsets // found.unit
            places = torch.cat([first + index for index in range(found.units)])
        return _OwnRows(
            unit=0 if found is None else found.unit,
            units=0 if found is None else found.units,
            places=places,
            columns=self._tensor(columns),
            scales=torch.tensor(
                scales, dtype=self._memory.pool.dtype, device=self._memory.pool.device
            ),
            pages=self._tensor(pages),
            lengths=self._tensor(lengths),
        )

    def _tensor(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self._memory.pool.device)


def _serial(placed: Placed | None) -> int:
    return -1 if placed is None else placed.serial


def _key(parts: Sequence[Owned]) -> tuple[tuple[int, int], ...]:
    return tuple((_serial(placed), count) for placed, count in parts)


def _spans(parts: Sequence[Owned], *, join: bool = True) -> list[_Span]:
    """Rows of each adapter; its parts are neighbours, and are one span if they are to be joined."""
    spans: list[_Span] = []
    row = 0
    for placed, count in parts:
        if placed is not None:
            if join and spans and spans[-1].placed is placed:
                spans[-1] = dataclasses.replace(spans[-1], end=row + count)
            else:
                spans.append(_Span(placed, row, row + count))
        row += count
    return spans


def _repeated(parts: Sequence[torch.Tensor], counts: Sequence[int]) -> torch.Tensor:
    return torch.cat([part.repeat(count) for part, count in zip(parts, counts, strict=True)])
