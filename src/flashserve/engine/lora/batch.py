"""Who gets which adapter's update in one step: built once for a composition, used in every layer.

The rows of a step are sorted: those of the base model, then those of adapters with few rows, then
each adapter that has many; on CUDA, the same kernels serve both. While a batch decodes, its
composition stays the same from step to step, and so does all that is built here.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import TypeAlias

import torch

from flashserve.engine.lora.bags import BagMaker
from flashserve.engine.lora.kernels import Run, RunPart, Update, add_run
from flashserve.engine.lora.memory import AdapterMemory, Placed
from flashserve.engine.lora.segments import Segments, Span, add_all, build_segments, has_kernels
from flashserve.engine.lora.targets import Group, Target

Owned: TypeAlias = tuple[Placed | None, int]
"""An adapter, or the base model alone, and how many rows in a row are its."""

MANY_ROWS = 64
"""From so many rows on, an adapter's are computed by plain products with its own matrices."""
STEADY_STEPS = 4
"""After so many steps with the same adapters their tables are made, which takes as long as what a
few steps save."""
_MAX_KEPT = 4


class LoraStep:
    """The updates of one step. Every `add` is in place, and does nothing where none is due."""

    def __init__(
        self,
        memory: AdapterMemory,
        updates: Sequence[Update | None],
        runs: Sequence[Sequence[Run]],
        segments: Sequence[Sequence[Segments | None]],
        spans: Sequence[Span],
        sampled: Sequence[Span],
        embedding: Target,
        head: Target,
    ) -> None:
        self._memory = memory
        self._updates = updates
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
        if (update := self._updates[group]) is not None:
            update.add(layer, x, outs)
        for run in self._runs[group]:
            add_run(self._memory, layer, run, x, outs)
        if segments := self._segments[group]:
            add_all(self._memory, layer, segments, x, outs)

    def add_joined(
        self, layer: int, group: int, x: torch.Tensor, out: torch.Tensor, sizes: Sequence[int]
    ) -> None:
        """As `add`, to one tensor that has the outputs of the layers, `sizes`, side by side."""
        update = self._updates[group]
        is_alone = not self._runs[group] and not self._segments[group]
        if update is not None and update.is_joined and is_alone:
            update.add(layer, x, (out,))
        else:
            self.add(layer, group, x, *out.split(list(sizes), dim=1))

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
        table_bytes: what working copies of adapters in use may take; see tables.py.
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
        table_bytes: int = 0,
    ) -> None:
        self._memory = memory
        self._groups = groups
        self._embedding = embedding
        self._head = head
        self._min_rows = min_rows
        self._use_triton = use_triton or (memory.pool.is_cuda and has_kernels())
        self._bags = BagMaker(memory, groups, table_bytes)
        self._last: list[Placed] = []
        self._num_steady = 0
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
        few = self._few(parts)
        has_tables = self._have_tables(few)
        key = (_key(parts), _key(sampled), has_tables)
        if key not in self._kept:
            self._kept[key] = self._build(parts, sampled, few, use_tables=has_tables)
            while len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]

    @property
    def table_bytes(self) -> int:
        """Of the tables that the last step was computed from."""
        tables = self._bags.tables
        return tables.num_bytes if tables.are_of(self._last) else 0

    def rest(self) -> None:
        """No adapter is in use: what was made for those that were may go."""
        if self._last:
            self._bags.tables.release()
            self._kept.clear()
            self._last = []

    def _have_tables(self, few: Sequence[Span]) -> bool:
        """Whether there are tables for these spans; made when their adapters keep coming."""
        adapters = [span.placed for span in few]
        self._num_steady = self._num_steady + 1 if adapters == self._last else 0
        self._last = adapters
        tables = self._bags.tables
        if few and self._num_steady >= STEADY_STEPS and not tables.are_of(adapters):
            self._kept.clear()  # what is kept would compute from the tables before
            self._bags.build_tables(few)
        return tables.are_of(adapters)

    def _is_run(self, num_rows: int) -> bool:
        return num_rows >= MANY_ROWS or self._min_rows > 1

    def _few(self, parts: Sequence[Owned]) -> list[Span]:
        """The spans that Bags compute."""
        if self._use_triton:
            return []
        return [span for span in _spans(parts) if not self._is_run(span.end - span.begin)]

    def _build(
        self,
        parts: Sequence[Owned],
        sampled: Sequence[Owned],
        few: Sequence[Span],
        *,
        use_tables: bool,
    ) -> LoraStep:
        spans = _spans(parts)
        if self._use_triton:
            return self._build_segments(spans, sampled)
        runs = [span for span in spans if self._is_run(span.end - span.begin)]
        if self._min_rows > 1:
            runs = _spans(parts, join=False)
        return LoraStep(
            self._memory,
            [
                self._bags.make(index, few, use_tables=use_tables)
                for index in range(len(self._groups))
            ],
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
