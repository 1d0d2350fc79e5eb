"""Threads that read models while others evict them: no byte changes under a lease."""

from __future__ import annotations

import contextlib
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import xxhash
from tests.unit.store.conftest import write_checkpoint

from flashserve.errors import ConflictError, UnavailableError
from flashserve.store.dram.arena import EXTENT_ALIGNMENT
from flashserve.store.store import Lease, Store
from flashserve.types import ModelId, ModelSpec, Tier

pytestmark = pytest.mark.integration

NUM_MODELS = 5
NUM_EXTENTS = 3
NUM_READERS = 3
READS_OF_EACH = 25


def write_models(root: Path) -> dict[ModelId, tuple[ModelSpec, int]]:
    """Each takes one extent; by name with the sum of its one tensor."""
    found = {}
    for number in range(NUM_MODELS):
        data = np.random.default_rng(number).integers(0, 256, EXTENT_ALIGNMENT - 4096, np.uint8)
        path = write_checkpoint(root / str(number), {"model.safetensors": {"weight": data}})
        model_id = ModelId(f"m{number}")
        found[model_id] = ModelSpec(model_id, str(path), 0), xxhash.xxh3_64_intdigest(data)
    return found


def sum_of(store: Store, lease: Lease) -> int:
    (tensor,) = lease.tensors
    with memoryview(store.arena._map) as arena:
        return xxhash.xxh3_64_intdigest(arena[tensor.offset : tensor.offset + tensor.num_bytes])


def test_leased_bytes_stay_while_other_threads_evict_and_read(tmp_path: Path) -> None:
    models = write_models(tmp_path)
    store = Store(tmp_path / "data", NUM_EXTENTS * EXTENT_ALIGNMENT, prefault=False)
    has_ended = threading.Event()

    def read(seed: int) -> None:
        draw, left = random.Random(seed), READS_OF_EACH
        while left:
            spec, wanted = models[draw.choice(list(models))]
            with contextlib.suppress(UnavailableError), store.hold(spec) as lease:
                lease.arrival.wait()
                assert [sum_of(store, lease) for _ in range(3)] == [wanted] * 3
                left -= 1

    def evict() -> None:
        draw = random.Random(NUM_READERS)
        while not has_ended.is_set():
            with contextlib.suppress(ConflictError):  # somebody reads it
                store.evict(draw.choice(list(models)), Tier.DRAM)
            usage = store.usage()
            assert usage.used + usage.free == usage.total

    try:
        with ThreadPoolExecutor(NUM_READERS + 1) as pool:
            evicting = pool.submit(evict)
            reading = [pool.submit(read, seed) for seed in range(NUM_READERS)]
            try:
                for reader in reading:
                    reader.result()
            finally:
                has_ended.set()
            evicting.result()
        for model_id in models:
            store.evict(model_id, Tier.DRAM)
        assert store.usage().used == 0
    finally:
        store.close()
