import dataclasses

import hypothesis
import pytest
from hypothesis import strategies as st

from flashserve.policy.cost import Prices
from flashserve.policy.multiplexing import (
    MIN_OBSERVED_S,
    AdapterLoad,
    Choice,
    Machine,
    WorkerPrices,
    advise,
    in_workers,
    workers,
)

MACHINE = Machine(
    adapter_bytes=40 << 20, base_bytes=15 << 30, bytes_per_s=1e12, batch=32, keep_alive_s=300.0
)
QUIET = AdapterLoad(3600.0, 0.001, 0.1, 0.01, 1.0)
BUSY = AdapterLoad(3600.0, 20.0, 4000.0, 20.0, 4000.0)
PRICES = WorkerPrices(dram_per_gib=0.005)


def test_a_rare_adapter_stays_on_the_shared_replica():
    advice = advise(QUIET, MACHINE, PRICES)
    assert advice.choice is Choice.MULTIPLEX
    assert advice.multiplexed < advice.alone


def test_a_busy_adapter_beside_a_busy_base_gets_its_own_replica():
    advice = advise(BUSY, MACHINE, PRICES)
    assert advice.choice is Choice.OWN_REPLICA
    assert advice.alone < advice.multiplexed


def test_an_adapter_that_is_nearly_all_of_the_traffic_is_merged():
    alone = dataclasses.replace(BUSY, rest_requests_per_s=0.0, rest_tokens_per_s=0.0)
    assert advise(alone, MACHINE, PRICES).choice is Choice.MERGE


def test_too_little_history_changes_nothing_and_says_so():
    young = dataclasses.replace(BUSY, observed_s=MIN_OBSERVED_S - 60)
    advice = advise(young, MACHINE, PRICES)
    assert advice.choice is Choice.MULTIPLEX
    assert advice.reason.startswith("seen for 9 of 10 minutes")


def test_the_reason_gives_the_numbers_that_were_compared():
    reason = advise(BUSY, MACHINE, PRICES).reason
    assert "4e+03 tokens/s" in reason
    assert "workers" in reason


def test_dear_memory_keeps_an_adapter_where_it_is():
    assert advise(BUSY, MACHINE, WorkerPrices(dram_per_gib=10.0)).choice is Choice.MULTIPLEX


rates = st.floats(0, 1e4)


@hypothesis.given(rates, rates, rates, rates)
def test_splitting_never_saves_workers(requests, tokens, rest_requests, rest_tokens):
    apart = workers(requests, tokens, MACHINE) + workers(rest_requests, rest_tokens, MACHINE)
    together = workers(requests + rest_requests, tokens + rest_tokens, MACHINE)
    assert together <= apart * (1 + 1e-9)


@hypothesis.given(rates, rates, rates, rates)
def test_advice_other_than_multiplexing_saves_what_it_says(
    requests, tokens, rest_requests, rest_tokens
):
    load = AdapterLoad(3600.0, requests, tokens, rest_requests, rest_tokens)
    advice = advise(load, MACHINE, PRICES)
    assert advice.choice is Choice.MULTIPLEX or advice.alone < advice.multiplexed


def test_the_price_of_memory_in_workers_follows_the_prices() -> None:
    prices = in_workers(Prices(gpu_per_s=2.0, dram_gb_per_s=1.0))
    assert prices.dram_per_gib == pytest.approx(0.5 * 1.073741824)
