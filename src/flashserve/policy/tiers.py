"""Which tier bytes deserve: the waiting that they save there against the room they take."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from flashserve.policy.cost import Prices
from flashserve.types import Phases


class Item(NamedTuple):
    """Bytes that could be in a tier. worth: of having them there, per second, in any one unit."""

    name: str
    num_bytes: int
    worth: float


def deserves_dram(
    rate_per_s: float, size_bytes: int, cold: Phases, warm: Phases, prices: Prices
) -> bool:
    """Whether the waiting that is saved costs more than the memory.

    rate_per_s: starts to expect; cold, warm: a start from where the bytes are, and from DRAM.
    """
    saved = prices.cold_start(cold.startup_s) - prices.cold_start(warm.startup_s)
    return rate_per_s * saved > prices.dram_gb_per_s * size_bytes / 1e9


def assign(items: Iterable[Item], budget_bytes: int) -> list[Item]:
    """What is to be in a tier of this size, by worth per byte; what is worth nothing is left out.

    Greedy, and then the single most valuable item instead where that is worth more than all that
    was chosen, so that the result is worth at least half of what the best choice would be. Ties go
    to the smaller name.

    Source: the greedy algorithm for the knapsack problem, Dantzig 1957, with its usual mend.
    """
    fitting = [item for item in items if item.worth > 0 and item.num_bytes <= budget_bytes]
    chosen: list[Item] = []
    left = budget_bytes
    for item in sorted(fitting, key=lambda i: (-i.worth / max(i.num_bytes, 1), i.name)):
        if item.num_bytes <= left:
            chosen.append(item)
            left -= item.num_bytes
    best = max(fitting, key=lambda i: (i.worth, i.name), default=None)
    if best is not None and best.worth > sum(item.worth for item in chosen):
        return [best]
    return chosen
