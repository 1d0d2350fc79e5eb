"""Runs the segments of a step through the model in one packed forward."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Items
from typing import Any

import torch
from torch import nn

from flashserve.engine.attention import AttentionStep, Slots, Span
from flashserve.engine.experts import Experts
from flashserve.engine.forward import choose_forward
from flashserve.engine.gates import Gates
from flashserve.engine.lora.batch import LoraStep
from flashserve.engine.lora.targets import Group, Targets
from flashserve.engine.sequence import Segment, Sequence
from flashserve.errors import UnavailableError

# With fewer rows, bf16 products take another path, whose results differ in the last bit.
_INVARIANT_ROWS = 4
_CPU = torch.device("cpu")


@dataclasses.dataclass(frozen=True, slots=True)
class KVShape:
    """What the keys and values of one token look like."""

    num_layers: int
    num_heads: int
    head_dim: int
    dtype: torch.dtype

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype) -> KVShape:
        """Args: config: the transformers configuration of a served model."""
        head_dim = getattr(config, "head_dim", None)
        return cls(
            num_layers=config.num_hidden_layers,
            num_heads=config.num_key_value_heads,
            head_dim=head_dim or config.hidden_size // config.num_attention_heads,
            dtype=dtype,
        )

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.num_layers * self.num_heads * self.head_dim * int(self.dtype.itemsize)

    def view(self, pool: torch.Tensor, num_slots: int) -> torch.Tensor:
        """The flat uint8 `pool` as [layers, num_slots, 2, heads, head_dim]."""
        used = pool[: num_slots * self.bytes_per_token].view(self.dtype)
        return used.view(self.num_layers, num_slots, 2, self.num_heads, self.head_dim)


class Runner:
    """A model and the pool that its keys and values live in.

    Args:
        model: a causal language model of transformers whose attention is `paged_attention`.
        pool: keys and values, [layers, slots, 2, kv_heads, head_dim], on the model's device.
        block_tokens: slots of one block.
        batch_invariant: compute at least _INVARIANT_ROWS rows at a time.
        gates: where a forward waits for weights that are still to come; None: all are there.
    """

    def __init__(
        self,
        model: nn.Module,
        pool: torch.Tensor,
        block_tokens: int,
        *,
        batch_invariant: bool = False,
        gates: Gates | None = None,
    ) -> None:
        self._forward = choose_forward(model, gates)
        self._pool = pool
        self._device = pool.device
        self._block_tokens = block_tokens
        self._min_rows = _INVARIANT_ROWS if batch_invariant else 1
        for module in model.modules():
            if isinstance(module, Experts):
                module.min_rows = self._min_rows

    @property
    def min_rows(self) -> int:
        """Rows that are computed at least."""
        return self._min_rows

    def adapt(self, targets: Targets) -> Items[Group]:
        """Prepares the model for updates by adapters; returns the groups that they come in."""
        return self._forward.adapt(targets)

    def close(self) -> None:
        """Leaves the model as it was before. Once; nothing is run after it."""
        self._forward.close()

    @torch.inference_mode()
    def run(self, segments: list[Segment], lora: LoraStep | None = None) -> torch.Tensor:
        """Computes the segments; returns the logits of those that sample, [rows, vocabulary].

        Args:
            lora: the updates of the segments' adapters.
        """
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        for segment in segments:
            ids += segment.sequence.tokens[segment.begin : segment.end]
            positions += range(segment.begin, segment.end)
            if segment.samples:
                rows.append(len(ids) - 1)
        step = self._attention_step(segments)
        num_sampled = len(rows)
        padding = max(0, self._min_rows - len(ids))
        rows += [rows[-1]] * max(0, self._min_rows - num_sampled) if rows else []
        device = self._device
        logits = self._forward(
            torch.tensor(ids + ids[-1:] * padding, device=device),
            torch.tensor(positions + positions[-1:] * padding, device=device),
            torch.tensor(rows, dtype=torch.int64, device=device),
            step,
            lora,
        )
        return logits[:num_sampled]

    def _attention_step(self, segments: list[Segment]) -> AttentionStep:
        slots = {item: self._slots(item) for item in {s.sequence: None for s in segments}}
        spans: list[Span] = []
        writes: list[Slots] = []
        row = 0
        for segment in segments:
            found = slots[segment.sequence]
            spans.append(Span(self._pool, row, segment.begin, segment.end, found))
            writes.append(_part(found, segment.begin, segment.end))
            row += segment.end - segment.begin
        if len(writes) == 1:
            return AttentionStep(self._pool, spans, writes[0])
        write = torch.cat([_index(part, self._device) for part in writes])
        return AttentionStep(self._pool, spans, write)

    def _slots(self, sequence: Sequence) -> Slots:
        """Where the keys of each position are: a slice if the blocks are neighbours."""
        first, size = sequence.blocks[0], self._block_tokens
        num_blocks = len(sequence.blocks)
        if sequence.blocks == list(range(first, first + num_blocks)):
            return slice(first * size, (first + num_blocks) * size)
        blocks = torch.tensor(sequence.blocks, device=self._device)[:, None]
        return (blocks * size + torch.arange(size, device=self._device)).flatten()


def _part(slots: Slots, begin: int, end: int) -> Slots:
    if isinstance(slots, slice):
        return slice(slots.start + begin, slots.start + end)
    return slots[begin:end]


def _index(slots: Slots, device: torch.device) -> torch.Tensor:
    if isinstance(slots, slice):
        return torch.arange(slots.start, slots.stop, device=device)
    return slots


def allocate_pool(num_bytes: int, device: torch.device = _CPU) -> torch.Tensor:
    """A flat uint8 pool whose memory is taken now, not at first use.

    Raises:
        UnavailableError: the machine, or the device, does not have it.
    """
    try:
        return torch.zeros(num_bytes, dtype=torch.uint8, device=device).fill_(0)
    except RuntimeError as error:
        raise UnavailableError(
            f"no memory on {device} for a KV pool of {num_bytes} bytes; lower engine.kv_bytes"
        ) from error
