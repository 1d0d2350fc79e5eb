"""Tensor-parallel parts: which bytes of a tensor one rank needs. Pure arithmetic, no tensors."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping

from flashserve.errors import UnsupportedModelError
from flashserve.types import TensorSlice


@dataclasses.dataclass(frozen=True, slots=True)
class Part:
    """A part of a tensor: `num_rows` runs of `row_bytes`, run i at offset + i * pitch_bytes.

    shape is the part's own; offset counts from the tensor's first byte. One run is contiguous.
    """

    shape: tuple[int, ...]
    offset: int
    row_bytes: int
    num_rows: int = 1
    pitch_bytes: int = 0

    @property
    def num_bytes(self) -> int:
        return self.row_bytes * self.num_rows


def whole(tensor: TensorSlice) -> Part:
    return Part(tensor.shape, 0, tensor.num_bytes)


def cut(tensor: TensorSlice, dim: int, begin: int, end: int) -> Part:
    """The bytes of tensor[..., begin:end, ...] along `dim`.

    Contiguous along the first dimension of more than one element, else strided.

    Raises:
        UnsupportedModelError: the tensor has no such range, or elements smaller than a byte.
    """
    shape = tensor.shape
    if not 0 <= dim < len(shape) or not 0 <= begin <= end <= shape[dim]:
        raise UnsupportedModelError(
            f"tensor {tensor.name} of shape {list(shape)} has no range {begin} to {end} along "
            f"dimension {dim}"
        )
    count = math.prod(shape)
    if count and tensor.num_bytes % count:
        raise UnsupportedModelError(
            f"tensor {tensor.name} of type {tensor.dtype} cannot be cut: its elements are not "
            "whole bytes"
        )
    part_shape = (*shape[:dim], end - begin, *shape[dim + 1 :])
    if not math.prod(part_shape):
        return Part(part_shape, 0, 0)
    inner = math.prod(shape[dim + 1 :]) * (tensor.num_bytes // count)
    outer = math.prod(shape[:dim])
    row_bytes, pitch_bytes = (end - begin) * inner, shape[dim] * inner
    if outer == 1 or row_bytes == pitch_bytes:
        return Part(part_shape, begin * inner, row_bytes * outer)
    return Part(part_shape, begin * inner, row_bytes, outer, pitch_bytes)


def rank_part(tensor: TensorSlice, plan: Mapping[str, str], rank: int, num_ranks: int) -> Part:
    """What rank `rank` of `num_ranks` needs of a tensor.

    Args:
        plan: module name patterns (`model.layers.*.self_attn.q_proj`) to transformers' styles:
            colwise shares out the rows of weight and bias, rowwise the columns of the weight. A
            tensor of no pattern is needed whole, and so is the bias of a rowwise module.

    Raises:
        UnsupportedModelError: the ranks cannot share it out evenly, or the style is not known.
    """
    module, _, leaf = tensor.name.rpartition(".")
    style = next((plan[key] for key in plan if _matches(key, module)), None)
    if style is None or (style == "rowwise" and leaf == "bias"):
        return whole(tensor)
    if style not in {"colwise", "rowwise"}:
        raise UnsupportedModelError(f"tensor {tensor.name} has the unknown parallel style {style}")
    dim = 0 if style == "colwise" else 1
    length = tensor.shape[dim] if dim < len(tensor.shape) else 0
    if not length or length % num_ranks:
        raise UnsupportedModelError(
            f"tensor {tensor.name} of shape {list(tensor.shape)} cannot be shared out evenly to "
            f"{num_ranks} ranks along dimension {dim}"
        )
    share = length // num_ranks
    return cut(tensor, dim, rank * share, (rank + 1) * share)


def _matches(pattern: str, module: str) -> bool:
    """A star stands for the number of a layer or an expert."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"\d+"), module) is not None
