"""Who gets which adapter's update in one step: built once for a composition, used in every layer.

The rows of a step are sorted: those of the base model, then those of adapters with few rows, then
each adapter that has many; on CUDA, the same kernels serve both. While a batch decodes, its
composition stays the same from step to step, and so does all that is built here.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import weakref
from collections.abc import Sequence
from typing import TypeAlias

import torch

from flashserve.engine.lora.kernels import Bags, Run, RunPart, add_bags, add_run
from flashserve.engine.lora.memory import AdapterMemory, Placed
from flashserve.engine.lora.segments import Segments, Span, add_all, build_segments, has_kernels
from flashserve.engine.lora.targets import Target

Group: TypeAlias = tuple[Target, ...]
"""Linear layers that share their input and are computed one after another."""
Owned: TypeAlias = tuple[Placed | None, int]
"""An adapter, or the base model alone, and how many rows in a row are its."""

MANY_ROWS = 64
"""From so many rows on, an adapter's are computed by plain products with its own matrices."""
_MAX_KEPT = 4
# So many rows for each adapter, or fewer, are multiplied one by one in float32: products of all
# rows with all adapters would waste more arithmetic than they save in calls.
_FEW_ROWS_EACH = 2


@dataclasses.dataclass(frozen=True, slots=True)
class _OwnRows:
    """What one adapter contributes to the Bags of a group; see there."""

    a_starts: torch.Tensor
    columns: torch.Tensor
    scales: torch.Tensor
    pages: torch.Tensor
    lengths: torch.Tensor


class LoraStep:
    """The updates of one step. Every `add` is in place, and does nothing where none is due."""

    def __init__(
        self,
        memory: AdapterMemory,
        bags: Sequence[Bags | None],
        runs: Sequence[Sequence[Run]],
        segments: Sequence[Sequence[Segments | None]],
        spans: Sequence[Span],
        sampled: Sequence[Span],
        embedding: Target,
        head: Target,
    ) -> None:
        self._memory = memory
        self._bags = bags
        self._runs = runs
        self._segments = segments
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
        if segments := self._segments[group]:
            add_all(self._memory, layer, segments, x, outs)

    def add_embedding(self, ids: torch.Tensor, hidden: torch.Tensor, scale: float = 1.0) -> None:
        """Args: ids: [T]; hidden: [T, hidden_size], their embeddings, times `scale`."""
        for span in self._spans:
            if (found := span.placed.targets.get(self._embedding)) is not None:
                a = self._memory.spread(found.a, self._embedding.in_features)
                b = self._memory.spread(found.b, self._embedding.out_features)
                rows = a.index_select(1, ids[span.begin : span.end]).t()
                hidden[span.begin : span.end].addmm_(rows, b, alpha=found.scaling * scale)

    def add_head(self, hidden: torch.Tensor, logits: torch.Tensor) -> None:
        """Args: hidden: [R, hidden_size] of the sampled rows; logits: [R, vocabulary]."""
        for span in self._sampled:
            if (found := span.placed.targets.get(self._head)) is not None:
                a = self._memory.spread(found.a, self._head.in_features)
                b = self._memory.spread(found.b, self._head.out_features)
                rows = torch.mm(hidden[span.begin : span.end], a.t())
                logits[span.begin : span.end].addmm_(rows, b, alpha=found.scaling)


class Composer:
    """Makes LoraSteps.

    Args:
        groups: the layers of a decoder layer, as the forward computes them.
        min_rows: above 1, each part of a step is computed by itself, with at least so many rows,
            so that no result depends on what else is there.
        use_triton: compute with triton_kernels.py, whose results never depend on what else is
            there; otherwise only where the adapters lie on a CUDA device.
    """

    def __init__(
        self,
        memory: AdapterMemory,
        groups: Sequence[Group],
        embedding: Target,
        head: Target,
        *,
        min_rows: int = 1,
        use_triton: bool = False,
    ) -> None:
        self._memory = memory
        self._groups = groups
        self._embedding = embedding
        self._head = head
        self._min_rows = min_rows
        self._use_triton = use_triton or (memory.pool.is_cuda and has_kernels())
        self._own: weakref.WeakKeyDictionary[Placed, list[_OwnRows]] = weakref.WeakKeyDictionary()
        self._kept: collections.OrderedDict[object, LoraStep] = collections.OrderedDict()

    def order(self, parts: Sequence[Owned]) -> list[int]:
        """The order in which `compose` wants the parts of a step: a permutation of their indices.

        Parts of one adapter stay in the order that they have.
        """
        totals: collections.Counter[int] = collections.Counter()
        for placed, count in parts:
            totals[_serial(placed)] += count

        def key(index: int) -> tuple[bool, int]:
            serial = _serial(parts[index][0])
            return serial >= 0 and self._is_run(totals[serial]), serial

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
        if self._use_triton:
            return self._build_segments(spans, sampled)
        runs = [span for span in spans if self._is_run(span.end - span.begin)]
        few = [span for span in spans if not self._is_run(span.end - span.begin)]
        if self._min_rows > 1:
            runs = _spans(parts, join=False)
        return LoraStep(
            self._memory,
            [self._bags(index, few) for index in range(len(self._groups))],
            [
                [run for span in runs if (run := self._run(group, span)) is not None]
                for group in self._groups
            ],
            [()] * len(self._groups),
            spans,
            _spans(sampled),
            self._embedding,
            self._head,
        )

    def _build_segments(self, spans: Sequence[Span], sampled: Sequence[Owned]) -> LoraStep:
        return LoraStep(
            self._memory,
            [None] * len(self._groups),
            [()] * len(self._groups),
            [build_segments(self._memory, group, spans) for group in self._groups],
            spans,
            _spans(sampled),
            self._embedding,
            self._head,
        )

    def _bags(self, group: int, spans: Sequence[Span]) -> Bags | None:
        own = [self._own_rows(span.placed)[group] for span in spans]
        if not any(len(item.a_starts) for item in own):
            return None
        begin, end = spans[0].begin, spans[-1].end
        counts = [span.end - span.begin for span in spans]
        by_row = self._multiplies_by_row(end - begin, len(spans))
        if by_row:
            num_columns = max(len(item.a_starts) for item in own)
            firsts = [0] * len(own)
            a_starts = torch.cat(
                [
                    _padded(item.a_starts, num_columns).expand(count, -1)
                    for item, count in zip(own, counts, strict=True)
                ]
            )
        else:
            sizes = [len(item.a_starts) for item in own]
            num_columns = sum(sizes)
            firsts = [0, *itertools.accumulate(sizes)][:-1]
            a_starts = torch.cat([item.a_starts for item in own])
        take = [
            (item.columns + row * num_columns + first)
            for item, span, first in zip(own, spans, firsts, strict=True)
            for row in range(span.begin - begin, span.end - begin)
        ]
        lengths = _repeated([item.lengths for item in own], counts)
        zero = torch.zeros(1, dtype=torch.int64, device=lengths.device)
        return Bags(
            begin=begin,
            end=end,
            in_features=self._groups[group][0].in_features,
            a_starts=a_starts,
            by_row=by_row,
            take=torch.cat(take),
            scales=_repeated([item.scales for item in own], counts),
            pages=_repeated([item.pages for item in own], counts),
            offsets=torch.cat((zero, lengths.cumsum(0))),
        )

    def _multiplies_by_row(self, num_rows: int, num_adapters: int) -> bool:
        is_wide = self._memory.pool.dtype == torch.float32
        return is_wide and num_adapters > 1 and num_rows <= _FEW_ROWS_EACH * num_adapters

    def _run(self, group: Group, span: Span) -> Run | None:
        parts: list[RunPart] = []
        starts: list[int] = []
        for index, target in enumerate(group):
            if (found := span.placed.targets.get(target)) is not None:
                columns = slice(len(starts), len(starts) + found.rank)
                parts.append(RunPart(index, columns, self._tensor(found.b.starts), found.scaling))
                starts += found.a.starts
        if not parts:
            return None
        return Run(
            span.begin,
            span.end,
            group[0].in_features,
            self._tensor(starts),
            tuple(parts),
            self._min_rows,
        )

    def _own_rows(self, placed: Placed) -> list[_OwnRows]:
        if placed not in self._own:
            self._own[placed] = [self._own_group(placed, group) for group in self._groups]
        return self._own[placed]

    def _own_group(self, placed: Placed, group: Group) -> _OwnRows:
        starts: list[int] = []
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
            lengths += [found.rank] * num_chunks
            starts += found.a.starts
        return _OwnRows(
            a_starts=self._tensor(starts),
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


def _spans(parts: Sequence[Owned], *, join: bool = True) -> list[Span]:
    """Rows of each adapter; its parts are neighbours, and are one span if they are to be joined."""
    spans: list[Span] = []
    row = 0
    for placed, count in parts:
        if placed is not None:
            if join and spans and spans[-1].placed is placed:
                spans[-1] = dataclasses.replace(spans[-1], end=row + count)
            else:
                spans.append(Span(placed, row, row + count))
        row += count
    return spans


def _padded(starts: torch.Tensor, count: int) -> torch.Tensor:
    """Further rows, whose products nobody takes, are those of page 0."""
    return torch.nn.functional.pad(starts, (0, count - len(starts)))


def _repeated(parts: Sequence[torch.Tensor], counts: Sequence[int]) -> torch.Tensor:
    return torch.cat([part.repeat(count) for part, count in zip(parts, counts, strict=True)])
