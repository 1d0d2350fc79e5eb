"""Paged attention, put under transformers' models through its attention registry.

A step computes several segments of several sequences in one packed row of tokens. Each layer
first writes the new keys and values into the pool, then lets each segment attend to its own
sequence's positions, read from there: as views where the sequence's blocks are neighbours.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
import torch.nn.functional as F  # noqa: N812
from torch import nn

from flashserve.errors import UnsupportedModelError

IMPLEMENTATION = "paged_kv"
"""Name in the attention registry of transformers, which takes any name with "flash" for its own."""

Slots: TypeAlias = "slice | torch.Tensor"
"""Places in the pool: neighbours as a slice, others as an int64 index."""


class Span:
    """One segment of a step.

    Rows [row, row + end - begin) of the packed tokens are positions [begin, end) of a sequence,
    whose keys at positions [0, end) lie in `slots` of the pool, [layers, slots, 2, kv_heads,
    head_dim].
    """

    def __init__(self, pool: torch.Tensor, row: int, begin: int, end: int, slots: Slots) -> None:
        self.rows = slice(row, row + end - begin)
        self.begin = begin
        self.end = end
        self._pool = pool
        self._slots = slots
        self._views: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self._masks: dict[int | None, torch.Tensor] = {}

    @property
    def num_rows(self) -> int:
        return self.end - self.begin

    def first_key(self, window: int | None) -> int:
        """The first position that any row sees."""
        return max(0, self.begin + 1 - window) if window else 0

    def read(self, layer: int, window: int | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of positions [first_key, end), each [1, kv_heads, keys, head_dim]."""
        first = self.first_key(window)
        if isinstance(self._slots, slice):
            if first not in self._views:
                found = self._pool[:, self._slots.start + first : self._slots.start + self.end]
                found = found.permute(0, 2, 3, 1, 4)  # [layers, 2, kv_heads, keys, head_dim]
                self._views[first] = list(
                    zip(found[:, 0:1].unbind(), found[:, 1:2].unbind(), strict=True)
                )
            return self._views[first][layer]
        found = self._pool[layer].index_select(0, self._slots[first : self.end])
        found = found.permute(1, 2, 0, 3)
        return found[0:1], found[1:2]

    def mask(self, window: int | None) -> torch.Tensor:
        """[rows, keys] booleans: causal, and at most `window` keys back."""
        if window not in self._masks:
            device = self._pool.device
            queries = torch.arange(self.begin, self.end, device=device)[:, None]
            keys = torch.arange(self.first_key(window), self.end, device=device)[None, :]
            seen = keys <= queries
            self._masks[window] = seen & (keys > queries - window) if window else seen
        return self._masks[window]


class AttentionStep:
    """What the attention of every layer needs to know about one step.

    Args:
        pool: [layers, slots, 2, kv_heads, head_dim]; keys at 0, values at 1.
        spans: they cover the packed tokens; further rows only pad the products.
        write: where the keys and values of the packed tokens go.
    """

    def __init__(self, pool: torch.Tensor, spans: list[Span], write: Slots) -> None:
        self.pool = pool
        self.spans = spans
        self.write = write
        self.num_rows = spans[-1].rows.stop if spans else 0


def write(step: AttentionStep, layer: int, kv: torch.Tensor) -> None:
    """Puts the packed tokens' keys and values, [T, 2, kv_heads, head_dim], into the pool."""
    step.pool[layer, step.write] = kv[: step.num_rows]


def attend(
    step: AttentionStep,
    layer: int,
    query: torch.Tensor,
    scaling: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention of every span of a step over what the pool holds.

    Args:
        query: [T, heads, head_dim].
        window: how many keys, its own included, a row sees at most; None for all.

    Returns:
        [T, heads, head_dim], contiguous; zero where rows only pad.
    """
    found = [
        _attend(query[span.rows], span, *span.read(layer, window), scaling, window, softcap)
        for span in step.spans
    ]
    if step.num_rows < len(query):
        found.append(torch.zeros_like(query[step.num_rows :]))
    return found[0] if len(found) == 1 else torch.cat(found)


def _attend(
    query: torch.Tensor,
    span: Span,
    keys: torch.Tensor,
    values: torch.Tensor,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Attention of one span. query: [rows, heads, head_dim]; returns the same shape."""
    num_rows, heads, head_dim = query.shape
    kv_heads = keys.shape[1]
    if softcap is not None:
        return _soft_capped(query, keys[0], values[0], span.mask(window), scaling, softcap)
    if num_rows == 1:
        # The query heads of a group are rows of one product with the keys that they share.
        grouped = query.reshape(1, kv_heads, heads // kv_heads, head_dim)
        found = F.scaled_dot_product_attention(grouped, keys, values, scale=scaling)
        return found.reshape(1, heads, head_dim)
    is_plain = span.begin == 0 and (window is None or num_rows <= window)
    found = F.scaled_dot_product_attention(
        query.transpose(0, 1)[None],
        keys,
        values,
        attn_mask=None if is_plain else span.mask(window),
        is_causal=is_plain,
        scale=scaling,
        enable_gqa=heads != kv_heads,
    )
    return found[0].transpose(0, 1)


def _soft_capped(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float,
    softcap: float,
) -> torch.Tensor:
    """Attention whose scores pass through softcap * tanh(score / softcap), as in Gemma 2."""
    num_groups = query.shape[1] // keys.shape[0]
    keys = keys.repeat_interleave(num_groups, dim=0)
    values = values.repeat_interleave(num_groups, dim=0)
    scores = torch.matmul(query.transpose(0, 1), keys.transpose(1, 2)) * scaling
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, values).transpose(0, 1)


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
    """Attention of one layer, as transformers' attention modules call it.

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
    write(flashserve_step, module.layer_idx, torch.stack((key[0], value[0])).permute(2, 0, 1, 3))
    attended = attend(
        flashserve_step,
        module.layer_idx,
        query[0].transpose(0, 1),
        scaling,
        sliding_window,
        softcap,
    )
    return attended[None], None


def register() -> None:
    """Makes `paged_attention` known to transformers under IMPLEMENTATION."""
    from transformers import AttentionInterface

    AttentionInterface.register(IMPLEMENTATION, paged_attention)
