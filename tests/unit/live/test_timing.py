"""Receipts: every second between arrival and first token is in one phase, and in one only."""

from __future__ import annotations

import dataclasses

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashserve.live.timing import Stopwatch, clip_startup
from flashserve.messages.commands import Dispatch, Hold
from flashserve.types import ModelId, NodeId, Phases, ReplicaId, RequestId, Tier

REQUEST, MODEL = RequestId("r"), ModelId("m")
START = Phases(place_s=1, fetch_s=2, dram_s=4, device_s=8, init_s=16)
PREDICTED = Phases(dram_s=3, prefill_s=0.5)


def dispatch(startup: Phases | None = None, tier: Tier = Tier.DEVICE) -> Dispatch:
    return Dispatch(
        REQUEST, NodeId("n"), ReplicaId("m#1"), tier, PREDICTED, startup, reason="because"
    )


def stopwatch(received_at: float = 99.0, arrived_at: float = 100.0) -> Stopwatch:
    return Stopwatch(REQUEST, MODEL, received_at, arrived_at)


def test_a_start_that_began_with_the_request_is_in_its_receipt_whole() -> None:
    assert clip_startup(START, 40.0) == msgspec.structs.replace(START, queue_s=9.0)


def test_of_a_start_that_began_earlier_the_last_phases_count() -> None:
    assert clip_startup(START, 26.0) == Phases(dram_s=2, device_s=8, init_s=16)


def test_without_a_start_all_waiting_is_queue() -> None:
    assert clip_startup(None, 3.0) == Phases(queue_s=3.0)


phases = st.builds(Phases, *[st.floats(0, 1e4)] * 7)


@given(startup=st.none() | phases, waited_s=st.floats(0, 1e5))
def test_the_phases_sum_to_the_waiting(startup: Phases | None, waited_s: float) -> None:
    clipped = clip_startup(startup, waited_s)
    assert clipped.total_s == pytest.approx(waited_s)
    assert min(msgspec.structs.astuple(clipped)) >= 0


def test_a_warm_request_has_a_prefill_and_nothing_else() -> None:
    watch = stopwatch()
    watch.dispatched(dispatch(), 100.0)
    watch.added(100.25)
    watch.token(emitted_at=100.5, at=100.75)
    watch.token(emitted_at=101.0, at=101.0)
    watch.finished(103.0)
    receipt = watch.receipt
    assert receipt.actual == Phases(prefill_s=0.5)
    assert (receipt.tier, receipt.cold, receipt.resumed) == (Tier.DEVICE, False, 0)
    assert (receipt.ttft_s, receipt.total_s, receipt.gateway_in_s) == (1.75, 4.0, 1.25)
    assert receipt.predicted == PREDICTED
    assert watch.prefill_s == 0.5


def test_a_cold_request_shows_prediction_and_start_and_leaves_both_out_of_the_gateway() -> None:
    watch = stopwatch()
    watch.held(Hold(REQUEST, Tier.DISK, PREDICTED, "starting"))
    assert (watch.receipt.predicted, watch.receipt.tier) == (PREDICTED, Tier.DISK)
    assert watch.prefill_s is None
    watch.dispatched(dispatch(START, Tier.DISK), 131.5)
    watch.added(131.75)
    watch.token(132.0, 132.0)
    receipt = watch.receipt
    assert receipt.cold
    assert receipt.actual == msgspec.structs.replace(START, queue_s=0.5, prefill_s=0.5)
    assert receipt.actual.total_s == 32.0
    assert receipt.gateway_in_s == 1.25
    assert receipt.reason == "because"


def test_waiting_for_weights_after_the_dispatch_is_part_of_the_cold_start() -> None:
    for is_fetched, phase in ((False, "dram_s"), (True, "fetch_s")):
        watch = stopwatch()
        watch.dispatched(dispatch(Phases(**{phase: 1.0}, init_s=2.0), Tier.REMOTE), 103.0)
        watch.token(emitted_at=108.0, at=108.0, waited_s=4.5, is_fetched=is_fetched)
        watch.token(emitted_at=109.0, at=109.0, waited_s=9.0)
        assert watch.receipt.actual == Phases(**{phase: 5.5}, init_s=2.0, prefill_s=0.5)
        assert watch.prefill_s == 0.5


def test_a_request_that_comes_while_weights_arrive_waits_for_a_cold_start_too() -> None:
    """Its replica was ready before, and says where the weights come from."""
    for is_fetched, phase in ((False, "dram_s"), (True, "fetch_s")):
        watch = stopwatch()
        watch.dispatched(dispatch(), 100.0)
        watch.token(emitted_at=102.0, at=102.0, waited_s=1.5, is_fetched=is_fetched)
        assert watch.receipt.cold
        assert watch.receipt.actual == Phases(**{phase: 1.5}, prefill_s=0.5)


def test_no_more_waiting_counts_than_there_was_time_since_the_dispatch() -> None:
    watch = stopwatch()
    watch.dispatched(dispatch(), 100.0)
    watch.token(emitted_at=102.0, at=102.0, waited_s=7.0)
    assert watch.receipt.actual == Phases(dram_s=2.0)


def test_a_replica_lost_before_the_first_token_makes_the_first_try_part_of_the_queue() -> None:
    watch = stopwatch()
    watch.dispatched(dispatch(), 100.0)
    watch.added(100.5)
    watch.lost(105.0)
    watch.dispatched(dispatch(Phases(init_s=2.0)), 108.0)
    watch.added(108.5)
    watch.token(109.0, 109.0)
    receipt = watch.receipt
    assert receipt.actual == Phases(queue_s=6.0, init_s=2.0, prefill_s=1.0)
    assert (receipt.resumed, receipt.cold) == (1, True)
    assert receipt.gateway_in_s == 1.5


def test_a_replica_lost_later_changes_neither_phases_nor_time_to_first_token() -> None:
    watch = stopwatch()
    watch.dispatched(dispatch(), 100.0)
    watch.token(100.5, 100.5)
    before = dataclasses.replace(watch.receipt)
    watch.lost(105.0)
    watch.dispatched(dispatch(START), 150.0)
    watch.added(150.5)
    watch.token(151.0, 151.0)
    watch.finished(160.0)
    after = watch.receipt
    assert (after.actual, after.ttft_s, after.cold) == (before.actual, before.ttft_s, False)
    assert (after.resumed, after.total_s) == (1, 61.0)
