"""The adapters of an engine: what it knows of them, and each step's share of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from flashserve.config import EngineSettings
from flashserve.engine.lora.batch import Composer, LoraStep, Owned
from flashserve.engine.lora.cache import AdapterCache
from flashserve.engine.lora.memory import AdapterMemory, Reader
from flashserve.engine.lora.targets import Group, Targets
from flashserve.engine.sequence import Segment

AdaptForward = Callable[[Targets], Sequence[Group]]


class Adapters:
    """Joins the cache of adapters with the forward that they change.

    Args:
        model: its weights need not be there yet.
        read: gives the tensors of images.
        adapt: prepares the forward for updates, once, before the first of them; returns the
            groups of layers that it asks updates for.
        min_rows: see Composer.
    """

    def __init__(
        self,
        model: Any,
        settings: EngineSettings,
        read: Reader,
        adapt: AdaptForward,
        *,
        min_rows: int = 1,
    ) -> None:
        self._targets = Targets(model)
        self._weight: torch.Tensor = next(model.parameters())
        self._num_bytes = settings.adapter_bytes
        self._read = read
        self._adapt = adapt
        self._min_rows = min_rows
        self._composer: Composer | None = None
        self.cache = AdapterCache(self._targets, self._make_memory, settings.max_lora_rank)

    def arrange(self, segments: list[Segment]) -> tuple[list[Segment], LoraStep | None]:
        """The segments in the order in which they are computed, and their adapters' updates.

        The adapters are pinned.
        """
        if all(segment.sequence.adapter_id is None for segment in segments):
            if self._composer is not None:
                self._composer.rest()
            return segments, None
        composer = self._composer = self._composer or self._make_composer()
        order = composer.order([self._owned(segment) for segment in segments])
        segments = [segments[index] for index in order]
        parts = [self._owned(segment) for segment in segments]
        sampled = [
            (placed, 1)
            for (placed, _), segment in zip(parts, segments, strict=True)
            if segment.samples
        ]
        return segments, composer.compose(parts, sampled)

    def _owned(self, segment: Segment) -> Owned:
        adapter_id = segment.sequence.adapter_id
        placed = None if adapter_id is None else self.cache.placed(adapter_id)
        return placed, segment.end - segment.begin

    def _make_memory(self) -> AdapterMemory:
        return AdapterMemory(
            self._targets, self._num_bytes, self._weight.dtype, self._weight.device, self._read
        )

    def _make_composer(self) -> Composer:
        assert self.cache.memory is not None
        return Composer(
            self.cache.memory,
            self._adapt(self._targets),
            self._targets.embedding,
            self._targets.head,
            min_rows=self._min_rows,
            table_bytes=self._num_bytes // 2,
        )
