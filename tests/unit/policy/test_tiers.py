from __future__ import annotations

from flashserve.policy.cost import Prices
from flashserve.policy.tiers import deserves_dram

GB = 1_000_000_000
COLD, WARM = 2.0, 0.3
PRICES = Prices(dram_gb_per_s=1e-6, wait_per_s=0.01, slo_miss=0.0)


def test_bytes_deserve_dram_when_the_waiting_that_they_save_costs_more_than_their_room() -> None:
    assert deserves_dram(1 / 60, 14 * GB, COLD, WARM, PRICES)
    assert not deserves_dram(1 / 86400, 14 * GB, COLD, WARM, PRICES)
    assert deserves_dram(1 / 86400, GB // 10, COLD, WARM, PRICES)
