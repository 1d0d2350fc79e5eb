"""Products with the low-rank updates of many adapters at once: the reference and the fast forms.

Rows of a batch are sorted by adapter. Two forms compute the update of a group of linear layers
that share their input (queries, keys and values, say):

  Bags  many adapters with few rows each, as in decoding. x A^T is a sum of rows of A transposed,
        whose weights are the features of x, and the same with B: both are embedding bags over
        the paged memory itself. Each row of the batch sums its own adapter's rows: no loop over
        adapters, no padding, no mask, nothing gathered first.
  Run   many rows of one adapter, as in a prompt: plain products.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch

from flashserve.engine.lora.memory import AdapterMemory
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


@dataclasses.dataclass(frozen=True, slots=True)
class Shrink:
    """Products of rows [begin, end) with A, of adapters whose rows of A transposed are as wide.

    unit, units: how wide; see PlacedGroup.
    places: [rows * units * in_features] units of A transposed, of each row's own adapter.
    offsets: [rows * units + 1] where each sum begins.
    """

    begin: int
    end: int
    unit: int
    units: int
    places: torch.Tensor
    offsets: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Bags:
    """The update of one group of layers to rows [begin, end) of a step.

    shrinks: they cover the rows whose adapters change the group; their products, one after
    another, are `products`.
    take: [M] places among the products that are weights of the sum, in the order of pages.
    scales: [M] what to multiply them with; None for 1.
    pages: [M] pages of B.
    offsets: [rows * chunks + 1] where each sum begins; a row has one for each page of its output.
    """

    begin: int
    end: int
    shrinks: tuple[Shrink, ...]
    take: torch.Tensor
    scales: torch.Tensor | None
    pages: torch.Tensor
    offsets: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class RunPart:
    """One linear layer of a Run: which columns of the products are its, and its rows of B."""

    index: int
    """Among the layers of the group."""
    columns: slice
    b_offsets: torch.Tensor
    scaling: float


@dataclasses.dataclass(frozen=True, slots=True)
class Run:
    """The update of one group of layers to rows [begin, end), all of one adapter.

    a_offsets: [in_features] rows of A transposed, `width` wide.
    min_rows: compute at least so many, for the sake of batch_invariant.
    """

    begin: int
    end: int
    width: int
    a_offsets: torch.Tensor
    parts: tuple[RunPart, ...]
    min_rows: int = 1


def add_bags(
    memory: AdapterMemory, layer: int, bags: Bags, x: torch.Tensor, outs: Sequence[torch.Tensor]
) -> None:
    """Adds to `outs`, [T, out_features] of each layer of the group, in place."""
    products = [_shrink(memory.units(layer, part.unit), part, x) for part in bags.shrinks]
    joined = products[0] if len(products) == 1 else torch.cat(products)
    weights = joined.index_select(0, bags.take)
    if bags.scales is not None:
        weights.mul_(bags.scales)
    delta = _sum_bags(memory.layers[layer], bags.pages, bags.offsets, weights)
    delta = delta.view(bags.end - bags.begin, -1)
    at = 0
    for out in outs:
        width = out.shape[1]
        out[bags.begin : bags.end].add_(delta[:, at : at + width])
        at += -(-width // memory.page_elements) * memory.page_elements


def _shrink(table: torch.Tensor, part: Shrink, x: torch.Tensor) -> torch.Tensor:
    """The products of a part's rows, [rows * units * unit]."""
    rows = x[part.begin : part.end]
    if part.units > 1:
        rows = rows[:, None].expand(-1, part.units, -1)
    return _sum_bags(table, part.places, part.offsets, rows.reshape(-1)).view(-1)


def _sum_bags(
    table: torch.Tensor, places: torch.Tensor, offsets: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """[bags, row]: of each bag, the sum of weights[i] * table[places[i]] over its range of i.

    `table` is contiguous: of another one the operator would make a copy first. The operator itself
    is called, since torch.nn.functional.embedding_bag checks its arguments for longer than the
    products of a small batch take.
    """
    return torch.embedding_bag(table, places, offsets, False, _SUM, False, weights, True)[0]


def add_run(
    memory: AdapterMemory, layer: int, run: Run, x: torch.Tensor, outs: Sequence[torch.Tensor]
) -> None:
    """As `add_bags`."""
    rows = x[run.begin : run.end]
    num_rows = len(rows)
    if num_rows < run.min_rows:
        rows = torch.cat((rows, rows[-1:].expand(run.min_rows - num_rows, -1)))
    a = memory.rows(layer, run.width).index_select(0, run.a_offsets)
    products = torch.mm(rows, a)
    for part in run.parts:
        out = outs[part.index]
        b = memory.rows(layer, out.shape[1]).index_select(0, part.b_offsets)
        mine = products[:, part.columns]
        if num_rows == len(rows):
            out[run.begin : run.end].addmm_(mine, b, alpha=part.scaling)
        else:
            out[run.begin : run.end].add_(torch.mm(mine, b)[:num_rows], alpha=part.scaling)
