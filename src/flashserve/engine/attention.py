"""Paged attention, put under transformers' models through its attention registry.

A step computes several segments of several sequences in one packed row of tokens, [1, T]. Each
layer first writes the new keys and values into the pool, then lets each segment attend to its own
sequence's positions, read from there.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from flashserve.errors import UnsupportedModelError

IMPLEMENTATION = "paged_kv"
"""Name in the attention registry of transformers, which takes any name with "flash" for its own."""

Slots: TypeAlias = "slice | torch.Tensor"
"""Places in the pool: neighbours as a slice, others as an int64 index."""


@dataclasses.dataclass(slots=True)
class Span:
    """One segment of a step.

    rows [row, row + end - begin) of the packed tokens are positions [begin, end) of a sequence,
    whose keys at positions [0, end) lie in `slots` of the pool.
    """

    row: int
    begin: int
    end: int
    slots: Slots


@dataclasses.dataclass(slots=True)
class AttentionStep:
    """What the attention of every layer needs to know about one step.

    kv: one tensor for each layer, [slots, 2, kv_heads, head_dim]; keys at 0, values at 1.
    num_rows: packed tokens that are real; rows after them only pad the products.
    write: where the keys and values of the real ones go.
    """

    kv: list[torch.Tensor]
    num_rows: int
    write: Slots
    spans: list[Span]
    masks: dict[tuple[int, int, int, int], torch.Tensor] = dataclasses.field(default_factory=dict)

    def mask(self, span: Span, first_key: int, window: int | None) -> torch.Tensor:
        """[queries, keys] booleans of a span: causal, at most `window` keys back."""
        key = (span.begin, span.end, first_key, window or 0)
        if key not in self.masks:
            queries = torch.arange(span.begin, span.end)[:, None]
            keys = torch.arange(first_key, span.end)[None, :]
            seen = keys <= queries
            self.masks[key] = seen & (keys > queries - window) if window else seen
        return self.masks[key]


def paged_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,  # noqa: ARG001 - the registry's signature
    *,
    scaling: float,
    flashserve_step: AttentionStep,
    sliding_window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,  # noqa: ARG001 - 0 outside training
    position_ids: torch.Tensor | None = None,  # noqa: ARG001 - the step has them
    use_cache: bool | None = None,  # noqa: ARG001 - the pool is the cache
    output_router_logits: bool | None = None,  # noqa: ARG001 - of the layer's experts
    **unknown: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of one layer over the pool.

    Args:
        query: [1, heads, T, head_dim].
        key, value: [1, kv_heads, T, head_dim].

    Returns:
        [1, T, heads, head_dim], and no weights.

    Raises:
        UnsupportedModelError: the model passes an argument that this function does not know, such
            as attention sinks, and whose meaning it would therefore ignore.
    """
    if unknown:
        raise UnsupportedModelError(
            f"{type(module).__name__} passes {', '.join(sorted(unknown))} to its attention, "
            "which is not supported"
        )
    if query.is_meta:
        return torch.empty_like(query.transpose(1, 2)), None
    kv = flashserve_step.kv[module.layer_idx]
    num_rows = flashserve_step.num_rows
    kv[flashserve_step.write, 0] = key[0, :, :num_rows].transpose(0, 1)
    kv[flashserve_step.write, 1] = value[0, :, :num_rows].transpose(0, 1)
    output = torch.zeros_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
    for span in flashserve_step.spans:
        rows = slice(span.row, span.row + span.end - span.begin)
        attended = _attend(
            query[:, :, rows], kv, span, flashserve_step, scaling, sliding_window, softcap
        )
        output[:, rows] = attended.transpose(1, 2)
    return output, None


def _attend(
    query: torch.Tensor,
    kv: torch.Tensor,
    span: Span,
    step: AttentionStep,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of one segment. query: [1, heads, n, head_dim]; returns the same shape."""
    first_key = max(0, span.begin + 1 - window) if window else 0
    keys, values = _read(kv, span, first_key)
    num_rows = span.end - span.begin
    if softcap is not None:
        mask = step.mask(span, first_key, window)
        return _soft_capped(query, keys, values, mask, scaling, softcap)
    heads, kv_heads = query.shape[1], keys.shape[1]
    if num_rows == 1:
        # The query heads of a group are rows of one product with the keys that they share.
        grouped = query.reshape(1, kv_heads, heads // kv_heads, -1)
        return F.scaled_dot_product_attention(grouped, keys, values, scale=scaling).reshape(
            query.shape
        )
    is_plain = span.begin == 0 and (window is None or num_rows <= window)
    return F.scaled_dot_product_attention(
        query,
        keys,
        values,
        attn_mask=None if is_plain else step.mask(span, first_key, window),
        is_causal=is_plain,
        scale=scaling,
        enable_gqa=heads != kv_heads,
    )


def _read(kv: torch.Tensor, span: Span, first_key: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of positions [first_key, end), each [1, kv_heads, positions, head_dim]."""
    if isinstance(span.slots, slice):
        found = kv[span.slots.start + first_key : span.slots.stop]
    else:
        found = kv.index_select(0, span.slots[first_key:])
    found = found.permute(1, 2, 0, 3)
    return found[0:1], found[1:2]


def _soft_capped(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    """Attention whose scores pass through softcap * tanh(score / softcap), as in Gemma 2."""
    num_groups = query.shape[1] // keys.shape[1]
    keys = keys.repeat_interleave(num_groups, dim=1)
    values = values.repeat_interleave(num_groups, dim=1)
    scores = torch.matmul(query, keys.transpose(2, 3)) * scaling
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, values)


def register() -> None:
    """Makes `paged_attention` known to transformers under IMPLEMENTATION."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, paged_attention)
