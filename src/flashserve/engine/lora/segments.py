"""Which rows of a step are whose, and where their adapters lie, as the CUDA kernels want it.

Built once for a composition of a step. After that no product asks the device for anything: the
kernels read all that differs between compositions from these tensors.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Sequence
from typing import Any

import torch

from flashserve.engine.lora.memory import AdapterMemory, Placed
from flashserve.engine.lora.targets import Target

_MIN_WIDTH = 16  # of the tables; they double from there, so that few kernels are compiled


@dataclasses.dataclass(frozen=True, slots=True)
class Segments:
    """Which rows are whose, and where the matrices of one linear layer lie in a layer's memory.

    seg: [slots + 1] int32, ends of empty slots repeated. Rows before the first are nobody's.
    ranks: [slots] int32; 0 where an adapter leaves the layer alone.
    a_offsets: [slots, width] int64, where each row of A begins, in elements; width >= any rank.
    b_offsets: [slots, width] int64, where each row of B transposed begins.
    scales: [slots] float32.
    """

    seg: torch.Tensor
    ranks: torch.Tensor
    a_offsets: torch.Tensor
    b_offsets: torch.Tensor
    scales: torch.Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class Span:
    """Rows [begin, end) are of one adapter."""

    placed: Placed
    begin: int
    end: int


def build_segments(
    memory: AdapterMemory, group: Sequence[Target], spans: Sequence[Span]
) -> list[Segments | None]:
    """For each layer of a group that shares its input; None if no adapter changes it.

    Args:
        spans: at least one; neighbours, in the order of their rows.
    """
    bounds = [spans[0].begin, *(span.end for span in spans)]
    seg = torch.tensor(bounds, dtype=torch.int32, device=memory.pool.device)
    return [_of_target(memory, target, spans, seg) for target in group]


def add_all(
    memory: AdapterMemory,
    layer: int,
    segments: Sequence[Segments | None],
    x: torch.Tensor,
    outs: Sequence[torch.Tensor],
) -> None:
    """Adds to `outs`, [T, out_features] of each layer of the group, in place."""
    table = memory.layers[layer].view(-1)
    for item, out in zip(segments, outs, strict=True):
        if item is not None:
            _kernels().add_segments(table, item, x, out)


@functools.cache
def has_kernels() -> bool:
    """Builds of torch for the CPU come without Triton."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _kernels() -> Any:
    """Imported when they are needed, for Triton may not be there."""
    return importlib.import_module("flashserve.engine.lora.triton_kernels")


def _of_target(
    memory: AdapterMemory, target: Target, spans: Sequence[Span], seg: torch.Tensor
) -> Segments | None:
    found = [span.placed.targets.get(target) for span in spans]
    ranks = [0 if item is None else item.rank for item in found]
    if not any(ranks):
        return None
    width = _MIN_WIDTH
    while width < max(ranks):
        width *= 2
    a_starts = [() if item is None else item.a.starts for item in found]
    b_starts = [() if item is None else item.b.starts for item in found]
    scales = [0.0 if item is None else item.scaling for item in found]
    device = memory.pool.device
    return Segments(
        seg,
        torch.tensor(ranks, dtype=torch.int32, device=device),
        _offsets(memory, a_starts, width),
        _offsets(memory, b_starts, width),
        torch.tensor(scales, dtype=torch.float32, device=device),
    )


def _offsets(memory: AdapterMemory, starts: Sequence[Sequence[int]], width: int) -> torch.Tensor:
    padded = [[*pages, *[0] * (width - len(pages))] for pages in starts]
    pages = torch.tensor(padded, dtype=torch.int64, device=memory.pool.device)
    return pages * memory.page_elements
