"""Damage in a real arena is found by the scrub and by a late digest, and the memory is reusable."""

import contextlib
import hashlib
import itertools
import queue
from collections.abc import Iterator

import numpy as np
import pytest
import xxhash

from flashserve.store.digest import Digester
from flashserve.store.dram.arena import Arena, Extent
from flashserve.store.scrub import Scrubber, ScrubPiece

pytestmark = pytest.mark.integration

NUM_BYTES = 5 << 20
DATA = np.random.default_rng(0).bytes(NUM_BYTES)
CHECKSUM = xxhash.xxh3_64_intdigest(DATA)


@pytest.fixture
def arena() -> Iterator[Arena]:
    arena = Arena(64 << 20)
    yield arena
    arena.close()


@pytest.fixture
def extents(arena) -> list[Extent]:
    extents = [arena.allocate(NUM_BYTES) for _ in range(3)]
    for extent in extents:
        with arena.memory(extent) as memory:
            memory[:NUM_BYTES] = DATA
        arena.seal(extent)
    return extents


@contextlib.contextmanager
def leased(arena: Arena, extent: Extent) -> Iterator[memoryview]:
    arena.lease(extent)
    try:
        with arena.memory(extent) as memory, memory[:NUM_BYTES] as data:
            yield data
    finally:
        arena.release(extent)


def flip_a_bit(arena: Arena, extent: Extent) -> None:
    with arena.memory(extent) as memory:
        memory[NUM_BYTES // 2] ^= 4


def test_a_bit_that_flips_is_found_while_others_stay(arena, extents):
    """Two rounds pass before the bit flips; the extent is freed as soon as it is found damaged."""
    live = list(extents)
    found: queue.Queue[Extent] = queue.Queue()
    turns = itertools.count()

    def next_piece() -> ScrubPiece[Extent] | None:
        turn = next(turns)
        if turn == 2 * len(extents):
            flip_a_bit(arena, extents[1])
        extent = live[turn % len(live)]
        return ScrubPiece(leased(arena, extent), CHECKSUM, extent)

    def damaged(extent: Extent) -> None:
        live.remove(extent)
        arena.free(extent)
        found.put(extent)

    scrubber = Scrubber(next_piece, 1 << 40, damaged)
    scrubber.start()
    try:
        assert found.get(timeout=60) is extents[1]
    finally:
        scrubber.stop()
    assert found.empty()
    assert live == [extents[0], extents[2]]
    assert all(extent.num_leases == 0 for extent in live)
    assert arena.usage().used == sum(extent.num_bytes for extent in live)


def test_a_late_digest_names_what_was_promised(arena, extents):
    promised = [("sha256", hashlib.sha256(DATA).hexdigest())]
    flip_a_bit(arena, extents[1])
    results: queue.Queue[tuple[str, str | None]] = queue.Queue()
    digester = Digester()
    try:
        for extent in extents:
            digester.submit(
                lambda extent=extent: iter([leased(arena, extent)]),
                promised,
                lambda *result: results.put(result),
            )
        first, second, third = (results.get(timeout=60) for _ in extents)
    finally:
        digester.stop()
    assert first == third
    assert first[1] is None
    assert second[0] != first[0]
    assert promised[0][1] in second[1]
    assert all(extent.num_leases == 0 for extent in extents)
