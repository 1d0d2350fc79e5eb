"""Failed starts, lost replicas, lost nodes, deadlines and full queues."""

from __future__ import annotations

from tests.unit.control.fake_nodes import model, node
from tests.unit.control.test_starts import fleet, kinds

from flashserve.messages.commands import Dispatch, Hold, Reject, StartReplica, StopReplica
from flashserve.messages.events import (
    DrainStarted,
    NodeLost,
    ReplicaFailed,
    ReplicaLost,
    ReplicaStopped,
)
from flashserve.types import ModelId, NodeId, ReplicaId, Tier

A1 = ReplicaId("a#1")


def test_a_failed_start_is_everyone_s_answer_for_a_while() -> None:
    f = fleet(failure_backoff_s=5)
    f.arrive("r1", "a")
    f.arrive("r2", "a")
    rejects = f.fail_replica(A1, "bad_checkpoint")
    assert [(c.request_id, c.code, c.message) for c in rejects if isinstance(c, Reject)] == [
        ("r1", "bad_checkpoint", "it is broken"),
        ("r2", "bad_checkpoint", "it is broken"),
    ]
    assert f.controller.model_view(ModelId("a")).state == "failed"
    assert f.controller.model_view(ModelId("a")).reason == "start on n1 failed: it is broken"
    f.now = 2.0
    (reject,) = f.arrive("r3", "a")
    assert isinstance(reject, Reject)
    assert (reject.code, reject.retry_after_s) == ("bad_checkpoint", 3.0)
    assert f.controller.next_wakeup() == 5.0
    f.tick(5.0)
    assert f.controller.model_view(ModelId("a")).state == "cold"
    assert kinds(f.arrive("r4", "a")) == ["StartReplica", "Hold"]


def test_the_back_off_ends_by_itself_even_without_a_tick() -> None:
    f = fleet(failure_backoff_s=5)
    f.arrive("r1", "a")
    f.fail_replica(A1, "bad_checkpoint")
    f.now = 5.0
    assert kinds(f.arrive("r2", "a")) == ["StartReplica", "Hold"]


def test_other_models_are_served_while_one_fails() -> None:
    f = fleet(model("a"), model("b"))
    f.arrive("r1", "a")
    f.fail_replica(A1, "bad_checkpoint")
    f.arrive("r2", "b")
    assert kinds(f.answer_all()) == ["Dispatch"]


def test_requests_of_a_lost_replica_go_on_in_order_before_those_that_waited() -> None:
    f = fleet(nodes=(node(max_sequences=2),))
    for i in range(3):
        f.arrive(f"r{i}", "a")
    f.answer_all()
    commands = f.lose_replica(A1)
    assert kinds(commands) == ["StartReplica", "Hold", "Hold"]
    assert [c.tier for c in commands if isinstance(c, Hold)] == [Tier.DRAM, Tier.DRAM]
    assert [c.request_id for c in f.answer_all() if isinstance(c, Dispatch)] == ["r0", "r1"]
    assert [c.request_id for c in f.finish("r0") if isinstance(c, Dispatch)] == ["r2"]


def test_a_request_gives_up_after_so_many_lost_replicas() -> None:
    f = fleet(max_attempts=2)
    f.arrive("r1", "a")
    f.answer_all()
    assert kinds(f.lose_replica(A1)) == ["StartReplica", "Hold"]
    f.answer_all()
    (reject,) = f.lose_replica(ReplicaId("a#2"))
    assert isinstance(reject, Reject)
    assert (reject.code, reject.message) == (
        "replica_failed",
        "a lost 2 replicas, the last one: killed",
    )


def test_replicas_lost_while_they_start_count_too() -> None:
    f = fleet(max_attempts=2)
    f.arrive("r1", "a")
    assert kinds(f.lose_replica(A1)) == ["StartReplica"]
    f.arrive("r2", "a")
    (reject, start) = f.lose_replica(ReplicaId("a#2"))
    assert isinstance(reject, Reject)
    assert reject.request_id == "r1"
    assert isinstance(start, StartReplica)


def test_the_deadline_of_an_interrupted_answer_starts_anew() -> None:
    f = fleet(deadline_s=10)
    f.arrive("r1", "a")
    f.answer_all()
    f.now = 60.0
    f.lose_replica(A1)
    assert f.tick(69.0) == []
    assert kinds(f.answer_all()) == ["Dispatch"]


def test_the_requests_of_a_lost_node_go_on_elsewhere() -> None:
    f = fleet(nodes=(node("n1"), node("n2")))
    f.arrive("r1", "a")
    f.answer_all()
    (start, hold) = f.lose_node(NodeId("n1"))
    assert isinstance(start, StartReplica)
    assert start.node_id == "n2"
    assert isinstance(hold, Hold)
    assert hold.tier is Tier.DISK


def test_a_node_that_joins_anew_has_lost_everything() -> None:
    f = fleet()
    f.arrive("r1", "a")
    f.answer_all()
    start, hold = f.join(node(epoch=2))
    assert isinstance(start, StartReplica)
    assert (start.epoch, start.replica_id) == (2, "a#2")
    assert start.reason.startswith("disk on n1")
    assert isinstance(hold, Hold)


def test_what_is_out_of_date_is_ignored() -> None:
    f = fleet()
    f.join(node(epoch=3))
    f.arrive("r1", "a")
    f.answer_all()
    assert f.tell(NodeLost(NodeId("n1"), 2)) == []
    assert f.tell(ReplicaLost(NodeId("n1"), ReplicaId("a#9"), ModelId("a"), "?")) == []
    assert f.tell(ReplicaLost(NodeId("n2"), A1, ModelId("a"), "?")) == []
    assert f.tell(ReplicaStopped(NodeId("n1"), ReplicaId("a#9"), ModelId("a"))) == []
    failed = ReplicaFailed(NodeId("n1"), ReplicaId("a#9"), ModelId("a"), "bad_checkpoint", "?")
    assert f.tell(failed) == []
    assert kinds(f.arrive("r2", "a")) == ["Dispatch"]


def test_a_replica_that_its_node_stopped_unasked_is_lost() -> None:
    f = fleet()
    f.arrive("r1", "a")
    f.answer_all()
    f.nodes[NodeId("n1")].forget(A1)
    f.requests["r1"].state = "waiting"  # type: ignore[index]
    assert kinds(f.tell(ReplicaStopped(NodeId("n1"), A1, ModelId("a")))) == [
        "StartReplica",
        "Hold",
    ]


# Admission


def test_a_full_queue_refuses_one_more_and_says_when_to_come_back() -> None:
    f = fleet(queue_limit=2)
    f.arrive("r1", "a")
    f.arrive("r2", "a")
    (reject,) = f.arrive("r3", "a")
    assert isinstance(reject, Reject)
    assert (reject.code, reject.retry_after_s) == ("queue_full", 1.0)
    f.answer_all()
    assert kinds(f.arrive("r4", "a")) == ["Dispatch"]


def test_a_deadline_names_what_the_request_waited_for() -> None:
    f = fleet(model("a"), model("b"), deadline_s=20, slot_patience_s=60)
    f.arrive("a1", "a")
    f.arrive("a2", "a", deadline_s=3.0)
    (late,) = f.tick(3.0)
    assert isinstance(late, Reject)
    assert late.code == "deadline_exceeded"
    assert late.message.endswith("it waited for a#1 on n1, which has been loading for 3.0 s")
    f.answer_all()
    f.arrive("b1", "b")
    assert f.controller.next_wakeup() == 23.0
    (late,) = f.tick(23.0)
    assert isinstance(late, Reject)
    assert late.message == (
        "the request waited 20 s for b and was not started in time: "
        "it waited for a free worker: 1 of 1 are busy"
    )


def test_a_dispatched_request_has_no_deadline() -> None:
    f = fleet(deadline_s=5)
    f.arrive("r1", "a")
    f.answer_all()
    assert f.tick(100.0) == []


def test_an_unknown_model_is_refused() -> None:
    f = fleet()
    (reject,) = f.arrive("r1", "nobody")
    assert isinstance(reject, Reject)
    assert reject.code == "model_not_found"


def test_a_model_too_large_for_every_node_is_refused_with_both_sizes() -> None:
    f = fleet(model("a", 9), nodes=(node("n1", extents=8), node("n2", extents=4)))
    (reject,) = f.arrive("r1", "a")
    assert isinstance(reject, Reject)
    assert reject.code == "model_too_large"
    assert str(9 << 21) in reject.message
    assert str(8 << 21) in reject.message


def test_requests_that_waited_for_the_only_large_node_are_refused_when_it_is_lost() -> None:
    f = fleet(model("a", 6), nodes=(node("n1", extents=8), node("n2", extents=4)))
    f.arrive("r1", "a")
    assert [c.code for c in f.lose_node(NodeId("n1")) if isinstance(c, Reject)] == [
        "model_too_large"
    ]


def test_a_draining_server_finishes_what_has_a_replica_and_refuses_the_rest() -> None:
    f = fleet(model("a"), model("b"), model("c"), nodes=(node(workers=2),))
    f.arrive("a1", "a")
    f.answer_all()
    f.arrive("b1", "b")
    f.arrive("c1", "c")
    (reject,) = f.tell(DrainStarted())
    assert isinstance(reject, Reject)
    assert (reject.request_id, reject.code) == ("c1", "draining")
    (reject,) = f.arrive("a2", "a")
    assert isinstance(reject, Reject)
    assert reject.code == "draining"
    assert [c.request_id for c in f.answer_all() if isinstance(c, Dispatch)] == ["b1"]
    assert kinds(f.lose_replica(A1)) == ["StartReplica", "Hold"]


def test_a_replica_that_is_not_needed_stops_while_draining() -> None:
    f = fleet(keep_alive_s=0)
    f.arrive("r1", "a")
    f.answer_all()
    f.tell(DrainStarted())
    (stop,) = f.finish("r1")
    assert isinstance(stop, StopReplica)
