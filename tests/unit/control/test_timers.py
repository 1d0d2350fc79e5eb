from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flashserve.control.timers import Timer, TimerKind, Timers


class Truth:
    """When each key is really due."""

    def __init__(self) -> None:
        self.due: dict[str, float] = {}
        self.timers = Timers(lambda timer: self.due.get(timer.key))

    def set(self, key: str, when: float) -> None:
        self.due[key] = when
        self.timers.schedule(Timer(TimerKind.KEEP_ALIVE, key), when)

    def pop(self, now: float, limit: int = 100) -> list[str]:
        popped = []
        for timer in self.timers.pop_due(now, limit):
            del self.due[timer.key]
            popped.append(timer.key)
        return popped


def test_the_earliest_comes_first() -> None:
    truth = Truth()
    truth.set("b", 2.0)
    truth.set("a", 1.0)
    assert truth.timers.next_due() == 1.0
    assert truth.pop(2.0) == ["a", "b"]
    assert truth.timers.next_due() is None


def test_what_is_left_of_many_is_due_still() -> None:
    truth = Truth()
    for name in "abc":
        truth.set(name, 1.0)
    assert truth.pop(1.0, limit=2) == ["a", "b"]
    assert truth.timers.next_due() == 1.0
    assert truth.pop(1.0, limit=2) == ["c"]


def test_what_matters_no_more_is_dropped() -> None:
    truth = Truth()
    truth.set("a", 1.0)
    truth.set("b", 2.0)
    del truth.due["a"]
    assert truth.timers.next_due() == 2.0


def test_nothing_is_asked_about_after_the_time_until_which_somebody_wants_to_know() -> None:
    truth = Truth()
    truth.set("a", 1.0)
    truth.due["a"] = 5.0
    assert truth.timers.next_due(0.5) is None
    assert truth.timers.next_due(4.9) is None
    assert truth.timers.next_due(5.0) == 5.0


def test_a_time_may_move_back_without_a_new_entry() -> None:
    truth = Truth()
    truth.set("a", 1.0)
    truth.due["a"] = 5.0
    assert truth.timers.next_due() == 5.0
    assert truth.pop(4.9) == []


def test_a_time_may_move_forward() -> None:
    truth = Truth()
    truth.set("a", 5.0)
    truth.set("a", 1.0)
    assert truth.pop(1.0) == ["a"]
    assert truth.timers.next_due() is None


def test_what_is_never_due_is_never_kept() -> None:
    truth = Truth()
    truth.set("a", float("inf"))
    assert truth.timers.next_due() is None


@given(
    st.lists(st.tuples(st.sampled_from("abcd"), st.one_of(st.none(), st.integers(0, 20)))),
    st.integers(0, 20),
)
def test_timers_agree_with_a_plain_dictionary(
    changes: list[tuple[str, int | None]], now: int
) -> None:
    truth = Truth()
    for key, when in changes:
        if when is None:
            truth.due.pop(key, None)
        else:
            truth.set(key, float(when))
    assert truth.timers.next_due() == min(truth.due.values(), default=None)
    expected = sorted((when, key) for key, when in truth.due.items() if when <= now)
    assert truth.pop(float(now)) == [key for _, key in expected]
