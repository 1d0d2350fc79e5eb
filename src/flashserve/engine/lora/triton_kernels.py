"""Segmented products with paged adapters on CUDA: shrink (x A^T) and expand (y B^T, added).

batch.py chooses them where the adapters' memory lies on a CUDA device. They have been compared with
the reference through Triton's interpreter only: no CUDA machine has run them yet.

Rows of a batch are sorted by slot, and slot i owns rows [seg[i], seg[i + 1]). The launch grid
depends on the largest batch and the number of slots alone, and all else is read from tensors of
fixed addresses, so that a captured graph serves every composition: a program whose tile lies
outside of its slot's rows ends at once. One shape of tile serves prefill and decode.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flashserve.engine.lora.segments import Segments

_ROWS = 16  # tl.dot takes no fewer
_FEATURES = 64
_RANKS = 16


def add_segments(
    table: torch.Tensor, segments: Segments, x: torch.Tensor, out: torch.Tensor
) -> None:
    """Adds every adapter's update to `out`, [T, out_features], in place.

    Args:
        table: one layer's memory, flat.
        x: [T, in_features]. As those of `out`, the elements of a row are neighbours.
    """
    num_rows, in_features = x.shape
    num_slots, max_rank = segments.b_offsets.shape
    rank_tiles = triton.cdiv(max_rank, _RANKS)
    products = torch.zeros(num_rows, rank_tiles * _RANKS, dtype=torch.float32, device=x.device)
    tiles = triton.cdiv(num_rows, _ROWS)
    _shrink[tiles, num_slots, rank_tiles](
        x,
        x.stride(0),
        table,
        segments.seg,
        segments.ranks,
        segments.a_offsets,
        products,
        products.stride(0),
        max_rank,
        in_features,
        ROWS=_ROWS,
        FEATURES=_FEATURES,
        RANKS=_RANKS,
    )
    _expand[tiles, num_slots, triton.cdiv(out.shape[1], _FEATURES)](
        products,
        products.stride(0),
        table,
        segments.seg,
        segments.ranks,
        segments.b_offsets,
        segments.scales,
        out,
        out.stride(0),
        max_rank,
        out.shape[1],
        ROWS=_ROWS,
        FEATURES=_FEATURES,
        RANKS=_RANKS,
    )


@triton.jit
def _shrink(  # type: ignore[no-untyped-def] # noqa: ANN202
    x,  # noqa: ANN001
    x_stride,  # noqa: ANN001
    table,  # noqa: ANN001
    seg,  # noqa: ANN001
    ranks,  # noqa: ANN001
    a_offsets,  # noqa: ANN001
    products,  # noqa: ANN001
    products_stride,  # noqa: ANN001
    max_rank: tl.constexpr,
    in_features: tl.constexpr,
    ROWS: tl.constexpr,  # noqa: N803
    FEATURES: tl.constexpr,  # noqa: N803
    RANKS: tl.constexpr,  # noqa: N803
):
    slot = tl.program_id(1)
    begin = tl.load(seg + slot) + tl.program_id(0) * ROWS
    end = tl.load(seg + slot + 1)
    rank = tl.load(ranks + slot)
    first = tl.program_id(2) * RANKS
    if (begin < end) & (first < rank):
        rows = begin + tl.arange(0, ROWS)
        columns = first + tl.arange(0, RANKS)
        offsets = tl.load(a_offsets + slot * max_rank + columns, mask=columns < rank, other=0)
        total = tl.zeros((ROWS, RANKS), dtype=tl.float32)
        for start in range(0, in_features, FEATURES):
            features = start + tl.arange(0, FEATURES)
            there = features < in_features
            left = tl.load(
                x + rows[:, None] * x_stride + features[None, :],
                mask=(rows[:, None] < end) & there[None, :],
                other=0.0,
            )
            right = tl.load(
                table + offsets[None, :] + features[:, None],
                mask=there[:, None] & (columns[None, :] < rank),
                other=0.0,
            )
            total += tl.dot(left, right, input_precision="ieee")
        tl.store(
            products + rows[:, None] * products_stride + columns[None, :],
            total,
            mask=rows[:, None] < end,
        )


@triton.jit
def _expand(  # type: ignore[no-untyped-def] # noqa: ANN202
    products,  # noqa: ANN001
    products_stride,  # noqa: ANN001
    table,  # noqa: ANN001
    seg,  # noqa: ANN001
    ranks,  # noqa: ANN001
    b_offsets,  # noqa: ANN001
    scales,  # noqa: ANN001
    out,  # noqa: ANN001
    out_stride,  # noqa: ANN001
    max_rank: tl.constexpr,
    out_features: tl.constexpr,
    ROWS: tl.constexpr,  # noqa: N803
    FEATURES: tl.constexpr,  # noqa: N803
    RANKS: tl.constexpr,  # noqa: N803
):
    slot = tl.program_id(1)
    begin = tl.load(seg + slot) + tl.program_id(0) * ROWS
    end = tl.load(seg + slot + 1)
    rank = tl.load(ranks + slot)
    if (begin < end) & (rank > 0):
        rows = begin + tl.arange(0, ROWS)
        features = tl.program_id(2) * FEATURES + tl.arange(0, FEATURES)
        total = tl.zeros((ROWS, FEATURES), dtype=tl.float32)
        for first in range(0, max_rank, RANKS):
            columns = first + tl.arange(0, RANKS)
            there = columns < rank
            left = tl.load(
                products + rows[:, None] * products_stride + columns[None, :],
                mask=(rows[:, None] < end) & there[None, :],
                other=0.0,
            )
            offsets = tl.load(b_offsets + slot * max_rank + columns, mask=there, other=0)
            right = tl.load(
                table + offsets[:, None] + features[None, :],
                mask=there[:, None] & (features[None, :] < out_features),
                other=0.0,
            )
            total += tl.dot(left.to(right.dtype), right, input_precision="ieee")
        places = out + rows[:, None] * out_stride + features[None, :]
        inside = (rows[:, None] < end) & (features[None, :] < out_features)
        before = tl.load(places, mask=inside, other=0.0).to(tl.float32)
        added = before + total * tl.load(scales + slot)
        tl.store(places, added.to(out.dtype.element_ty), mask=inside)
