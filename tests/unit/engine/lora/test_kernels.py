"""The fast forms against the reference, over mixes of adapters in one step."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from tests.unit.engine.lora.support import (
    Adapter,
    Arena,
    groups,
    load,
    make_adapter,
    make_memory,
    targets,
)

from flashserve.engine.lora import batch
from flashserve.engine.lora.batch import Composer, LoraStep
from flashserve.engine.lora.kernels import lora_delta
from flashserve.errors import InternalError

RANKS = [4, 8, 16, 64, 1, 3, 128]


def mixes(num_rows: int) -> dict[str, list[int | None]]:
    """The adapter of each row, as in Punica's tests."""
    draw = random.Random(1)
    return {
        "distinct": list(range(num_rows)),
        "identical": [0] * num_rows,
        "uniform": [draw.randrange(5) for _ in range(num_rows)],
        "zipf": [min(int(draw.paretovariate(0.8)) - 1, 6) for _ in range(num_rows)],
        "with base": [0, *(draw.choice([None, 0, 1, 2]) for _ in range(num_rows - 1))],
    }


def reference(
    adapters: Sequence[Adapter], owners: Sequence[int | None], x: torch.Tensor, module: str
) -> torch.Tensor:
    """Of rows sorted by adapter, the base's first."""
    used = sorted({owner for owner in owners if owner is not None})
    found = [adapters[owner].weights[module] for owner in used]
    rank = max(a.shape[0] for a, _, _ in found)
    a, b = (
        torch.stack([torch.nn.functional.pad(item, (0, 0, 0, rank - len(item))) for item in items])
        for items in ([a for a, _, _ in found], [b.t() * scaling for _, b, scaling in found])
    )
    num_base = sum(owner is None for owner in owners)
    counts = [owners.count(owner) for owner in used]
    seg = torch.tensor([0, *counts]).cumsum(0)
    delta = lora_delta(x[num_base:], a, b, seg)
    return torch.cat((torch.zeros(num_base, delta.shape[1]), delta))


def check(
    step: LoraStep,
    adapters: Sequence[Adapter],
    owners: Sequence[int | None],
    by_owner: Sequence[int],
    dtype: torch.dtype,
    width: int,
) -> None:
    """The step's rows may have adapters in another order than the reference's."""
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for layer in range(2):
        for index, group in enumerate(groups(width)):
            x = torch.randn(len(owners), group[0].in_features).to(dtype)
            outs = [torch.zeros(len(x), target.out_features, dtype=dtype) for target in group]
            step.add(layer, index, x, *outs)
            for target, out in zip(group, outs, strict=True):
                module = f"model.layers.{layer}.{target.name}"
                wanted = reference(adapters, [owners[row] for row in by_owner], x[by_owner], module)
                scale = float(wanted.abs().max())
                found = out[by_owner].float()
                torch.testing.assert_close(found, wanted, atol=tolerance * scale, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mix", list(mixes(1)))
@pytest.mark.parametrize("num_rows", [1, 24])
@pytest.mark.parametrize("many_rows", [2, 64])
@pytest.mark.parametrize("width", [64, 24])
def test_every_form_equals_the_reference(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    mix: str,
    num_rows: int,
    many_rows: int,
    width: int,
) -> None:
    monkeypatch.setattr(batch, "MANY_ROWS", many_rows)
    owners = mixes(num_rows)[mix]
    num_adapters = 1 + max(owner for owner in owners if owner is not None)
    adapters = [
        make_adapter(f"a{index}", RANKS[index % len(RANKS)], width=width, dtype=dtype)
        for index in range(num_adapters)
    ]
    memory = make_memory(Arena(*adapters), dtype, width=width, num_bytes=16 << 20)
    placed = [load(memory, adapter) for adapter in adapters]
    composer = Composer(memory, groups(width), targets().embedding, targets().head)
    parts = [(None if owner is None else placed[owner], 1) for owner in owners]
    order = composer.order(parts)
    step = composer.compose([parts[index] for index in order], [])
    assert step is not None
    ordered = [owners[index] for index in order]
    by_owner = sorted(
        range(len(ordered)), key=lambda row: -1 if ordered[row] is None else ordered[row]
    )
    check(step, adapters, ordered, by_owner, dtype, width)


def test_layers_and_modules_that_an_adapter_leaves_alone_stay_as_they_are() -> None:
    """Also where another adapter had its rows before."""
    full = make_adapter("full", 8)
    modules = ("model.layers.1.self_attn.q_proj", "model.layers.1.self_attn.v_proj")
    part = make_adapter("part", 16, modules=modules)
    memory = make_memory(Arena(full, part))
    memory.release(load(memory, full))
    composer = Composer(memory, groups(), targets().embedding, targets().head)
    step = composer.compose([(load(memory, part), 3)], [])
    assert step is not None
    x = torch.randn(3, 128)
    for layer, adapted in ((0, ()), (1, (0, 2))):
        outs = [torch.zeros(3, target.out_features) for target in groups()[0]]
        step.add(layer, 0, x, *outs)
        assert [bool(out.any()) for out in outs] == [index in adapted for index in range(3)]
        hidden = torch.zeros(3, 128)
        step.add(layer, 1, x, hidden)
        assert not hidden.any()


def test_segments_that_leave_rows_out_are_refused() -> None:
    x, a, b = torch.randn(3, 4), torch.randn(1, 2, 4), torch.randn(1, 2, 5)
    with pytest.raises(InternalError, match="3 rows"):
        lora_delta(x, a, b, torch.tensor([0, 2]))
