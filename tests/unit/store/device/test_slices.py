import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashserve.errors import UnsupportedModelError
from flashserve.store.device.slices import Part, cut, rank_part, whole
from flashserve.types import TensorSlice

PLAN = {"model.layers.*.up": "colwise", "model.layers.*.down": "rowwise", "head": "gather"}


def slice_of(name: str, tensor: torch.Tensor) -> TensorSlice:
    return TensorSlice(name, "I32", tuple(tensor.shape), 0, tensor.nbytes)


def taken(tensor: torch.Tensor, part: Part) -> torch.Tensor:
    """The part's bytes, gathered as a copy would."""
    data = tensor.numpy().tobytes()
    rows = [
        data[part.offset + row * part.pitch_bytes :][: part.row_bytes]
        for row in range(part.num_rows)
    ]
    assert all(len(row) == part.row_bytes for row in rows)
    if not part.num_bytes:
        return torch.empty(part.shape, dtype=tensor.dtype)
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=tensor.dtype).view(part.shape)


@settings(deadline=None)
@given(st.data())
def test_a_cut_is_what_torch_slices(data):
    shape = data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4))
    dim = data.draw(st.integers(0, len(shape) - 1))
    begin = data.draw(st.integers(0, shape[dim]))
    end = data.draw(st.integers(begin, shape[dim]))
    tensor = torch.arange(torch.Size(shape).numel(), dtype=torch.int32).view(shape)
    part = cut(slice_of("t", tensor), dim, begin, end)
    assert torch.equal(taken(tensor, part), tensor.narrow(dim, begin, end - begin))


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.sampled_from(["up", "down"]))
def test_the_ranks_together_hold_everything_once(num_ranks, rows, columns, name):
    tensor = torch.arange(num_ranks**2 * rows * columns, dtype=torch.int32)
    tensor = tensor.view(num_ranks * rows, num_ranks * columns)
    piece = slice_of(f"model.layers.3.{name}.weight", tensor)
    parts = [taken(tensor, rank_part(piece, PLAN, rank, num_ranks)) for rank in range(num_ranks)]
    assert torch.equal(torch.cat(parts, dim=0 if name == "up" else 1), tensor)


def test_shards_of_rows_are_one_run_and_shards_of_columns_are_not():
    tensor = torch.zeros(8, 6, dtype=torch.int32)
    up = rank_part(slice_of("model.layers.0.up.weight", tensor), PLAN, 1, 2)
    down = rank_part(slice_of("model.layers.0.down.weight", tensor), PLAN, 1, 2)
    assert up == Part((4, 6), 96, 96)
    assert down == Part((8, 3), 12, 12, num_rows=8, pitch_bytes=24)


def test_what_no_pattern_names_and_the_bias_of_columns_stay_whole():
    bias = slice_of("model.layers.0.down.bias", torch.zeros(7, dtype=torch.int32))
    norm = slice_of("model.norm.weight", torch.zeros(7, dtype=torch.int32))
    assert rank_part(bias, PLAN, 1, 2) == whole(bias)
    assert rank_part(norm, PLAN, 1, 2) == whole(norm)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("model.layers.0.up.weight", (3, 4), "evenly to 2 ranks"),
        ("model.layers.0.down.weight", (4,), "evenly to 2 ranks"),
        ("head.weight", (4, 4), "unknown parallel style gather"),
    ],
)
def test_what_cannot_be_shared_out_is_refused_by_name(name, shape, message):
    piece = slice_of(name, torch.zeros(shape, dtype=torch.int32))
    with pytest.raises(UnsupportedModelError, match=message) as error:
        rank_part(piece, PLAN, 0, 2)
    assert name in error.value.message


def test_elements_of_half_a_byte_are_not_cut():
    with pytest.raises(UnsupportedModelError, match="whole bytes"):
        cut(TensorSlice("t", "F4", (2, 4), 0, 4), 0, 0, 1)
