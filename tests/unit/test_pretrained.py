"""Views of a mapped checkpoint as tensors."""

import mmap

import pytest
import torch

from flashserve.errors import CheckpointError, UnsupportedModelError
from flashserve.pretrained import as_tensor
from flashserve.types import TensorSlice


@pytest.fixture
def memory():
    mapping = mmap.mmap(-1, 4096)
    mapping[:8] = torch.tensor([1.0, 2.0]).numpy().tobytes()
    mapping[9:17] = torch.tensor([3.0, 4.0]).numpy().tobytes()
    return mapping


def test_an_aligned_tensor_is_a_view_with_a_storage_of_its_own(memory):
    tensor = as_tensor(TensorSlice("t", "F32", (1, 2), 0, 8), memory)
    assert tensor.tolist() == [[1.0, 2.0]]
    assert tensor.untyped_storage().nbytes() == 8
    tensor.zero_()
    assert memory[:8] == bytes(8)


def test_a_tensor_that_is_not_aligned_is_a_copy(memory):
    tensor = as_tensor(TensorSlice("t", "F32", (2,), 9, 8), memory)
    assert tensor.tolist() == [3.0, 4.0]
    tensor.zero_()
    assert memory[9:17] != bytes(8)


def test_a_tensor_without_elements_needs_no_place(memory):
    assert as_tensor(TensorSlice("t", "BF16", (0, 3), 4096, 0), memory).shape == (0, 3)


@pytest.mark.parametrize(("offset", "num_bytes"), [(-8, 8), (4092, 8), (0, 12)])
def test_a_tensor_outside_the_memory_or_of_another_size_is_refused(memory, offset, num_bytes):
    with pytest.raises(CheckpointError, match="'t' does not lie"):
        as_tensor(TensorSlice("t", "F32", (2,), offset, num_bytes), memory)


def test_a_type_that_torch_lacks_is_refused_by_name(memory):
    with pytest.raises(UnsupportedModelError, match="F6_E2M3"):
        as_tensor(TensorSlice("t", "F6_E2M3", (4,), 0, 3), memory)
