import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashserve.errors import CheckpointError, UnsupportedModelError
from flashserve.store.checkpoint.layout import DTYPE_BITS
from flashserve.store.device import loadplan
from flashserve.store.device.loadplan import Copy, RegionLayout, lay_out, plan_copies
from flashserve.store.device.slices import cut
from flashserve.types import TensorSlice

DTYPES = ["F32", "BF16", "F16", "F8_E4M3", "I8", "I64"]


def piece(name: str, dtype: str, shape: tuple[int, ...], offset: int) -> TensorSlice:
    return TensorSlice(name, dtype, shape, offset, math.prod(shape) * DTYPE_BITS[dtype] // 8)


def moved(layout: RegionLayout, copies, arena: bytes) -> bytearray:
    region = bytearray(layout.num_bytes)
    for copy in itertools.chain.from_iterable(copies):
        for row in range(copy.num_rows):
            source = copy.source + row * copy.pitch_bytes
            target = copy.target + row * copy.row_bytes
            region[target : target + copy.row_bytes] = arena[source : source + copy.row_bytes]
    return region


@st.composite
def checkpoints(draw):
    """Tensors one after another with gaps of any size, in any groups, and boundaries anywhere."""
    tensors, offset = [], draw(st.integers(0, 40))
    for index in range(draw(st.integers(1, 8))):
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        tensors.append(piece(f"t{index}", draw(st.sampled_from(DTYPES)), shape, offset))
        offset += tensors[-1].num_bytes + draw(st.sampled_from([0, 0, 0, 1, 8]))
    groups = [[], [], []]
    for tensor in tensors:
        groups[draw(st.integers(0, 2))].append(tensor.name)
    parts = {
        tensor.name: cut(tensor, len(tensor.shape) - 1, 0, (tensor.shape[-1] + 1) // 2)
        for tensor in tensors
        if tensor.shape and draw(st.booleans())
    }
    boundaries = sorted(draw(st.sets(st.integers(1, offset + 1), max_size=6)))
    return tensors, groups, parts, boundaries, offset


@settings(deadline=None)
@given(checkpoints())
def test_the_region_holds_exactly_the_wanted_bytes(given_):
    tensors, groups, parts, boundaries, num_bytes = given_
    arena = np.random.default_rng(0).integers(0, 256, num_bytes, np.uint8).tobytes()
    layout = lay_out(tensors, groups, parts=parts)
    copies = plan_copies(layout, tensors, num_bytes, boundaries)
    region = moved(layout, copies, arena)
    by_name = {tensor.name: tensor for tensor in tensors}
    for place in itertools.chain.from_iterable(layout.groups):
        tensor = by_name[place.name]
        stored = arena[tensor.offset : tensor.offset + tensor.num_bytes]
        wanted = b"".join(
            stored[place.part.offset + row * place.part.pitch_bytes :][: place.part.row_bytes]
            for row in range(place.part.num_rows)
        )
        assert bytes(region[place.offset : place.offset + place.num_bytes]) == wanted
        assert place.offset % 16 == 0


@settings(deadline=None)
@given(checkpoints())
def test_copies_cross_no_boundary_and_targets_do_not_overlap(given_):
    tensors, groups, parts, boundaries, num_bytes = given_
    layout = lay_out(tensors, groups, parts=parts)
    targets = []
    for copy in itertools.chain.from_iterable(plan_copies(layout, tensors, num_bytes, boundaries)):
        assert not any(copy.source < boundary < copy.source_end for boundary in boundaries)
        targets.append((copy.target, copy.target + copy.num_bytes))
    targets.sort()
    for (_, end), (begin, _) in itertools.pairwise(targets):
        assert end <= begin


@settings(deadline=None)
@given(checkpoints(), st.integers(0, 1000))
def test_the_layout_stays_when_the_arena_moves_the_tensors(given_, shift):
    tensors, groups, parts, _, num_bytes = given_
    there = [
        TensorSlice(each.name, each.dtype, each.shape, each.offset + shift, each.num_bytes)
        for each in tensors
    ]
    layout = lay_out(tensors, groups, parts=parts)
    before = plan_copies(layout, tensors, num_bytes)
    after = plan_copies(layout, there, num_bytes + shift)
    flat = [list(itertools.chain.from_iterable(each)) for each in (before, after)]
    assert [copy.target for copy in flat[0]] == [copy.target for copy in flat[1]]
    assert all(b.source == a.source + shift for a, b in zip(*flat, strict=True))


def test_neighbours_in_the_file_become_one_copy():
    tensors = [piece("a", "BF16", (8, 8), 1000), piece("b", "BF16", (24,), 1128)]
    tensors.append(piece("c", "BF16", (8,), 1176))
    layout = lay_out(tensors, [["c", "a", "b"]])
    assert plan_copies(layout, tensors, 2000) == ((Copy(1000, 0, 192),),)


def test_groups_lie_one_after_another_at_256_bytes():
    tensors = [piece("a", "I8", (10,), 0), piece("b", "I8", (10,), 10)]
    layout = lay_out(tensors, [["b"], ["a"]])
    assert [place.offset for group in layout.groups for place in group] == [0, 256]


def test_long_runs_are_cut_into_even_copies():
    size = 3 * loadplan.COPY_BYTES
    tensors = [piece("a", "I8", (size + 10,), 0)]
    (copies,) = plan_copies(lay_out(tensors, [["a"]]), tensors, size + 10)
    assert sum(copy.num_bytes for copy in copies) == size + 10
    assert all(copy.num_bytes <= loadplan.COPY_BYTES for copy in copies)
    assert min(copy.num_bytes for copy in copies) > loadplan.COPY_BYTES // 4 * 2
    wide = [piece("a", "I8", (4, loadplan.COPY_BYTES), 0)]
    layout = lay_out(wide, [["a"]], parts={"a": cut(wide[0], 1, 0, loadplan.COPY_BYTES * 3 // 4)})
    (copies,) = plan_copies(layout, wide, 4 * loadplan.COPY_BYTES)
    assert [copy.num_rows for copy in copies] == [1, 1, 1, 1]


def test_floats_of_another_type_arrive_in_a_scratch_that_groups_share():
    tensors = [piece("a", "F32", (64,), 0), piece("b", "BF16", (128,), 256)]
    tensors += [piece("c", "F32", (32,), 512), piece("d", "I8", (4,), 640)]
    layout = lay_out(tensors, [["a", "b"], ["c", "d"]], float_dtype="BF16")
    (a, b), (c, d) = layout.groups
    assert (a.dtype, a.num_bytes, c.num_bytes, d.dtype) == ("BF16", 128, 64, "I8")
    assert a.staged_at == c.staged_at == layout.num_bytes - 256
    assert b.staged_at is d.staged_at is None


def test_other_tensors_than_those_laid_out_are_refused():
    tensors = [piece("a", "F32", (4,), 0)]
    layout = lay_out(tensors, [["a"]])
    for wrong in ([], [piece("a", "I32", (4,), 0)], [piece("a", "F32", (3,), 0)]):
        with pytest.raises(CheckpointError, match="tensor a"):
            plan_copies(layout, wrong, 100)
    with pytest.raises(CheckpointError, match="bytes 90 to 106"):
        plan_copies(layout, [piece("a", "F32", (4,), 90)], 100)


def test_an_unknown_type_is_refused_by_name():
    with pytest.raises(UnsupportedModelError, match="tensor a has type F5"):
        lay_out([TensorSlice("a", "F5", (4,), 0, 4)], [["a"]])
