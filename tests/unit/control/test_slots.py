"""Who gets a worker when there are too few, and whose bytes leave DRAM."""

from __future__ import annotations

from tests.unit.control.fake_nodes import Fleet, model, node
from tests.unit.control.test_starts import fleet, kinds

from flashserve.messages.commands import (
    Command,
    Dispatch,
    Evict,
    Hold,
    Reject,
    StartReplica,
    StopReplica,
)
from flashserve.messages.events import Evicted, ModelDeployed, NodeJoined
from flashserve.types import ModelId, NodeId, ReplicaId, Tier

ABC = (model("a"), model("b"), model("c"))


def serve(f: Fleet, name: str, at: float) -> None:
    """One request to `name`, from start to end, at one moment."""
    f.now = at
    f.arrive(f"{name}@{at}", name)
    f.answer_all()
    f.finish(f"{name}@{at}")


def orders(commands: list[Command]) -> list[tuple[str, str]]:
    return [
        (type(c).__name__, c.model.model_id)
        for c in commands
        if isinstance(c, StartReplica | StopReplica | Evict)
    ]


def test_the_longest_idle_replica_gives_up_its_slot() -> None:
    f = fleet(*ABC, nodes=(node(workers=2),))
    serve(f, "a", 10.0)
    serve(f, "b", 20.0)
    f.now = 60.0
    stop, start, _ = f.arrive("r", "c")
    assert isinstance(stop, StopReplica)
    assert isinstance(start, StartReplica)
    assert (stop.model.model_id, start.model.model_id) == ("a", "c")
    assert stop.reason == "slot given to c: idle 50 s, restart 0.31 s"


def test_a_busy_replica_is_waited_for() -> None:
    f = fleet(*ABC)
    f.arrive("r1", "a")
    f.answer_all()
    (hold,) = f.arrive("r2", "b")
    assert isinstance(hold, Hold)
    assert hold.reason == "waits for a free worker: 1 of 1 are busy"
    assert hold.predicted.queue_s == 5.0
    assert orders(f.finish("r1")) == [("StopReplica", "a"), ("StartReplica", "b")]


def test_models_get_slots_in_the_order_in_which_they_began_to_wait() -> None:
    f = fleet(*ABC)
    f.arrive("r1", "a")
    f.answer_all()
    f.arrive("r2", "c")
    f.arrive("r3", "b")
    f.arrive("r4", "c")
    assert orders(f.finish("r1")) == [("StopReplica", "a"), ("StartReplica", "c")]
    f.answer_all()
    f.finish("r2")
    assert orders(f.finish("r4")) == [("StopReplica", "c"), ("StartReplica", "b")]


def test_after_its_patience_a_model_gets_the_slot_of_the_longest_busy() -> None:
    f = fleet(*ABC, nodes=(node(workers=2),), slot_patience_s=10)
    f.arrive("a1", "a")
    f.answer_all()
    f.now = 1.0
    f.arrive("b1", "b")
    f.answer_all()
    f.now = 5.0
    f.arrive("c1", "c")
    assert f.controller.next_wakeup() == 15.0
    assert f.tick(15.0) == []
    assert f.controller.model_view(ModelId("a")).state == "draining"
    assert f.controller.model_view(ModelId("b")).state == "ready"
    (held,) = f.arrive("a2", "a")
    assert isinstance(held, Hold)
    assert isinstance(f.arrive("b2", "b")[0], Dispatch)
    f.now = 20.0
    stop, start = f.finish("a1")
    assert isinstance(stop, StopReplica)
    assert stop.reason == "slot given to c, which waited 10 s: busy 15 s"
    assert isinstance(start, StartReplica)
    assert start.model.model_id == "c"


def test_a_replica_that_has_just_become_ready_is_left_alone() -> None:
    f = fleet(*ABC, slot_patience_s=10)
    f.arrive("a1", "a")
    f.arrive("b1", "b")
    f.now = 8.0
    f.answer_all()
    assert f.tick(10.0) == []
    assert f.controller.model_view(ModelId("a")).state == "ready"
    assert f.controller.next_wakeup() == 18.0
    f.tick(18.0)
    assert f.controller.model_view(ModelId("a")).state == "draining"


def test_two_busy_models_take_turns() -> None:
    f = fleet(*ABC, slot_patience_s=10, deadline_s=1000)
    f.arrive("a1", "a")
    f.answer_all()
    f.arrive("b1", "b")
    f.tick(10.0)
    f.arrive("a2", "a")
    assert orders(f.finish("a1")) == [("StopReplica", "a"), ("StartReplica", "b")]
    f.answer_all()
    f.tick(20.0)
    assert f.controller.model_view(ModelId("b")).state == "draining"
    assert orders(f.finish("b1")) == [("StopReplica", "b"), ("StartReplica", "a")]


def test_what_drained_for_a_model_that_needs_it_no_more_goes_on() -> None:
    f = fleet(*ABC, slot_patience_s=10)
    f.arrive("a1", "a")
    f.answer_all()
    f.arrive("b1", "b")
    f.tick(10.0)
    f.arrive("a2", "a")
    (resumed,) = f.finish("b1", prefill_s=None)
    assert isinstance(resumed, Dispatch)
    assert (resumed.request_id, resumed.replica_id, resumed.startup) == ("a2", "a#1", None)
    assert f.controller.model_view(ModelId("a")).state == "ready"


def test_a_new_node_ends_the_claim_on_another() -> None:
    f = fleet(*ABC, slot_patience_s=10)
    f.arrive("a1", "a")
    f.answer_all()
    f.arrive("b1", "b")
    f.tick(10.0)
    assert f.controller.model_view(ModelId("a")).state == "draining"
    assert orders(f.join(node("n2"))) == [("StartReplica", "b")]
    assert f.controller.model_view(ModelId("a")).state == "ready"


def test_a_claim_is_void_when_its_node_is_lost() -> None:
    f = fleet(*ABC, nodes=(node("n1"), node("n2")), slot_patience_s=10)
    f.arrive("a1", "a")
    f.arrive("b1", "b")
    f.answer_all()
    f.arrive("c1", "c")
    f.tick(10.0)
    f.lose_node(NodeId("n1"))
    check = f.tick(20.0)
    assert not [c for c in check if isinstance(c, Reject)]
    assert f.controller.model_view(ModelId("b")).state == "draining"


def test_a_large_model_that_waits_is_not_overtaken_for_ever() -> None:
    small = [model(f"s{i}", 2) for i in range(3)]
    f = fleet(*small, model("big", 4), nodes=(node(workers=2, extents=4),), slot_patience_s=5)
    f.arrive("r0", "s0")
    f.arrive("r1", "s1")
    f.answer_all()
    f.arrive("rb", "big")
    f.tick(5.0)
    f.arrive("r2", "s2")
    assert orders(f.finish("r0")) == [("StopReplica", "s0")]
    assert orders(f.finish("r1")) == [
        ("StopReplica", "s1"),
        ("Evict", "s0"),
        ("Evict", "s1"),
        ("StartReplica", "big"),
    ]


# DRAM


def test_bytes_that_nobody_uses_are_evicted_for_a_start_longest_idle_first() -> None:
    f = fleet(*ABC, nodes=(node(workers=3, extents=2),), keep_alive_s=0)
    serve(f, "a", 10.0)
    serve(f, "b", 20.0)
    f.now = 50.0
    evict, start, _ = f.arrive("r", "c")
    assert isinstance(evict, Evict)
    assert (evict.model.model_id, evict.tier) == ("a", Tier.DRAM)
    assert evict.reason.startswith(
        "evicted for c: idle 40 s, frees 2.1 MB, comes back from disk in"
    )
    assert isinstance(start, StartReplica)


def test_an_idle_replica_is_stopped_for_its_bytes() -> None:
    f = fleet(*ABC, nodes=(node(workers=3, extents=2),))
    serve(f, "a", 10.0)
    serve(f, "b", 20.0)
    f.now = 50.0
    assert orders(f.arrive("r", "c")) == [
        ("StopReplica", "a"),
        ("Evict", "a"),
        ("StartReplica", "c"),
    ]


def test_bytes_under_a_busy_replica_are_not_evicted() -> None:
    f = fleet(*ABC, nodes=(node(workers=3, extents=2),))
    f.arrive("a1", "a")
    f.arrive("b1", "b")
    f.answer_all()
    (hold,) = f.arrive("c1", "c")
    assert isinstance(hold, Hold)
    assert hold.reason == "waits for 2.1 MB of DRAM that no running model holds"
    assert orders(f.finish("b1")) == [("StopReplica", "b"), ("Evict", "b"), ("StartReplica", "c")]


def test_a_start_for_want_of_memory_goes_to_the_node_that_has_it() -> None:
    f = fleet(model("a", 4), model("b", 4), nodes=(node("n1", extents=4), node("n2", extents=4)))
    first, _ = f.arrive("a1", "a")
    second, _ = f.arrive("b1", "b")
    assert isinstance(first, StartReplica)
    assert isinstance(second, StartReplica)
    assert {first.node_id, second.node_id} == {"n1", "n2"}


def test_want_of_memory_on_the_node_evicts_more_and_tries_again() -> None:
    f = fleet(*ABC, nodes=(node(workers=2, extents=8),), keep_alive_s=0)
    serve(f, "a", 10.0)
    serve(f, "b", 20.0)
    f.now = 30.0
    f.arrive("c1", "c")
    assert orders(f.fail_replica(ReplicaId("c#3"), "unavailable")) == [
        ("Evict", "a"),
        ("StartReplica", "c"),
    ]
    assert orders(f.fail_replica(ReplicaId("c#4"), "unavailable")) == [
        ("Evict", "b"),
        ("StartReplica", "c"),
    ]
    assert kinds(f.answer_all()) == ["Dispatch"]


def test_with_nothing_to_evict_a_start_is_tried_again_later_and_at_last_given_up() -> None:
    f = fleet(failure_backoff_s=5)
    f.arrive("r1", "a")
    assert f.fail_replica(ReplicaId("a#1"), "unavailable") == []
    assert f.controller.next_wakeup() == 5.0
    assert orders(f.tick(5.0)) == [("StartReplica", "a")]
    assert f.fail_replica(ReplicaId("a#2"), "unavailable") == []
    assert orders(f.tick(10.0)) == [("StartReplica", "a")]
    assert f.fail_replica(ReplicaId("a#3"), "unavailable") == []
    assert orders(f.tick(15.0)) == [("StartReplica", "a")]
    (reject,) = f.fail_replica(ReplicaId("a#4"), "unavailable")
    assert isinstance(reject, Reject)
    assert reject.code == "unavailable"


def test_a_start_without_memory_is_tried_again_as_soon_as_something_changes() -> None:
    f = fleet()
    f.arrive("r1", "a")
    f.fail_replica(ReplicaId("a#1"), "unavailable")
    again = f.tell(Evicted(NodeId("n1"), ModelId("whatever"), Tier.DRAM))
    assert orders(again) == [("StartReplica", "a")]


def test_a_start_without_memory_goes_to_another_node() -> None:
    f = fleet(nodes=(node("n1"), node("n2")))
    f.arrive("r1", "a")
    (start,) = f.fail_replica(ReplicaId("a#1"), "unavailable")
    assert isinstance(start, StartReplica)
    assert start.node_id == "n2"


def test_many_nodes_are_not_all_compared_but_the_holder_of_the_bytes_is() -> None:
    nodes = tuple(node(f"n{i:03}") for i in range(60))
    f = fleet(*ABC, nodes=nodes, keep_alive_s=0)
    starts = [f.arrive(f"r{i}", name)[0] for i, name in enumerate("abc")]
    f.answer_all()
    for i in range(3):
        f.finish(f"r{i}")
    again = [f.arrive(f"again{i}", name)[0] for i, name in enumerate("abc")]
    for first, second in zip(starts, again, strict=True):
        assert isinstance(first, StartReplica)
        assert isinstance(second, StartReplica)
        assert first.node_id == second.node_id


def test_as_many_models_start_as_a_new_node_has_workers() -> None:
    f = fleet(*(model(f"m{i}") for i in range(100)), nodes=())
    for i in range(100):
        f.arrive(f"r{i}", f"m{i}")
    assert len(orders(f.join(node(workers=64, extents=64)))) == 64


def test_a_model_deployed_on_a_full_node_waits_in_line() -> None:
    f = fleet(model("a"))
    f.arrive("a1", "a")
    f.answer_all()
    f.tell(ModelDeployed(model("late")))
    assert kinds(f.arrive("l1", "late")) == ["Hold"]
    assert f.tell(NodeJoined(node())) == []
