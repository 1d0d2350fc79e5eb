"""Stage and evict as people ask for them, and models that are replaced or deleted."""

from __future__ import annotations

from tests.unit.control.fake_nodes import Fleet, model, node
from tests.unit.control.test_slots import ABC, orders, serve
from tests.unit.control.test_starts import fleet, kinds

from flashserve.messages.commands import Dispatch, Evict, Hold, Reject, Stage, StartReplica
from flashserve.messages.events import (
    Evicted,
    EvictRequested,
    ModelDeleted,
    ModelDeployed,
    Staged,
    StageFailed,
    StageRequested,
)
from flashserve.types import ModelId, NodeId, ReplicaId, Tier

A, B = ModelId("a"), ModelId("b")
N1 = NodeId("n1")


def stage(f: Fleet, name: str = "a", tier: Tier = Tier.DRAM) -> list[Stage]:
    return [c for c in f.tell(StageRequested(ModelId(name), tier)) if isinstance(c, Stage)]


def test_a_staged_model_starts_from_dram() -> None:
    f = fleet(nodes=(node("n1"), node("n2")))
    (order,) = stage(f)
    assert (order.node_id, order.tier, order.model) == ("n1", Tier.DRAM, model("a"))
    assert order.reason.startswith("asked for; disk on n1: ")
    assert f.controller.model_view(A).tier is Tier.DISK
    f.answer_all()
    assert f.controller.model_view(A).tier is Tier.DRAM
    start, hold = f.arrive("r1", "a")
    assert isinstance(start, StartReplica)
    assert start.node_id == "n1"
    assert isinstance(hold, Hold)
    assert hold.tier is Tier.DRAM


def test_what_is_staged_already_is_ordered_from_the_node_that_has_it() -> None:
    f = fleet(nodes=(node("n1"), node("n2")))
    stage(f)
    f.answer_all()
    (order,) = stage(f)
    assert order.node_id == "n1"
    assert f.answer_all() == []


def test_a_directory_is_staged_to_disk_by_the_node_s_word() -> None:
    f = fleet()
    (order,) = stage(f, tier=Tier.DISK)
    assert order.tier is Tier.DISK
    f.answer_all()
    assert f.controller.model_view(A).tier is Tier.DISK


def test_a_remote_model_on_disk_is_remembered_there() -> None:
    f = fleet(model("a", lowest_tier=Tier.REMOTE), nodes=(node("n1"), node("n2")))
    assert f.controller.model_view(A).tier is Tier.REMOTE
    stage(f, tier=Tier.DISK)
    f.answer_all()
    assert f.controller.model_view(A).tier is Tier.DISK
    start, _ = f.arrive("r1", "a")
    assert isinstance(start, StartReplica)
    assert start.node_id == "n1"
    f.answer_all()
    f.finish("r1")
    assert orders(f.tell(EvictRequested(A, Tier.DISK))) == [("StopReplica", "a"), ("Evict", "a")]
    assert f.controller.model_view(A).tier is Tier.REMOTE


def test_staging_evicts_what_is_least_worth() -> None:
    f = fleet(*ABC, nodes=(node(workers=3, extents=2),), keep_alive_s=0)
    serve(f, "a", 10.0)
    serve(f, "b", 20.0)
    f.now = 50.0
    commands = f.tell(StageRequested(ModelId("c"), Tier.DRAM))
    assert kinds(commands) == ["Evict", "Stage"]
    assert orders(commands) == [("Evict", "a")]


def test_bytes_on_their_way_are_not_evicted() -> None:
    f = fleet(*ABC, nodes=(node(workers=3, extents=1),))
    stage(f)
    assert kinds(f.arrive("b1", "b")) == ["Hold"]
    assert orders(f.answer_all()) == [("Evict", "a"), ("StartReplica", "b")]


def test_without_room_the_largest_node_says_so_itself() -> None:
    f = fleet(model("a", 9), nodes=(node("n1", extents=4), node("n2", extents=8)))
    (order,) = stage(f)
    assert order.node_id == "n2"
    assert f.answer_all() == []
    assert f.controller.model_view(A).reason == "staging on n2 failed: no room"
    assert f.controller.model_view(A).dram_bytes == 0


def test_a_stage_that_failed_for_want_of_memory_is_tried_twice_after_evictions() -> None:
    f = fleet(*ABC, keep_alive_s=0)
    serve(f, "b", 10.0)
    serve(f, "c", 20.0)
    f.now = 30.0
    stage(f)
    f.nodes[N1].answers.clear()
    failed = StageFailed(N1, A, Tier.DRAM, "unavailable", "in pieces")
    assert orders(f.tell(failed)) == [("Evict", "b")]
    assert orders(f.tell(failed)) == [("Evict", "c")]
    assert f.tell(failed) == []


def test_a_stage_that_failed_for_another_reason_is_not_tried_again() -> None:
    f = fleet(*ABC)
    serve(f, "b", 10.0)
    stage(f)
    f.nodes[N1].answers.clear()
    assert f.tell(StageFailed(N1, A, Tier.DRAM, "bad_checkpoint", "cut off")) == []
    assert f.controller.model_view(A).reason == "staging on n1 failed: cut off"


def test_evicting_an_idle_model_stops_its_replica_first() -> None:
    f = fleet()
    serve(f, "a", 1.0)
    assert orders(f.tell(EvictRequested(A, Tier.DRAM))) == [("StopReplica", "a"), ("Evict", "a")]
    f.answer_all()
    view = f.controller.model_view(A)
    assert (view.state, view.tier, view.dram_bytes) == ("cold", Tier.DISK, 0)
    assert view.reason == "asked to leave dram"


def test_evicting_a_busy_model_waits_for_its_last_request() -> None:
    f = fleet()
    f.arrive("r1", "a")
    f.answer_all()
    assert f.tell(EvictRequested(A, Tier.DRAM)) == []
    assert f.controller.model_view(A).state == "draining"
    assert kinds(f.arrive("r2", "a")) == ["Hold"]
    assert orders(f.finish("r1")) == [
        ("StopReplica", "a"),
        ("Evict", "a"),
        ("StartReplica", "a"),
    ]
    assert [c.request_id for c in f.answer_all() if isinstance(c, Dispatch)] == ["r2"]
    assert f.controller.model_view(A).tier is Tier.DEVICE


def test_evicting_a_model_that_starts_for_somebody_lets_it_serve_first() -> None:
    f = fleet()
    f.arrive("r1", "a")
    assert f.tell(EvictRequested(A, Tier.DRAM)) == []
    assert kinds(f.answer_all()) == ["Dispatch"]
    assert orders(f.finish("r1")) == [("StopReplica", "a"), ("Evict", "a")]


def test_evicting_a_model_that_starts_for_nobody_cancels_the_start() -> None:
    f = fleet()
    f.arrive("r1", "a")
    f.finish("r1")
    assert orders(f.tell(EvictRequested(A, Tier.DRAM))) == [("StopReplica", "a"), ("Evict", "a")]
    assert f.answer_all() == []


def test_evicting_what_is_nowhere_is_answered_all_the_same() -> None:
    f = fleet()
    assert orders(f.tell(EvictRequested(A, Tier.DRAM))) == [("Evict", "a")]


def test_bytes_that_arrive_after_their_eviction_was_ordered_do_not_count() -> None:
    f = fleet()
    stage(f)
    f.tell(EvictRequested(A, Tier.DRAM))
    f.answer_all()
    assert f.controller.model_view(A).tier is Tier.DISK


def test_bytes_that_a_node_could_not_evict_are_still_there() -> None:
    f = fleet()
    serve(f, "a", 1.0)
    f.tell(EvictRequested(A, Tier.DRAM))
    f.tell(StageFailed(N1, A, Tier.DRAM, "conflict", "a lease is held"))
    assert f.controller.model_view(A).tier is Tier.DRAM


def test_bytes_that_a_node_lost_by_itself_are_gone() -> None:
    f = fleet()
    stage(f)
    f.answer_all()
    f.tell(Evicted(N1, A, Tier.DRAM))
    assert f.controller.model_view(A).tier is Tier.DISK


def test_bytes_that_were_lost_under_a_start_are_not_there_when_it_fails() -> None:
    """The loss of a replica with a request in flight orders the next start before the node has
    said that the bytes are gone too.
    """
    f = fleet()
    f.arrive("r1", "a")
    f.answer_all()
    again = f.lose_replica(ReplicaId("a#1"))
    (start,) = [order for order in again if isinstance(order, StartReplica)]
    f.tell(Evicted(N1, A, Tier.DRAM))
    f.fail_replica(start.replica_id, "bad_checkpoint")
    assert f.controller.model_view(A).tier is Tier.DISK


def test_stage_and_evict_of_an_unknown_model_do_nothing() -> None:
    f = fleet()
    assert f.tell(StageRequested(B, Tier.DRAM)) == []
    assert f.tell(EvictRequested(B, Tier.DRAM)) == []
    assert f.tell(Staged(N1, B, Tier.DRAM, 1, 1.0)) == []
    assert f.tell(StageFailed(N1, B, Tier.DRAM, "unavailable", "?")) == []


# Deploying again, deleting


def test_a_deleted_model_is_evicted_and_unknown() -> None:
    f = fleet()
    serve(f, "a", 1.0)
    assert orders(f.tell(ModelDeleted(A))) == [("StopReplica", "a"), ("Evict", "a")]
    (reject,) = f.arrive("r2", "a")
    assert isinstance(reject, Reject)
    assert reject.code == "model_not_found"
    assert f.answer_all() == []


def test_deleting_ends_the_waiting_and_lets_the_running_finish() -> None:
    f = fleet(nodes=(node(max_sequences=1),))
    f.arrive("r1", "a")
    f.arrive("r2", "a")
    f.answer_all()
    (reject,) = f.tell(ModelDeleted(A))
    assert isinstance(reject, Reject)
    assert (reject.request_id, reject.code) == ("r2", "model_not_found")
    assert orders(f.finish("r1")) == [("StopReplica", "a"), ("Evict", "a")]


def test_deleting_cancels_a_start() -> None:
    f = fleet()
    f.arrive("r1", "a")
    commands = f.tell(ModelDeleted(A))
    assert kinds(commands) == ["Reject", "StopReplica", "Evict"]
    assert f.answer_all() == []


def test_a_request_of_a_deleted_model_that_loses_its_replica_is_told() -> None:
    f = fleet()
    f.arrive("r1", "a")
    f.answer_all()
    f.tell(ModelDeleted(A))
    reject, evict = f.lose_replica(ReplicaId("a#1"))
    assert isinstance(reject, Reject)
    assert reject.code == "model_not_found"
    assert isinstance(evict, Evict)


def test_a_model_deployed_again_while_it_ends_starts_when_it_has_ended() -> None:
    f = fleet()
    f.arrive("r1", "a")
    f.answer_all()
    f.tell(ModelDeleted(A))
    f.tell(ModelDeployed(model("a")))
    assert kinds(f.arrive("r2", "a")) == ["Hold"]
    assert orders(f.finish("r1")) == [
        ("StopReplica", "a"),
        ("Evict", "a"),
        ("StartReplica", "a"),
    ]


def test_another_checkpoint_serves_new_requests_after_the_old_one_has_drained() -> None:
    f = fleet(model("a", source="/old"))
    f.arrive("r1", "a")
    f.answer_all()
    assert f.tell(ModelDeployed(model("a", source="/new"))) == []
    assert kinds(f.arrive("r2", "a")) == ["Hold"]
    _, evict, start = f.finish("r1")
    assert isinstance(evict, Evict)
    assert evict.model.source == "/old"
    assert evict.reason == "replaced by another checkpoint"
    assert isinstance(start, StartReplica)
    assert start.model.source == "/new"
    assert start.reason.startswith("disk on n1")


def test_a_start_of_the_old_checkpoint_is_cancelled_for_the_new() -> None:
    f = fleet(model("a", source="/old"))
    f.arrive("r1", "a")
    assert orders(f.tell(ModelDeployed(model("a", source="/new")))) == [
        ("StopReplica", "a"),
        ("Evict", "a"),
        ("StartReplica", "a"),
    ]
    assert kinds(f.answer_all()) == ["Dispatch"]


def test_the_new_checkpoint_starts_elsewhere_while_the_old_one_drains() -> None:
    f = fleet(model("a", source="/old"), nodes=(node("n1"), node("n2")))
    f.arrive("r1", "a")
    f.answer_all()
    f.tell(ModelDeployed(model("a", source="/new")))
    start, _ = f.arrive("r2", "a")
    assert isinstance(start, StartReplica)
    assert start.node_id == "n2"


def test_an_answer_of_the_old_checkpoint_does_not_go_on_with_the_new() -> None:
    f = fleet(model("a", source="/old"))
    f.arrive("r1", "a")
    f.answer_all()
    f.tell(ModelDeployed(model("a", source="/new")))
    (reject, _) = f.lose_replica(ReplicaId("a#1"))
    assert isinstance(reject, Reject)
    assert reject.message == "a was replaced while it was answering"


def test_an_interrupted_answer_that_waits_does_not_go_on_with_another_checkpoint() -> None:
    f = fleet(model("a", source="/old"))
    f.arrive("r1", "a")
    f.answer_all()
    f.lose_replica(ReplicaId("a#1"))
    f.arrive("r2", "a")
    rejects = f.tell(ModelDeployed(model("a", source="/new")))
    assert [c.request_id for c in rejects if isinstance(c, Reject)] == ["r1"]
    assert [c.request_id for c in f.answer_all() if isinstance(c, Dispatch)] == ["r2"]


def test_a_checkpoint_that_has_become_too_large_refuses_who_waits() -> None:
    f = fleet(model("a"), model("b"))
    f.arrive("b1", "b")
    f.answer_all()
    f.arrive("a1", "a")
    (reject,) = f.tell(ModelDeployed(model("a", 99)))
    assert isinstance(reject, Reject)
    assert reject.code == "model_too_large"


def test_deploying_the_same_again_keeps_the_replica() -> None:
    f = fleet()
    serve(f, "a", 1.0)
    assert f.tell(ModelDeployed(model("a"))) == []
    assert kinds(f.arrive("r1", "a")) == ["Dispatch"]
