"""The CUDA kernels against the reference, through Triton's interpreter."""

from __future__ import annotations

import os
import random

import pytest
import torch

from flashserve.engine.lora.kernels import lora_delta

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="the CPU build of torch comes without Triton")

from flashserve.engine.lora.triton_kernels import Segments, add_segments


def owners_of(mix: str, num_rows: int) -> list[int]:
    draw = random.Random(1)
    return sorted(
        {
            "distinct": lambda row: row,
            "identical": lambda _row: 0,
            "uniform": lambda _row: draw.randrange(5),
            "zipf": lambda _row: min(int(draw.paretovariate(0.8)) - 1, 6),
        }[mix](row)
        for row in range(num_rows)
    )


@pytest.mark.parametrize("mix", ["distinct", "identical", "uniform", "zipf"])
@pytest.mark.parametrize("num_rows", [7, 40])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_segments_equal_the_reference(mix: str, num_rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    owners = owners_of(mix, num_rows)
    num_slots, inside, outside, max_rank = max(owners) + 2, 96, 80, 128
    ranks = [[4, 8, 16, 64, 128, 3, 0][slot % 7] for slot in range(num_slots)]
    table = torch.randn(num_slots * max_rank * (inside + outside)).to(dtype) * 0.1
    a_offsets = torch.zeros(num_slots, inside, dtype=torch.int64)
    b_offsets = torch.zeros(num_slots, max_rank, dtype=torch.int64)
    a, b = torch.zeros(num_slots, max_rank, inside), torch.zeros(num_slots, max_rank, outside)
    free = 0
    for slot, rank in enumerate(ranks):
        for feature in range(inside):
            a_offsets[slot, feature] = free
            a[slot, :rank, feature] = table[free : free + rank].float()
            free += rank
        for row in range(rank):
            b_offsets[slot, row] = free
            b[slot, row] = table[free : free + outside].float() * 0.5
            free += outside
    counts = [owners.count(slot) for slot in range(num_slots)]
    seg = torch.tensor([0, *counts]).cumsum(0)
    x, out = torch.randn(num_rows, inside).to(dtype), torch.randn(num_rows, outside).to(dtype)
    wanted = out.float() + lora_delta(x, a, b, seg)
    scales = torch.full((num_slots,), 0.5)
    segments = Segments(seg.int(), torch.tensor(ranks).int(), a_offsets, b_offsets, scales)
    add_segments(table, segments, x, out)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out.float(), wanted, atol=tolerance, rtol=tolerance)
