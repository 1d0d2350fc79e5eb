"""The fast forms against the reference, over mixes of adapters in one step."""

from __future__ import annotations

import operator
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
from flashserve.engine.lora.memory import AdapterMemory, Placed
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
    composer = make_composer(memory, width)
    for number in (0, batch.STEADY_STEPS):
        parts = [(None if owner is None else placed[owner], 1) for owner in owners]
        order = composer.order(parts)
        step = None
        for _ in range(max(number, 1)):
            step = composer.compose([parts[index] for index in order], [])
        assert step is not None
        assert bool(composer.table_bytes) <= (number > 0)
        ordered = [owners[index] for index in order]
        by_owner = sorted(
            range(len(ordered)), key=lambda row: -1 if ordered[row] is None else ordered[row]
        )
        check(step, adapters, ordered, by_owner, dtype, width)


def make_composer(memory: AdapterMemory, width: int = 64, table_bytes: int = 64 << 20) -> Composer:
    outside = (targets(width).embedding, targets(width).head)
    return Composer(memory, groups(width), *outside, table_bytes=table_bytes)


def of_rows(composer: Composer, *parts: tuple[Placed | None, int], times: int = 1) -> LoraStep:
    """The last of so many steps alike."""
    ordered = [parts[index] for index in composer.order(parts)]
    steps = [composer.compose(ordered, []) for _ in range(times)]
    assert steps[-1] is not None
    return steps[-1]


def delta_of(step: LoraStep, x: torch.Tensor) -> torch.Tensor:
    out = torch.zeros(len(x), 128)
    step.add(0, 1, x, out)
    return out


def test_adapters_that_keep_coming_are_computed_from_tables() -> None:
    """And from their own, whichever adapters came between, or were loaded to their places."""
    one, two = make_adapter("one", 8), make_adapter("two", 8)
    memory = make_memory(Arena(one, two))
    first, second = load(memory, one), load(memory, two)
    composer = make_composer(memory)
    x = torch.randn(3, 128)
    wanted = delta_of(of_rows(composer, (first, 2), (second, 1), times=batch.STEADY_STEPS), x)
    assert not composer.table_bytes
    step = of_rows(composer, (first, 2), (second, 1))
    assert composer.table_bytes
    torch.testing.assert_close(delta_of(step, x), wanted)
    uneven = delta_of(of_rows(composer, (first, 1), (second, 2)), x)
    assert composer.table_bytes
    torch.testing.assert_close(uneven[[0, 2]], wanted[[0, 2]])
    alone = of_rows(composer, (first, 3))
    assert not composer.table_bytes
    torch.testing.assert_close(delta_of(alone, x)[:2], wanted[:2])
    alone = of_rows(composer, (first, 3), times=batch.STEADY_STEPS)
    assert composer.table_bytes
    torch.testing.assert_close(delta_of(alone, x)[:2], wanted[:2])
    of_rows(composer, (first, 2), (second, 1), times=batch.STEADY_STEPS + 1)
    memory.release(first)
    anew = load(memory, two)
    assert anew.targets == first.targets
    step = of_rows(composer, (second, 1), (anew, 2))
    assert not composer.table_bytes
    for _ in range(2):
        torch.testing.assert_close(delta_of(step, x[[2, 0, 1]])[0], wanted[2])
        step = of_rows(composer, (second, 1), (anew, 2), times=batch.STEADY_STEPS)
        assert composer.table_bytes
    composer.rest()
    assert not composer.table_bytes


def test_tables_take_no_more_than_they_may() -> None:
    """For ranks that differ much they would be empty for the most part."""
    small, large = make_adapter("small", 1), make_adapter("large", 64)
    memory = make_memory(Arena(small, large))
    placed = [load(memory, adapter) for adapter in (small, large)]
    rows = [2 * 64 * len(group) for group in groups()]
    inside = [group[0].in_features for group in groups()]
    outside = [sum(target.out_features for target in group) for group in groups()]
    a_bytes, b_bytes = (4 * sum(map(operator.mul, rows, widths)) for widths in (inside, outside))
    for parts, table_bytes, taken in (
        ([(placed[1], 1)], a_bytes + b_bytes, a_bytes + b_bytes),
        ([(placed[1], 1)], a_bytes + b_bytes - 1, a_bytes),
        ([(placed[1], 1)], a_bytes - 1, 0),
        ([(placed[0], 1), (placed[1], 1)], 1 << 30, 2 * a_bytes),
        ([*[(load(memory, small), 1) for _ in range(3)], (placed[1], 1)], 1 << 30, 0),
    ):
        composer = make_composer(memory, table_bytes=table_bytes)
        of_rows(composer, *parts, times=batch.STEADY_STEPS + 1)
        assert composer.table_bytes == taken


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
