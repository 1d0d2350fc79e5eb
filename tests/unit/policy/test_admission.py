from __future__ import annotations

import pytest

from flashserve.policy import admission
from flashserve.policy.admission import Failure, Refusal
from flashserve.types import ModelId

M = ModelId("m")


def test_a_queue_takes_as_many_as_its_limit_and_says_when_to_come_back() -> None:
    assert admission.refuse_full(M, 1, queue_limit=2, wait_s=9.0) is None
    assert admission.refuse_full(M, 2, queue_limit=2, wait_s=3.2) == Refusal(
        "queue_full", "2 requests already wait for m, the limit is 2", 4.0
    )
    instant = admission.refuse_full(M, 2, queue_limit=2, wait_s=0.0)
    assert instant is not None
    assert instant.retry_after_s == 1.0


def test_a_model_too_large_is_refused_with_both_sizes() -> None:
    assert admission.refuse_too_large(M, 100, 100) is None
    refusal = admission.refuse_too_large(M, 4_000_000_000, 2_147_483_648)
    assert refusal is not None
    assert refusal.code == "model_too_large"
    assert "4.0 GB of DRAM (4000000000 bytes)" in refusal.message
    assert "2.1 GB (2147483648 bytes)" in refusal.message


def test_a_late_request_hears_what_it_waited_for() -> None:
    assert admission.refuse_late(M, 120.0, "a free worker: 2 of 2 are busy") == Refusal(
        "deadline_exceeded",
        "the request waited 120 s for m and was not started in time: it waited for "
        "a free worker: 2 of 2 are busy",
    )


def test_after_a_failed_start_requests_get_its_error_until_the_next_try() -> None:
    failure = Failure("bad_checkpoint", "x.safetensors is cut off", until=15.0)
    assert admission.refuse_failed(failure, 11.0) == Refusal(
        "bad_checkpoint", "x.safetensors is cut off", 4.0
    )


@pytest.mark.parametrize(
    ("ahead", "slots", "expected"), [(0, 1, 5.0), (1, 1, 10.0), (3, 2, 10.0), (4, 2, 15.0)]
)
def test_the_wait_counts_the_turns_of_those_ahead(ahead: int, slots: int, expected: float) -> None:
    assert admission.wait_s(ahead, slots, run_s=5.0) == expected


def test_no_slots_at_all_is_not_a_division_by_zero() -> None:
    assert admission.wait_s(0, 0, run_s=5.0) == 5.0
