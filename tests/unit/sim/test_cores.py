"""Workers that share cores: each is slower while others compute."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.sim.engines import Served

from flashserve.sim.closed import ClosedEngine
from flashserve.sim.cores import Cores
from flashserve.sim.profiles import EngineShape, StepCosts
from flashserve.sim.steps import Job
from flashserve.types import RequestId

COSTS = StepCosts(1, 1.0, 0.0, 0.0, 0.0)


class Clock:
    def __init__(self) -> None:
        self._numbers = itertools.count()
        self._heap: list[tuple[float, int, Callable[[float], None]]] = []

    def call_at(self, at: float, call: Callable[[float], None]) -> None:
        heapq.heappush(self._heap, (at, next(self._numbers), call))

    def run(self) -> None:
        while self._heap:
            at, _, call = heapq.heappop(self._heap)
            call(at)


def ends(at_once: float | None, works: list[tuple[float, float]]) -> list[float]:
    """When works of (begin, seconds at full speed) are done."""
    clock = Clock()
    cores = Cores(clock.call_at, at_once)
    found = [0.0] * len(works)
    for number, (begin, seconds) in enumerate(works):

        def start(now: float, number: int = number, seconds: float = seconds) -> None:
            cores.work(seconds, now, lambda at: found.__setitem__(number, at))

        clock.call_at(begin, start)
    clock.run()
    return found


def test_work_with_cores_of_its_own_is_never_slower() -> None:
    assert ends(None, [(0.0, 1.0), (0.5, 1.0)]) == [1.0, 1.5]


def test_as_many_as_there_is_room_for_go_at_full_speed_and_more_share_it() -> None:
    assert ends(2.0, [(0.0, 1.0), (0.0, 1.0)]) == [1.0, 1.0]
    assert ends(1.0, [(0.0, 1.0), (0.0, 1.0)]) == [2.0, 2.0]
    assert ends(1.6, [(0.0, 1.0), (0.0, 1.0)]) == pytest.approx([1.25, 1.25])


def test_who_comes_later_slows_only_what_is_left() -> None:
    # Half done when the other comes; the other is alone again for what it has left then.
    assert ends(1.0, [(0.0, 1.0), (0.5, 2.0)]) == pytest.approx([1.5, 3.0])


@given(
    st.lists(st.tuples(st.floats(0, 10), st.floats(0.01, 10)), min_size=1, max_size=8),
    st.floats(0.5, 4.0),
)
def test_no_more_is_done_than_the_cores_do(works: list[tuple[float, float]], room: float) -> None:
    done = ends(room, works)
    first, last = min(begin for begin, _ in works), max(done)
    assert sum(seconds for _, seconds in works) <= (last - first) * room * (1 + 1e-6) + 1e-6
    for (begin, seconds), end in zip(works, done, strict=True):
        assert end >= begin + seconds / min(1.0, room) * (1 - 1e-6)


def serve_paced(paces: list[tuple[float, float]]) -> Served:
    """One request of four steps, a second each, whose pace changes at (time, stretch)."""
    engine = ClosedEngine(COSTS, EngineShape())
    job = Job(RequestId("r"), 10, 4)
    engine.add(job, 0.0)
    for at, stretch in [*paces, (1e9, 1.0)]:
        while (now := engine.next_at) <= at:
            if engine.advance(now):
                return Served(job.first_token_at, now)
        engine.pace(stretch, at)
    raise AssertionError("the request never ended")


def test_an_engine_goes_on_at_another_pace_from_where_it_is() -> None:
    assert serve_paced([]) == Served(1.0, 4.0)
    assert serve_paced([(0.5, 2.0)]) == Served(1.5, 7.5)
    assert serve_paced([(2.5, 2.0), (3.5, 1.0)]) == Served(1.0, 4.5)
