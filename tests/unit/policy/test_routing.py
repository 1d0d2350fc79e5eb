from __future__ import annotations

from flashserve.policy.routing import ReplicaLoad, route
from flashserve.types import ReplicaId


def load(name: str, in_flight: int, limit: int = 4) -> ReplicaLoad:
    return ReplicaLoad(in_flight, ReplicaId(name), limit)


def test_the_least_loaded_replica_takes_the_request() -> None:
    assert route([load("a", 3), load("b", 1), load("c", 2)]) == (
        "b",
        "b is least loaded: 1 of 4",
    )


def test_a_tie_goes_to_the_first_by_name() -> None:
    assert route([load("b", 1), load("a", 1)]) == ("a", "a is least loaded: 1 of 4")


def test_a_full_replica_takes_nothing() -> None:
    assert route([load("a", 4)]) is None
    assert route([load("a", 2, limit=2), load("b", 3)]) == ("b", "b is least loaded: 3 of 4")
    assert route([]) is None
