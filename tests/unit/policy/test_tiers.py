from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flashserve.policy.cost import Prices
from flashserve.policy.tiers import Item, assign, deserves_dram
from flashserve.types import Phases

GB = 1_000_000_000
COLD, WARM = Phases(dram_s=2.0), Phases(device_s=0.3)
PRICES = Prices(dram_gb_per_s=1e-6, wait_per_s=0.01, slo_miss=0.0)


def test_bytes_deserve_dram_when_the_waiting_that_they_save_costs_more_than_their_room() -> None:
    assert deserves_dram(1 / 60, 14 * GB, COLD, WARM, PRICES)
    assert not deserves_dram(1 / 86400, 14 * GB, COLD, WARM, PRICES)
    assert deserves_dram(1 / 86400, GB // 10, COLD, WARM, PRICES)


def test_what_is_worth_most_per_byte_goes_first() -> None:
    small, large = Item("small", 1, 5.0), Item("large", 10, 9.0)
    assert assign([large, small], 10) == [large]  # worth more than the small one and nothing beside
    assert assign([large, small], 11) == [small, large]
    assert assign([Item("a", 4, 1.0), Item("b", 4, 1.0)], 4) == [Item("a", 4, 1.0)]
    assert assign([Item("free", 4, 0.0)], 4) == []


@given(
    st.lists(st.tuples(st.integers(0, 20), st.floats(0, 10)), max_size=8),
    st.integers(0, 40),
)
def test_a_budget_is_kept_and_half_of_the_best_choice_reached(
    drawn: list[tuple[int, float]], budget: int
) -> None:
    items = [Item(f"i{n}", size, worth) for n, (size, worth) in enumerate(drawn)]
    chosen = assign(items, budget)
    assert sum(item.num_bytes for item in chosen) <= budget
    best = 0.0
    for mask in range(1 << len(items)):
        some = [item for n, item in enumerate(items) if mask >> n & 1]
        if sum(item.num_bytes for item in some) <= budget:
            best = max(best, sum(item.worth for item in some))
    assert sum(item.worth for item in chosen) >= best / 2 - 1e-9
