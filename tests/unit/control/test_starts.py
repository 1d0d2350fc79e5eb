"""One cold start for everyone who waits, and requests to ready replicas."""

from __future__ import annotations

import math

import pytest
from tests.unit.control.fake_nodes import PHASES, Fleet, model, node

from flashserve.config import PolicySettings
from flashserve.messages.commands import Command, Dispatch, Hold, StartReplica, StopReplica
from flashserve.messages.events import (
    ModelDeployed,
    NodeJoined,
    ReplicaReady,
    RequestArrived,
    RequestFinished,
    Staged,
    Tick,
    WorkersChanged,
)
from flashserve.types import (
    ModelId,
    ModelSpec,
    NodeId,
    NodeSpec,
    Phases,
    ReplicaId,
    RequestId,
    Tier,
)


def fleet(*models: ModelSpec, nodes: tuple[NodeSpec, ...] = (node(),), **policy: float) -> Fleet:
    made = Fleet(PolicySettings(**policy))
    for spec in models or (model("a"),):
        made.tell(ModelDeployed(spec))
    for joining in nodes:
        made.join(joining)
    return made


def kinds(commands: list[Command]) -> list[str]:
    return [type(command).__name__ for command in commands]


def test_two_requests_share_one_cold_start() -> None:
    f = fleet()
    start, first = f.arrive("r1", "a")
    assert isinstance(start, StartReplica)
    assert (start.node_id, start.epoch, start.replica_id) == ("n1", 1, "a#1")
    assert start.model == model("a")
    assert start.reason == "disk on n1: 0.15 s predicted"
    assert isinstance(first, Hold)
    f.now = 0.1
    (second,) = f.arrive("r2", "a")
    assert isinstance(second, Hold)
    assert second.reason == "waits for a#1 on n1, which has been loading for 0.10 s"
    assert second.predicted.startup_s == pytest.approx(first.predicted.startup_s - 0.1)
    f.now = 0.7
    dispatched = f.answer_all()
    assert [(c.request_id, c.replica_id) for c in dispatched if isinstance(c, Dispatch)] == [
        ("r1", "a#1"),
        ("r2", "a#1"),
    ]


def test_a_hold_predicts_every_phase() -> None:
    f = fleet(model("a", 750, lowest_tier=Tier.REMOTE), nodes=(node(extents=1000),))
    _, hold = f.arrive("r1", "a")
    assert isinstance(hold, Hold)
    assert hold.tier is Tier.REMOTE
    size = 750 * (2 << 20)
    assert hold.predicted.fetch_s == pytest.approx(size / 300e6)
    assert hold.predicted.dram_s == 0.0  # fetched straight into DRAM
    assert hold.predicted.device_s == pytest.approx(size / 10e9)
    assert hold.predicted.init_s > 0
    assert hold.predicted.prefill_s > 0
    assert hold.predicted.queue_s == 0


def test_a_cold_dispatch_carries_the_start_and_what_was_predicted() -> None:
    f = fleet()
    _, hold = f.arrive("r1", "a")
    assert isinstance(hold, Hold)
    (dispatch,) = f.answer_all()
    assert isinstance(dispatch, Dispatch)
    assert dispatch.tier is Tier.DISK
    assert dispatch.predicted == hold.predicted
    assert dispatch.startup == PHASES


def test_a_warm_request_is_dispatched_at_once() -> None:
    f = fleet()
    f.arrive("r1", "a")
    f.answer_all()
    (dispatch,) = f.arrive("r2", "a")
    assert isinstance(dispatch, Dispatch)
    assert dispatch.tier is Tier.DEVICE
    assert dispatch.startup is None
    assert dispatch.predicted == Phases(prefill_s=0.3)
    assert dispatch.reason == "a#1 is the only one: 1 of 32"


def test_bytes_that_stayed_in_dram_make_the_next_start_a_dram_hit() -> None:
    f = fleet(keep_alive_s=0)
    f.arrive("r1", "a")
    f.answer_all()
    assert kinds(f.finish("r1")) == ["StopReplica"]
    start, hold = f.arrive("r2", "a")
    assert isinstance(start, StartReplica)
    assert start.reason.startswith("dram on n1: ")
    assert isinstance(hold, Hold)
    assert hold.tier is Tier.DRAM
    assert hold.predicted.dram_s == 0.0


def test_a_replica_takes_only_what_it_can_run_and_the_rest_follows_in_order() -> None:
    f = fleet(nodes=(node(max_sequences=2),))
    for i in range(4):
        f.arrive(f"r{i}", "a")
    assert [c.request_id for c in f.answer_all() if isinstance(c, Dispatch)] == ["r0", "r1"]
    (late,) = f.arrive("r4", "a")
    assert isinstance(late, Hold)
    assert late.tier is Tier.DEVICE
    assert late.predicted.queue_s == 10.0  # the third in line for two places, at 5 s each
    assert late.reason == "waits for one of 2 running requests to end"
    (third,) = f.finish("r1")
    assert isinstance(third, Dispatch)
    assert (third.request_id, third.startup) == ("r2", PHASES)
    f.finish("r0")
    (last,) = f.finish("r2")
    assert isinstance(last, Dispatch)
    assert (last.request_id, last.startup, last.tier) == ("r4", None, Tier.DEVICE)


def test_the_nearest_node_is_chosen_by_what_it_holds() -> None:
    f = fleet(model("a", 500), nodes=(node("n1", extents=600), node("n2", extents=600)))
    f.tell(Staged(NodeId("n2"), ModelId("a"), Tier.DRAM, 500 << 21, 0.8))
    f.nodes[NodeId("n2")].dram[ModelId("a")] = 500 << 21
    start, _ = f.arrive("r1", "a")
    assert isinstance(start, StartReplica)
    assert start.node_id == "n2"
    assert "next best n1" in start.reason


def test_learnt_disk_speed_decides_between_nodes() -> None:
    f = fleet(model("a", 500), nodes=(node("n1", extents=600), node("n2", extents=600)))
    f.tell(Staged(NodeId("n1"), ModelId("x"), Tier.DRAM, 10**9, 10.0))
    f.tell(Staged(NodeId("n2"), ModelId("x"), Tier.DRAM, 10**9, 0.5))
    start, _ = f.arrive("r1", "a")
    assert isinstance(start, StartReplica)
    assert start.node_id == "n2"
    assert start.reason == "disk on n2: 0.78 s predicted, next best n1 11 s"


def test_a_node_whose_workers_are_all_starting_is_avoided() -> None:
    f = fleet(nodes=(node("n1"), node("n2")))
    f.tell(WorkersChanged(NodeId("n1"), 0))
    start, _ = f.arrive("r1", "a")
    assert isinstance(start, StartReplica)
    assert start.node_id == "n2"


def test_the_only_node_is_used_even_while_its_workers_start() -> None:
    f = fleet()
    f.tell(WorkersChanged(NodeId("n1"), 0))
    start, hold = f.arrive("r1", "a")
    assert isinstance(start, StartReplica)
    assert isinstance(hold, Hold)
    assert hold.predicted.place_s == pytest.approx(3.0)


def test_absurd_reports_do_not_spoil_the_estimates() -> None:
    f = fleet(keep_alive_s=0)
    _, before = f.arrive("r1", "a")
    for seconds in (math.nan, -1.0, 0.0, math.inf):
        f.tell(Staged(NodeId("n1"), ModelId("z"), Tier.DRAM, 10**9, seconds))
    f.nodes[NodeId("n1")].answers.clear()
    f.now = 1.0
    absurd = Phases(math.nan, -5.0, math.inf, math.nan, 0.0, -1.0, 1e300)
    f.tell(ReplicaReady(NodeId("n1"), ReplicaId("a#1"), ModelId("a"), absurd))
    f.finish("r1", prefill_s=math.nan)
    assert isinstance(before, Hold)
    _, after = f.arrive("r2", "a")
    assert isinstance(after, Hold)
    assert after.predicted.init_s == before.predicted.init_s
    assert after.predicted.prefill_s == before.predicted.prefill_s
    assert after.predicted.device_s == before.predicted.device_s


def test_reported_phases_become_the_next_prediction() -> None:
    f = fleet(keep_alive_s=0)
    f.arrive("r1", "a")
    f.answer_all()
    f.finish("r1", prefill_s=0.7)
    _, hold = f.arrive("r2", "a")
    assert isinstance(hold, Hold)
    assert hold.predicted.init_s == pytest.approx(PHASES.init_s)
    assert hold.predicted.device_s == pytest.approx(PHASES.device_s)
    assert hold.predicted.prefill_s == pytest.approx(0.7)


def test_a_request_without_a_node_waits_for_one() -> None:
    f = fleet(nodes=())
    (hold,) = f.arrive("r1", "a")
    assert isinstance(hold, Hold)
    assert hold.reason == "waits for a node to join"
    assert kinds(f.join(node())) == ["StartReplica"]


def test_the_same_request_twice_is_one_request() -> None:
    f = fleet()
    f.arrive("r1", "a")
    assert f.tell(RequestArrived(RequestId("r1"), ModelId("a"))) == []
    assert [c.request_id for c in f.answer_all() if isinstance(c, Dispatch)] == ["r1"]


def test_a_client_that_leaves_while_waiting_is_not_dispatched() -> None:
    f = fleet()
    f.arrive("r1", "a")
    f.arrive("r2", "a")
    assert f.finish("r1", prefill_s=None) == []
    assert [c.request_id for c in f.answer_all() if isinstance(c, Dispatch)] == ["r2"]


def test_the_end_of_an_unknown_request_is_ignored() -> None:
    f = fleet()
    assert f.tell(RequestFinished(RequestId("nobody"), 0.1)) == []


def test_a_second_ready_is_ignored() -> None:
    f = fleet()
    f.arrive("r1", "a")
    f.answer_all()
    ready = ReplicaReady(NodeId("n1"), ReplicaId("a#1"), ModelId("a"), Phases(init_s=99.0))
    assert f.tell(ready) == []


def test_a_ready_from_another_node_than_the_replica_s_is_ignored() -> None:
    f = fleet(nodes=(node("n1"), node("n2")))
    f.arrive("r1", "a")
    elsewhere = ReplicaReady(NodeId("n2"), ReplicaId("a#1"), ModelId("a"), PHASES)
    assert f.controller.handle(elsewhere, 1.0) == []


# Keep-alive


def test_an_idle_replica_stops_after_its_keep_alive_and_its_bytes_stay() -> None:
    f = fleet(keep_alive_s=300)
    f.arrive("r1", "a")
    f.answer_all()
    f.now = 10.0
    assert f.finish("r1") == []
    assert f.controller.next_wakeup() == 310.0
    assert f.tick(309.9) == []
    (stop,) = f.tick(310.0)
    assert isinstance(stop, StopReplica)
    assert stop.reason == "idle 300 s ≥ keep-alive 300 s"
    view = f.controller.model_view(ModelId("a"))
    assert (view.state, view.tier, view.dram_bytes) == ("cold", Tier.DRAM, 2 << 20)
    assert f.controller.next_wakeup() is None


def test_a_request_in_time_renews_the_keep_alive() -> None:
    f = fleet(keep_alive_s=300)
    f.arrive("r1", "a")
    f.answer_all()
    f.finish("r1")
    f.now = 200.0
    f.arrive("r2", "a")
    assert f.controller.next_wakeup() is None
    f.now = 210.0
    f.finish("r2")
    assert f.controller.next_wakeup() == 510.0


@pytest.mark.parametrize(("own", "expected"), [(5.0, 5.0), (None, 300.0)])
def test_a_model_may_have_its_own_keep_alive(own: float | None, expected: float) -> None:
    f = fleet(model("a", keep_alive_s=own))
    f.arrive("r1", "a")
    f.answer_all()
    f.finish("r1")
    assert f.controller.next_wakeup() == expected


def test_with_a_keep_alive_of_zero_a_replica_nobody_waits_for_stops_when_ready() -> None:
    f = fleet(keep_alive_s=0)
    f.arrive("r1", "a")
    f.finish("r1")
    assert kinds(f.answer_all()) == ["StopReplica"]


def test_a_shorter_keep_alive_holds_for_replicas_that_are_idle_already() -> None:
    f = fleet(keep_alive_s=300)
    f.arrive("r1", "a")
    f.answer_all()
    f.finish("r1")
    f.tell(ModelDeployed(model("a", keep_alive_s=20.0)))
    assert f.controller.next_wakeup() == 20.0
    assert kinds(f.tell(ModelDeployed(model("a", keep_alive_s=0.0)))) == ["StopReplica"]


def test_a_tick_with_nothing_due_does_nothing() -> None:
    f = fleet()
    assert f.controller.next_wakeup() is None
    assert f.tell(Tick()) == []
    assert f.tell(NodeJoined(node())) == []
