"""How much of the disk tier's budget is taken, and what goes to make room: plain functions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable

from flashserve.errors import UnavailableError
from flashserve.store.checkpoint.listing import Listing
from flashserve.store.disk.index import Entry
from flashserve.store.disk.manifest import listed_bytes


@dataclasses.dataclass(frozen=True, slots=True)
class DiskUsage:
    """Bytes: used + free == total, unless the budget was lowered below what is used."""

    total: int
    used: int
    free: int


def bytes_of(entries: Iterable[Entry]) -> int:
    """Bytes that these entries take, each file once however many of them share it."""
    inodes: dict[int, int] = {}
    for entry in entries:
        inodes |= entry.inodes
    return sum(inodes.values())


def age(entry: Entry) -> tuple[float, str]:
    """Sorts the least recently used first."""
    return entry.last_used, entry.key


def choose_victims(
    listing: Listing,
    entries: Collection[Entry],
    is_pinned: Callable[[Entry], bool],
    *,
    budget_bytes: int,
    reserved_bytes: int,
) -> list[Entry]:
    """What must go so that the files of `listing` fit, least recently used first.

    reserved_bytes: what fetches under way will take.

    Raises:
        UnavailableError: it does not fit even without everything that is not pinned.
    """
    num_bytes = listed_bytes(listing)
    if num_bytes > budget_bytes:
        raise UnavailableError(
            f"the disk tier is full: {listing.uri} has {num_bytes} bytes and never fits into "
            f"{budget_bytes}: raise store.disk_bytes"
        )
    staying = reserved_bytes + bytes_of(filter(is_pinned, entries))
    if staying + num_bytes > budget_bytes:
        raise UnavailableError(
            f"the disk tier is full: {listing.uri} has {num_bytes} bytes, and of {budget_bytes} "
            f"are {staying} in use: raise store.disk_bytes"
        )
    kept = sorted(entries, key=age)
    victims = []
    for entry in tuple(kept):
        if reserved_bytes + bytes_of(kept) + num_bytes <= budget_bytes:
            break
        if not is_pinned(entry):
            kept.remove(entry)
            victims.append(entry)
    return victims
