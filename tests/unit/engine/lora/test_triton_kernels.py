"""The CUDA kernels against the reference, through Triton's interpreter."""

from __future__ import annotations

import os
import random

import pytest
import torch
from tests.unit.engine.lora.support import Arena, groups, load, make_adapter, make_memory, targets
from tests.unit.engine.lora.test_kernels import RANKS, check, mixes

from flashserve.engine.lora.kernels import lora_delta

os.environ.setdefault("TRITON_INTERPRET", "1")
pytest.importorskip("triton", reason="the CPU build of torch comes without Triton")

from flashserve.engine.lora import batch
from flashserve.engine.lora.batch import Composer
from flashserve.engine.lora.segments import Segments
from flashserve.engine.lora.triton_kernels import add_segments


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
    a_offsets = torch.zeros(num_slots, max_rank, dtype=torch.int64)
    b_offsets = torch.zeros(num_slots, max_rank, dtype=torch.int64)
    a, b = torch.zeros(num_slots, max_rank, inside), torch.zeros(num_slots, max_rank, outside)
    free = 0
    for slot, rank in enumerate(ranks):
        for row in range(rank):
            a_offsets[slot, row] = free
            a[slot, row] = table[free : free + inside].float()
            free += inside
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


@pytest.mark.parametrize("mix", ["uniform", "zipf", "with base"])
@pytest.mark.parametrize("min_rows", [1, 4])
def test_a_step_through_the_kernels_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch, mix: str, min_rows: int
) -> None:
    """From the composition to the outputs, where pages are not filled and some slots span tiles."""
    monkeypatch.setattr(batch, "MANY_ROWS", 4)
    owners = mixes(21)[mix]
    num_adapters = 1 + max(owner for owner in owners if owner is not None)
    adapters = [
        make_adapter(f"a{index}", RANKS[index % len(RANKS)], width=24)
        for index in range(num_adapters)
    ]
    memory = make_memory(Arena(*adapters), width=24, num_bytes=16 << 20)
    placed = [load(memory, adapter) for adapter in adapters]
    composer = Composer(
        memory,
        groups(24),
        targets().embedding,
        targets().head,
        min_rows=min_rows,
        use_triton=True,
    )
    parts = [(None if owner is None else placed[owner], 1) for owner in owners]
    order = composer.order(parts)
    step = composer.compose([parts[index] for index in order], [])
    assert step is not None
    ordered = [owners[index] for index in order]
    by_owner = sorted(
        range(len(ordered)), key=lambda row: -1 if ordered[row] is None else ordered[row]
    )
    check(step, adapters, ordered, by_owner, torch.float32, 24)


def test_layers_that_no_adapter_changes_stay_as_they_are() -> None:
    part = make_adapter("part", 16, modules=("model.layers.1.self_attn.v_proj",))
    memory = make_memory(Arena(part))
    composer = Composer(memory, groups(), targets().embedding, targets().head, use_triton=True)
    step = composer.compose([(None, 2), (load(memory, part), 3)], [])
    assert step is not None
    x = torch.randn(5, 128)
    for layer in range(2):
        outs = [torch.zeros(5, target.out_features) for target in groups()[0]]
        step.add(layer, 0, x, *outs)
        assert [bool(out.any()) for out in outs] == [False, False, layer == 1]
        assert not outs[2][:2].any()
