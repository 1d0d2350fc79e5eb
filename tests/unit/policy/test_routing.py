from __future__ import annotations

from flashserve.policy.routing import ReplicaLoad, only, route
from flashserve.types import ReplicaId

PREFILL_S = 0.2


def load(
    name: str, in_flight: int, limit: int = 4, *, adapter: bool = True, prefix: bool = False
) -> ReplicaLoad:
    return ReplicaLoad(in_flight, ReplicaId(name), limit, adapter, prefix)


def chosen(*loads: ReplicaLoad) -> str | None:
    found = route(loads, PREFILL_S)
    return found[0] if found else None


def test_the_least_loaded_replica_takes_the_request_and_the_next_best_is_named() -> None:
    assert route([load("a", 3), load("b", 1), load("c", 2)], PREFILL_S) == (
        "b",
        "b: 0.25 s, 1 of 4; next best c: 0.30 s, 2 of 4",
    )


def test_a_tie_goes_to_the_first_by_name() -> None:
    assert chosen(load("b", 1), load("a", 1)) == "a"


def test_a_full_replica_takes_nothing() -> None:
    assert chosen(load("a", 4)) is None
    assert chosen(load("a", 2, limit=2), load("b", 3)) == "b"
    assert chosen() is None


def test_an_adapter_that_is_there_is_worth_a_little_more_load() -> None:
    assert chosen(load("a", 0, 32, adapter=False), load("b", 2, 32)) == "b"
    assert chosen(load("a", 0, 4, adapter=False), load("b", 3, 4)) == "a"


def test_a_known_prefix_is_worth_as_much_as_it_saves_of_the_prefill() -> None:
    assert chosen(load("a", 0), load("b", 1, prefix=True)) == "b"
    assert chosen(load("a", 0), load("b", 3, prefix=True)) == "a"


def test_the_reason_says_what_was_compared() -> None:
    found = route([load("a", 0, adapter=False), load("b", 1, prefix=True)], PREFILL_S)
    assert found is not None
    assert (
        found[1] == "b: 0.15 s, 1 of 4, prefix known; next best a: 0.23 s, 0 of 4, adapter to load"
    )


def test_the_only_replica_takes_what_it_has_room_for() -> None:
    assert only(load("a", 1)) == ("a", "a is the only one: 1 of 4")
    assert only(load("a", 4)) is None
