"""Brings what the store tells from its threads to the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from flashserve.types import ModelId


class StoreNews:
    """A store.store.StoreListener whose news arrive on the loop that made it.

    Args:
        damaged: some models, and what is wrong with their bytes in DRAM.
        on_disk: a model has come to disk: its id, bytes, seconds.
        left_disk: a model is no longer on disk.
    """

    def __init__(
        self,
        damaged: Callable[[tuple[ModelId, ...], str], None],
        on_disk: Callable[[ModelId, int, float], None],
        left_disk: Callable[[ModelId], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._damaged = damaged
        self._on_disk = on_disk
        self._left_disk = left_disk

    def damaged(self, model_ids: tuple[ModelId, ...], message: str) -> None:
        self._loop.call_soon_threadsafe(self._damaged, model_ids, message)

    def on_disk(self, model_id: ModelId, num_bytes: int, seconds: float) -> None:
        self._loop.call_soon_threadsafe(self._on_disk, model_id, num_bytes, seconds)

    def left_disk(self, model_id: ModelId) -> None:
        self._loop.call_soon_threadsafe(self._left_disk, model_id)
