"""Products with the low-rank updates of many adapters at once: the reference and the fast forms.

Rows of a batch are sorted by adapter. Two forms compute the update of a group of linear layers
that share their input (queries, keys and values, say):

  Bags  many adapters with few rows each, as in decoding. The rows of A of all adapters present are
        gathered, page by page, and multiplied with all rows at once; then each row takes the
        results of its own adapter as the weights of a sum over pages of B, straight from the
        paged memory (an embedding bag). No loop over adapters, and nothing is padded.
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
class Bags:
    """The update of one group of layers to rows [begin, end) of a step.

    a_starts: [P] first pages of the rows of A of every adapter there.
    by_row: whether a_starts is [rows, P], of each row's own adapter, padded; then products are
        made row by row.
    take: [M] places in the [rows, P] products that are weights of the sum, in the order of pages.
    scales: [M] what to multiply them with.
    pages: [M] pages of B.
    offsets: [rows * chunks + 1] where each sum begins; a row has one for each page of its output.
    """

    begin: int
    end: int
    in_features: int
    a_starts: torch.Tensor
    by_row: bool
    take: torch.Tensor
    scales: torch.Tensor
    pages: torch.Tensor
    offsets: torch.Tensor


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


def add_bags(
    memory: AdapterMemory, layer: int, bags: Bags, x: torch.Tensor, outs: Sequence[torch.Tensor]
) -> None:
    """Adds to `outs`, [T, out_features] of each layer of the group, in place."""
    rows = x[bags.begin : bags.end]
    table = memory.rows(layer, bags.in_features)
    a = table.index_select(0, bags.a_starts.view(-1))
    if bags.by_row:
        a = a.view(len(rows), -1, bags.in_features)
        products = torch.bmm(a, rows[:, :, None])
    else:
        products = torch.mm(rows, a.t())
    weights = products.view(-1).index_select(0, bags.take).mul_(bags.scales)
    delta = torch.embedding_bag(
        memory.layers[layer],
        bags.pages,
        bags.offsets,
        False,
        _SUM,
        False,
        weights,
        True,
    )[0].view(len(rows), -1)
    at = 0
    for out in outs:
        width = out.shape[1]
        out[bags.begin : bags.end].add_(delta[:, at : at + width])
        at += -(-width // memory.page_elements) * memory.page_elements


def add_run(
    memory: AdapterMemory, layer: int, run: Run, x: torch.Tensor, outs: Sequence[torch.Tensor]
) -> None:
    """As `add_bags`."""
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
