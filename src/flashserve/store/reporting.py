"""What a node's tiers hold and do just now, for those who look after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from flashserve.store.dram.arena import Arena
from flashserve.store.guard import Guard, ScrubReport
from flashserve.store.origin import Origins
from flashserve.store.shelf import Shelf
from flashserve.store.transfers import Fetch, Transfers
from flashserve.types import Tier


@dataclasses.dataclass(frozen=True, slots=True)
class TierReport:
    """One tier of a node. Bytes: used + free == total, unless its budget was lowered below that.

    num_models: whole ones; num_leases: who keeps bytes from leaving; num_evicted: how often a
    model left to make room, or because somebody asked; num_damaged: chunks (DRAM) or checkpoints
    (disk) that were found damaged. Both count since the store was opened.
    """

    total_bytes: int
    used_bytes: int
    free_bytes: int
    num_models: int
    num_leases: int
    num_evicted: int
    num_damaged: int


@dataclasses.dataclass(frozen=True, slots=True)
class ArenaReport:
    """The arena's memory, adapters included. prefaulted_bytes: taken from the kernel ahead of need.

    is_prefaulting: more will be taken; refusals: what the kernel would not do, one line each.
    huge_page_bytes: mapped with huge pages; numa_nodes: over which its pages are spread.
    """

    total_bytes: int
    prefaulted_bytes: int
    is_prefaulting: bool
    huge_page_bytes: int
    numa_nodes: tuple[int, ...]
    refusals: tuple[str, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class StoreReport:
    """disk: None where another process has the disk tier; read_bytes: by the tier they left."""

    dram: TierReport
    disk: TierReport | None
    arena: ArenaReport
    scrub: ScrubReport
    fetches: tuple[Fetch, ...]
    read_bytes: Mapping[Tier, int]


class Reporter:
    """Asks the parts of one store."""

    def __init__(
        self, arena: Arena, shelf: Shelf, guard: Guard, origins: Origins, transfers: Transfers
    ) -> None:
        self._arena = arena
        self._shelf = shelf
        self._guard = guard
        self._origins = origins
        self._transfers = transfers

    def report(self) -> StoreReport:
        """Blocks for some milliseconds; the parts are not of one moment."""
        return StoreReport(
            self._dram(),
            self._disk(),
            self._memory(),
            self._guard.report(),
            self._transfers.fetches(),
            self._transfers.read_bytes(),
        )

    def _dram(self) -> TierReport:
        usage, images = self._arena.usage(), self._shelf.models().values()
        return TierReport(
            usage.total,
            usage.used,
            usage.free,
            sum(image.is_whole for image in images),
            sum(image.leases.total() for image in set(images)),
            self._shelf.num_evicted,
            self._guard.num_damaged,
        )

    def _disk(self) -> TierReport | None:
        disk = self._origins.disk
        if disk is None:
            return None
        usage = disk.usage()
        return TierReport(
            usage.total,
            usage.used,
            usage.free,
            len(disk.checkpoints()),
            disk.num_pins,
            disk.num_evicted,
            len(disk.problems),
        )

    def _memory(self) -> ArenaReport:
        arena, placement = self._arena, self._arena.placement
        refusal = arena.prefault_refusal
        return ArenaReport(
            arena.num_bytes,
            arena.prefaulted_bytes,
            arena.is_prefaulting,
            arena.huge_page_bytes(),
            placement.numa_nodes,
            (*placement.refusals, *((refusal,) if refusal else ())),
        )
