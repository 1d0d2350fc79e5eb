import concurrent.futures
import itertools

import hypothesis
import pytest
from hypothesis import strategies as st

from flashserve.errors import CheckpointError, InternalError
from flashserve.store.arrival import FAILED, Arrival, StageReport


def test_groups_open_as_a_prefix():
    arrival = Arrival([1, 2, 1])
    told: list[int] = []
    arrival.subscribe(told.append)
    arrival.add(2, 5)
    arrival.add(1, 5)
    assert told == [0]
    arrival.add(0, 5)
    assert told == [0, 1]
    assert not arrival.is_complete
    arrival.add(1, 5)
    assert told == [0, 1, 3]
    assert arrival.is_complete


def test_what_is_there_already_is_open_at_once():
    arrival = Arrival([0, 0])
    told: list[int] = []
    arrival.subscribe(told.append)
    assert told == [2]
    assert arrival.wait() == StageReport()


def test_empty_groups_open_with_the_ones_before_them():
    arrival = Arrival([0, 1, 0])
    assert arrival.num_open == 1
    arrival.add(1, 1)
    assert arrival.num_open == 3


def test_who_waits_gets_the_report():
    arrival = Arrival([1], report=lambda seconds: StageReport(7, 0.0, seconds + 1))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(arrival.wait)
        arrival.add(0, 7)
        assert waiting.result().num_bytes == 7
    assert arrival.wait().dram_s >= 1


@pytest.mark.parametrize(
    ("error", "raised"),
    [(CheckpointError("w is damaged"), CheckpointError), (KeyError("oops"), InternalError)],
)
def test_a_failure_is_told_once_and_ends_the_waiting(error, raised):
    arrival = Arrival([1, 1])
    told: list[int] = []
    arrival.subscribe(told.append)
    arrival.add(0, 1)
    arrival.fail(error)
    arrival.fail(KeyError("another"))
    arrival.add(1, 1)
    assert told == [0, 1, FAILED]
    assert not arrival.is_complete
    arrival.subscribe(told.append)
    assert told[-1] == FAILED
    with pytest.raises(raised, match=r"damaged|oops") as caught:
        arrival.wait()
    assert caught.value is not error


def test_nothing_fails_after_everything_is_there():
    arrival = Arrival([1])
    arrival.add(0, 1)
    arrival.fail(KeyError("late"))
    assert arrival.is_complete
    assert not arrival.has_failed
    arrival.wait()


def test_listeners_hear_of_every_chunk():
    arrival = Arrival([1, 1], num_bytes=12)
    told: list[tuple[int, int]] = []
    arrival.listen(lambda *call: told.append(call))
    arrival.add(1, 4)
    arrival.add(0, 8)
    assert told == [(4, 12), (12, 12)]


@hypothesis.given(pending=st.lists(st.integers(0, 3), min_size=1, max_size=6), data=st.data())
def test_a_group_is_open_exactly_when_nothing_up_to_it_is_missing(pending, data):
    arrival = Arrival(pending)
    told: list[int] = []
    arrival.subscribe(told.append)
    missing = list(pending)
    chunks = [group for group, count in enumerate(pending) for _ in range(count)]
    for group in data.draw(st.permutations(chunks)):
        arrival.add(group, 1)
        missing[group] -= 1
        wanted = len(list(itertools.takewhile(lambda count: not count, missing)))
        assert arrival.num_open == told[-1] == wanted
    assert arrival.is_complete
    assert told == sorted(set(told))


def test_many_threads_may_bring_chunks():
    arrival = Arrival([8] * 50, num_bytes=400)
    told: list[int] = []
    progress: list[tuple[int, int]] = []
    arrival.subscribe(told.append)
    arrival.listen(lambda *call: progress.append(call))
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(arrival.add, n % 50, 1) for n in range(400)]:
            future.result()
    assert told == sorted(set(told))
    assert told[-1] == 50
    assert progress == [(n + 1, 400) for n in range(400)]
