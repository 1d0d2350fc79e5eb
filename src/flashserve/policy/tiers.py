"""Which tier bytes deserve: the waiting that they save there against the room they take."""

from __future__ import annotations

from flashserve.policy.cost import Prices


def deserves_dram(
    rate_per_s: float, size_bytes: int, cold_s: float, warm_s: float, prices: Prices
) -> bool:
    """Whether the waiting that is saved costs more than the memory.

    rate_per_s: starts to expect; cold_s: of a start from where the bytes are; warm_s: from DRAM.
    """
    saved = prices.cold_start(cold_s) - prices.cold_start(warm_s)
    return rate_per_s * saved > prices.dram_gb_per_s * size_bytes / 1e9
