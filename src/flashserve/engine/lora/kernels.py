"""Products with the low-rank updates of many adapters at once: the reference and the fast forms.

Rows of a batch are sorted by adapter. Three forms compute the update of a group of linear layers
that share their input (queries, keys and values, say):

  Bags  many adapters with few rows each, as in decoding. The rows of A of all adapters present are
        gathered, page by page, and multiplied with all rows at once, or, from the second step with
        the same adapters on, each with its own rows in one batched product; then each row takes
        the results of its own adapter as the weights of a sum over pages of B, straight from the
        paged memory (an embedding bag). No loop over adapters.
  Pair  one adapter with few rows that comes again: two products in float32.
  Run   many rows of one adapter, as in a prompt: plain products.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Protocol

import torch

from flashserve.engine.lora.memory import AdapterMemory
from flashserve.engine.lora.tables import Table
from flashserve.errors import InternalError

_SUM = 0  # torch.embedding_bag's mode


def lora_delta(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, seg: torch.Tensor
) -> torch.Tensor:
    """Low-rank update of a batch whose rows are sorted by adapter: what the others must equal.

    Args:
        x: [tokens, in_features].
        a: [adapters, rank, in_features].
        b: [adapters, rank, out_features], times the scaling.
        seg: [adapters + 1] row offsets; adapter i owns x[seg[i]:seg[i + 1]].

    Returns:
        [tokens, out_features], float32.

    Raises:
        InternalError: seg does not cover every row of x.

    Source: Punica, arXiv:2310.18547.
    """
    bounds = seg.tolist()
    if bounds[0] != 0 or bounds[-1] != len(x) or bounds != sorted(bounds):
        raise InternalError(f"segments {bounds} do not cover {len(x)} rows")
    out = torch.zeros(len(x), b.shape[2], dtype=torch.float32, device=x.device)
    for index, (begin, end) in enumerate(itertools.pairwise(bounds)):
        shrunk = x[begin:end].float() @ a[index].float().t()
        out[begin:end] = shrunk @ b[index].float()
    return out


class Products(Protocol):
    """Makes the products of rows with the rows of A of their adapters."""

    def of(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """Args: rows: [R, in_features]. Returns: flat, in the memory's type."""


@dataclasses.dataclass(frozen=True, slots=True)
class Gathered:
    """Gathers the rows of A in each step.

    starts: [P] first pages of the rows of A of every adapter there.
    by_row: whether starts is [rows, P], of each row's own adapter, padded; then products are made
        row by row.
    """

    memory: AdapterMemory
    in_features: int
    starts: torch.Tensor
    by_row: bool

    def of(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """[rows, P]."""
        a = self.memory.rows(layer, self.in_features).index_select(0, self.starts.view(-1))
        if self.by_row:
            a = a.view(len(rows), -1, self.in_features)
            return torch.bmm(a, rows[:, :, None]).view(-1)
        return torch.mm(rows, a.t()).view(-1)


@dataclasses.dataclass(frozen=True, slots=True)
class Tabled:
    """Has the rows of A, scaled, in a table.

    each: rows that are computed for each adapter.
    order: [adapters * each] which rows those are; None: as they come.
    """

    table: Table
    each: int
    order: torch.Tensor | None

    def of(self, layer: int, rows: torch.Tensor) -> torch.Tensor:
        """[adapters, each, rows of the table]."""
        table = self.table.a[layer]
        wide = rows.float()
        if self.order is not None:
            wide = wide.index_select(0, self.order)
        if len(table) == 1:
            products = torch.mm(wide, table[0].t())
        else:
            products = torch.bmm(wide.view(-1, self.each, wide.shape[1]), table.transpose(1, 2))
        return products.view(-1).to(rows.dtype)


class Update(Protocol):
    """What the adapters of rows [begin, end) of a step add to a group of layers."""

    @property
    def is_joined(self) -> bool:
        """Whether `outs` may be one tensor for all layers of the group, side by side."""

    def add(self, layer: int, x: torch.Tensor, outs: Sequence[torch.Tensor]) -> None:
        """Adds to `outs`, [T, out_features] of each layer of the group, in place.

        Args:
            x: [T, in_features].
        """


@dataclasses.dataclass(frozen=True, slots=True)
class Bags:
    """An Update of adapters with few rows each.

    take: [M] places in the products that are weights of the sum, in the order of pages.
    scales: [M] what to multiply them with; None if they are scaled.
    pages: [M] pages of B.
    offsets: [rows * chunks + 1] where each sum begins; a row has one for each page of its output.
    is_joined: if every layer's output is whole pages.
    """

    memory: AdapterMemory
    begin: int
    end: int
    products: Products
    take: torch.Tensor
    scales: torch.Tensor | None
    pages: torch.Tensor
    offsets: torch.Tensor
    is_joined: bool

    def add(self, layer: int, x: torch.Tensor, outs: Sequence[torch.Tensor]) -> None:
        rows = _part(x, self.begin, self.end)
        weights = self.products.of(layer, rows).index_select(0, self.take)
        if self.scales is not None:
            weights.mul_(self.scales)
        delta = torch.embedding_bag(
            self.memory.layers[layer],
            self.pages,
            self.offsets,
            False,
            _SUM,
            False,
            weights,
            True,
        )[0].view(len(rows), -1)
        size = self.memory.page_elements
        at = 0
        for out in outs:
            width = out.shape[1]
            _part(out, self.begin, self.end).add_(_columns(delta, at, width))
            at += -(-width // size) * size


@dataclasses.dataclass(frozen=True, slots=True)
class Pair:
    """An Update of one adapter with few rows, from a table that has its B as well."""

    begin: int
    end: int
    a: torch.Tensor
    b: torch.Tensor
    is_joined: bool = True

    def add(self, layer: int, x: torch.Tensor, outs: Sequence[torch.Tensor]) -> None:
        rows = _part(x, self.begin, self.end).float()
        delta = torch.mm(torch.mm(rows, self.a[layer].t()), self.b[layer])
        at = 0
        for out in outs:
            width = out.shape[1]
            _part(out, self.begin, self.end).add_(_columns(delta, at, width))
            at += width


@dataclasses.dataclass(frozen=True, slots=True)
class RunPart:
    """One linear layer of a Run: which columns of the products are its, and its rows of B."""

    index: int
    """Among the layers of the group."""
    columns: slice
    b_starts: torch.Tensor
    scaling: float


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """The update of one group of layers to rows [begin, end), all of one adapter.

    min_rows: compute at least so many, for the sake of batch_invariant.
    """

    begin: int
    end: int
    in_features: int
    a_starts: torch.Tensor
    parts: tuple[RunPart, ...]
    min_rows: int = 1


def add_run(
    memory: AdapterMemory, layer: int, run: Run, x: torch.Tensor, outs: Sequence[torch.Tensor]
) -> None:
    """Adds to `outs`, [T, out_features] of each layer of the group, in place."""
    rows = x[run.begin : run.end]
    num_rows = len(rows)
    if num_rows < run.min_rows:
        rows = torch.cat((rows, rows[-1:].expand(run.min_rows - num_rows, -1)))
    a = memory.rows(layer, run.in_features).index_select(0, run.a_starts)
    products = torch.mm(rows, a.t())
    for part in run.parts:
        out = outs[part.index]
        b = memory.rows(layer, out.shape[1]).index_select(0, part.b_starts)
        mine = products[:, part.columns]
        if num_rows == len(rows):
            out[run.begin : run.end].addmm_(mine, b, alpha=part.scaling)
        else:
            out[run.begin : run.end].add_(torch.mm(mine, b)[:num_rows], alpha=part.scaling)


def _part(rows: torch.Tensor, begin: int, end: int) -> torch.Tensor:
    """Also a slice of all rows would cost a call."""
    return rows if end - begin == len(rows) else rows[begin:end]


def _columns(delta: torch.Tensor, at: int, width: int) -> torch.Tensor:
    return delta if width == delta.shape[1] else delta[:, at : at + width]
