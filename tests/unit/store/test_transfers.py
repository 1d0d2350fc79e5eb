from __future__ import annotations

from flashserve.store.transfers import Fetch, Transfer, Transfers
from flashserve.types import ModelId, Tier

M = ModelId("m")


class Clock:
    def __init__(self) -> None:
        self.now = 10.0

    def __call__(self) -> float:
        return self.now


def transfer(total: int = 100, from_tier: Tier = Tier.REMOTE) -> Transfer:
    return Transfer("s3://bucket/m", M, from_tier, Tier.DRAM, total)


def test_a_read_under_way_shows_how_far_and_how_fast_it_is() -> None:
    clock = Clock()
    transfers = Transfers(clock)
    with transfers.running(transfer()) as running:
        running.found(30)
        running.read(20)
        clock.now = 14.0
        fetch = Fetch(M, "s3://bucket/m", Tier.REMOTE, Tier.DRAM, 50, 100, 4.0, 5.0)
        assert transfers.fetches() == (fetch,)
    assert transfers.fetches() == ()


def test_before_any_time_has_passed_there_is_no_rate() -> None:
    transfers = Transfers(Clock())
    with transfers.running(transfer()) as running:
        running.read(20)
        assert transfers.fetches()[0].bytes_per_s == 0


def test_what_is_read_twice_brings_the_end_no_nearer() -> None:
    transfers = Transfers(Clock())
    with transfers.running(transfer(total=20)) as running:
        running.read(20)
        running.read(20)
        assert transfers.fetches()[0].done_bytes == 20
    assert transfers.read_bytes()[Tier.REMOTE] == 40


def test_bytes_count_while_they_come_and_for_good_whatever_becomes_of_the_read() -> None:
    transfers = Transfers(Clock())
    try:
        with transfers.running(transfer()) as running:
            running.found(50)
            running.read(7)
            assert transfers.read_bytes() == {Tier.REMOTE: 7, Tier.DISK: 0}
            raise ConnectionResetError
    except ConnectionResetError:
        pass
    with transfers.running(transfer(from_tier=Tier.DISK)) as running:
        running.read(5)
    assert transfers.read_bytes() == {Tier.REMOTE: 7, Tier.DISK: 5}
