"""A model's bytes in a memory of their own, for processes that do not get the node's arena."""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable
from pathlib import Path

from flashserve.config import StoreSettings
from flashserve.messages.handout import HandoutGrant
from flashserve.store.arrival import Arrival
from flashserve.store.dram.arena import Arena
from flashserve.store.store import Lease, Store
from flashserve.types import ModelId, ModelSpec

_MODEL = ModelId("copy")


@dataclasses.dataclass(frozen=True, slots=True)
class ModelCopy:
    """A sealed memfd with one model, and what lies where in it. Its owner closes `fd`."""

    fd: int
    grant: HandoutGrant

    def close(self) -> None:
        os.close(self.fd)


def reading_store(data_dir: Path, settings: StoreSettings) -> Store:
    """A store for `read_copy` alone; close it afterwards, or to end a read under way."""
    # Memory is taken as it is filled, so room that nothing fills costs nothing.
    once = settings.model_copy(update={"scrub_bytes_per_s": 0})
    return Store(data_dir, _physical_bytes(), prefault=False, settings=once)


def read_copy(
    store: Store, uri: str, wait: Callable[[Arrival], object] = Arrival.wait
) -> ModelCopy:
    """Reads a checkpoint from its source into the arena of a store that holds nothing else.

    The copy outlives the store. `wait` returns when the bytes are there; what it raises ends all.

    Raises:
        DeployError: the source cannot be read, or is larger than this machine's memory.
        UnavailableError: there is no room for it, or the store was closed.
    """
    with store.hold(ModelSpec(_MODEL, uri, 0)) as lease:
        wait(lease.arrival)
        # In an arena that holds nothing else, files lie one after another.
        begin = lease.offset
        grant = _grant(lease, begin, lease.num_bytes, lambda offset: offset - begin)
        return ModelCopy(os.dup(store.arena.fd), grant)


def copy_lease(lease: Lease, arena: Arena) -> ModelCopy:
    """Copies the bytes of a leased model out of the arena.

    Raises:
        UnavailableError: there is no memory for it.
    """
    fd = arena.copy_out(lease.extents)
    starts = itertools.accumulate((size for _, size in lease.extents), initial=0)
    moves = [
        (begin, start - begin) for (begin, _), start in zip(lease.extents, starts, strict=False)
    ]

    def moved(offset: int) -> int:
        _, by = max(move for move in moves if move[0] <= offset)
        return offset + by

    return ModelCopy(fd, _grant(lease, 0, lease.num_bytes, moved))


def _grant(lease: Lease, offset: int, num_bytes: int, moved: Callable[[int], int]) -> HandoutGrant:
    """moved: where in the copy an offset of the arena is."""
    snapshot = lease.snapshot
    return HandoutGrant(
        uri=snapshot.uri,
        identity=snapshot.identity,
        directory=str(snapshot.directory),
        config=snapshot.config,
        generation_config=snapshot.generation_config,
        tensors=tuple(
            dataclasses.replace(tensor, offset=moved(tensor.offset)) for tensor in lease.tensors
        ),
        offset=offset,
        num_bytes=num_bytes,
    )


def _physical_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
