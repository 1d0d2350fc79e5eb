"""Who is admitted when the device's memory does not hold every adapter."""

from __future__ import annotations

import collections
import dataclasses

from hypothesis import given, settings
from hypothesis import strategies as st

from flashserve.engine.batching import Batcher
from flashserve.engine.blocks import BlockPool
from flashserve.engine.sequence import Sequence
from flashserve.messages.work import GenerateJob
from flashserve.types import AdapterId, SamplingParams


class Room:
    """Holds so many adapters; those that nobody has pinned give way, the oldest first."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._pins: collections.OrderedDict[AdapterId, int] = collections.OrderedDict()

    def pin(self, adapter_id: AdapterId, *, may_load: bool) -> bool:
        if adapter_id not in self._pins:
            if not may_load:
                return False
            if len(self._pins) == self._capacity:
                victim = next((key for key, pins in self._pins.items() if not pins), None)
                if victim is None:
                    return False
                del self._pins[victim]
            self._pins[adapter_id] = 0
        self._pins[adapter_id] += 1
        return True

    def unpin(self, adapter_id: AdapterId) -> None:
        self._pins[adapter_id] -= 1
        assert self._pins[adapter_id] >= 0

    @property
    def num_pins(self) -> int:
        return sum(self._pins.values())


def make_sequence(
    name: str, adapter: str | None, num_prompt: int = 3, max_tokens: int = 3
) -> Sequence:
    job = GenerateJob(
        sequence_id=name,
        prompt_ids=tuple(range(num_prompt)),
        params=SamplingParams(max_tokens=max_tokens),
        adapter_id=None if adapter is None else AdapterId(adapter),
    )
    return Sequence.from_job(job, seed=0)


def make_batcher(capacity: int = 1, patience: int = 64, **changes: int) -> Batcher:
    sizes = {"num_blocks": 16, "max_sequences": 4, "max_tokens": 16, **changes}
    return Batcher(
        BlockPool(sizes["num_blocks"], 4),
        sizes["max_sequences"],
        sizes["max_tokens"],
        adapters=Room(capacity),
        adapter_patience=patience,
    )


def advance(batcher: Batcher) -> list[str]:
    """One step; each sequence that gets a token ends with its max_tokens."""
    segments = batcher.schedule()
    batcher.commit(segments)
    for segment in segments:
        if segment.samples:
            segment.sequence.tokens.append(99)
            if segment.sequence.num_emitted >= segment.sequence.params.max_tokens:
                batcher.remove(segment.sequence.sequence_id)
    return [segment.sequence.sequence_id for segment in segments]


def test_those_behind_that_need_no_room_go_first() -> None:
    batcher = make_batcher()
    for name, adapter in (("x", "a"), ("blocked", "b"), ("base", None), ("y", "a"), ("z", "c")):
        batcher.add(make_sequence(name, adapter))
    assert advance(batcher) == ["x", "base", "y"]
    assert [advance(batcher) for _ in range(3)][-1] == ["blocked"]


def test_one_that_waits_for_room_gets_it_before_a_later_one() -> None:
    batcher = make_batcher(capacity=2)
    batcher.add(make_sequence("x", "a"))
    batcher.add(make_sequence("y", "b"))
    batcher.add(make_sequence("first", "c"))
    batcher.add(make_sequence("second", "d"))
    assert advance(batcher) == ["x", "y"]
    batcher.remove("x")
    assert advance(batcher) == ["y", "first"]


def test_a_popular_adapter_passes_another_so_often_and_no_more() -> None:
    batcher = make_batcher(patience=3)
    batcher.add(make_sequence("popular", "a", max_tokens=4))
    batcher.add(make_sequence("rare", "b"))
    rare_at, step = None, 0
    while rare_at is None:
        batcher.add(make_sequence(str(step), "a", max_tokens=4))
        if "rare" in advance(batcher):
            rare_at = step
        step += 1
    # Passed in steps 0 to 2; the last of those who passed it, admitted in step 2, ends in step 5.
    assert rare_at == 6


def test_steps_that_admit_nobody_else_do_not_wear_patience_out() -> None:
    batcher = make_batcher(patience=1)
    batcher.add(make_sequence("long", "a", max_tokens=20))
    batcher.add(make_sequence("waits", "b"))
    for _ in range(5):
        assert advance(batcher) == ["long"]
    batcher.add(make_sequence("base", None, max_tokens=9))
    assert advance(batcher) == ["long", "base"]
    batcher.add(make_sequence("late", None))
    assert advance(batcher) == ["long", "base"]


def test_an_adapter_gives_its_room_up_when_its_sequence_is_preempted_or_aborted() -> None:
    batcher = make_batcher(num_blocks=4)
    batcher.add(make_sequence("base", None, num_prompt=7, max_tokens=8))
    batcher.add(make_sequence("x", "a", num_prompt=7, max_tokens=8))
    while "x" in advance(batcher):
        pass
    assert batcher._adapters.num_pins == 0
    while "x" not in advance(batcher):
        pass
    assert batcher._adapters.num_pins == 1
    batcher.remove("x")
    assert batcher._adapters.num_pins == 0


@dataclasses.dataclass
class Watched:
    sequence: Sequence
    steps: int = 0
    """Steps that admitted a later one while this one waited for the first time."""


@settings(max_examples=60, deadline=None)
@given(
    calls=st.lists(
        st.one_of(
            st.tuples(st.sampled_from([None, *"abcdef"]), st.integers(1, 20), st.integers(1, 9)),
            st.integers(0, 30),
            st.none(),
        ),
        max_size=60,
    ),
    capacity=st.integers(1, 3),
    patience=st.integers(0, 4),
)
def test_nobody_is_passed_over_too_often_and_all_finish(
    calls: list[tuple[str | None, int, int] | int | None], capacity: int, patience: int
) -> None:
    """Adds, aborts and steps in any order; whatever the room, it ends."""
    batcher = make_batcher(capacity, patience, num_blocks=10, max_tokens=12)
    alive: dict[str, Watched] = {}
    admitted: set[str] = set()

    def step() -> None:
        waiting = [name for name in alive if name not in admitted]
        now = set(advance(batcher))
        fresh = [name for name in waiting if name in now]
        if fresh:
            for name in waiting[: waiting.index(fresh[-1])]:
                if name not in now:
                    alive[name].steps += 1
                    assert alive[name].steps <= patience
        admitted.update(now)
        for name in [name for name in alive if name not in batcher]:
            del alive[name]

    for index, call in enumerate(calls):
        if call is None:
            step()
        elif isinstance(call, int):
            if alive:
                name = list(alive)[call % len(alive)]
                batcher.remove(name)
                del alive[name]
        else:
            adapter, num_prompt, max_tokens = call
            sequence = make_sequence(str(index), adapter, num_prompt, max_tokens)
            batcher.add(sequence)
            alive[str(index)] = Watched(sequence)
    for _ in range(2000):
        if not alive:
            break
        step()
    assert not alive
    assert batcher._adapters.num_pins == 0
    assert batcher._pool.usage().used == 0
