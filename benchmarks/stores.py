"""A store as a node has one, quiet while it is measured."""

from __future__ import annotations

import pathlib
import time

from flashserve.config import StoreSettings
from flashserve.store.store import Store


def open_store(data_dir: pathlib.Path, arena_bytes: int, *, prefault: bool) -> Store:
    """Without the scrub; returns when the arena is in memory, if it is to be.

    Raises:
        RuntimeError: the kernel would not fault it ahead.
    """
    settings = StoreSettings(scrub_bytes_per_s=0)
    store = Store(data_dir, arena_bytes, prefault, settings)
    while prefault and store.arena.prefaulted_bytes < store.arena.num_bytes:
        if store.arena.prefault_refusal:
            raise RuntimeError(store.arena.prefault_refusal)
        time.sleep(0.01)
    return store
