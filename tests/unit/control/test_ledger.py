from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.control.fake_nodes import PHASES, model, node
from tests.unit.control.worlds import World

from flashserve.control.ledger import AHEAD, Ledger, Series
from flashserve.messages.commands import Dispatch, StartReplica, StopReplica
from flashserve.messages.events import (
    ModelDeleted,
    NodeJoined,
    NodeLost,
    ReplicaLost,
    ReplicaReady,
    RequestArrived,
    RequestFinished,
    Tick,
)
from flashserve.policy.baselines import FixedKeepAlive
from flashserve.types import ModelId, NodeId, Phases, ReplicaId, RequestId, Tier

M, N, R = ModelId("m"), NodeId("n1"), ReplicaId("m#1")
ACME, LABS = Series(M, "", "acme"), Series(M, "tone", "labs")
START = StartReplica(N, 1, R, model("m"), "asked for")
STOP = StopReplica(N, 1, R, model("m"), "idle")


def arrived(name: str, series: Series = ACME) -> RequestArrived:
    return RequestArrived(RequestId(name), M, adapter=series.adapter, tenant=series.tenant)


def dispatch(name: str, *, cold: bool = False) -> Dispatch:
    startup = PHASES if cold else None
    return Dispatch(RequestId(name), N, R, Tier.DRAM, Phases(), startup, "why")


def ready() -> ReplicaReady:
    return ReplicaReady(N, R, M, PHASES)


def finished(name: str) -> RequestFinished:
    return RequestFinished(RequestId(name), 0.1)


def test_a_start_a_request_and_the_keep_alive_after_it_belong_to_who_asked() -> None:
    ledger = Ledger(slo_s=1.0)
    ledger.observe(arrived("r"), [START], 10.0)
    ledger.observe(ready(), [dispatch("r", cold=True)], 12.0)
    ledger.observe(finished("r"), [], 17.0)
    ledger.observe(Tick(), [STOP], 47.0)
    (usage,) = ledger.drain(50.0).values()
    assert (usage.loading_s, usage.busy_s, usage.idle_s) == (2.0, 5.0, 30.0)
    assert (usage.requests, usage.cold, usage.wait_s, usage.misses) == (1, 1, 2.0, 1)
    assert ledger.drain(60.0) == {}


def test_requests_side_by_side_share_the_replica() -> None:
    ledger = Ledger(slo_s=1.0)
    ledger.observe(arrived("a"), [START], 0.0)
    ledger.observe(ready(), [dispatch("a", cold=True)], 0.0)
    ledger.observe(arrived("b", LABS), [dispatch("b")], 4.0)
    ledger.observe(finished("a"), [], 10.0)
    ledger.observe(finished("b"), [], 12.0)
    usage = ledger.drain(12.0)
    assert usage[ACME].busy_s == 4.0 + 3.0
    assert usage[LABS].busy_s == 3.0 + 2.0
    assert (usage[LABS].requests, usage[LABS].cold) == (1, 0)


def test_a_start_is_shared_by_those_who_waited_for_it() -> None:
    ledger = Ledger(slo_s=5.0)
    ledger.observe(arrived("a"), [START], 0.0)
    ledger.observe(arrived("b", LABS), [], 3.0)
    ledger.observe(ready(), [dispatch("a", cold=True), dispatch("b", cold=True)], 4.0)
    usage = ledger.drain(4.0)
    assert usage[ACME].loading_s == usage[LABS].loading_s == 2.0
    assert (usage[ACME].wait_s, usage[LABS].wait_s) == (4.0, 1.0)
    assert usage[ACME].misses == 0


def test_a_start_that_nobody_waited_for_was_ahead_of_requests() -> None:
    ledger = Ledger(slo_s=1.0)
    ledger.observe(Tick(), [START], 0.0)
    ledger.observe(ready(), [], 2.0)
    ledger.observe(arrived("a"), [dispatch("a")], 5.0)
    ledger.observe(finished("a"), [], 6.0)
    usage = ledger.drain(8.0)
    ahead = usage[Series(M, "", AHEAD)]
    assert (ahead.loading_s, ahead.idle_s) == (2.0, 3.0)
    assert (usage[ACME].busy_s, usage[ACME].idle_s, usage[ACME].cold) == (1.0, 2.0, 0)


def test_what_goes_on_is_counted_up_to_the_drain_and_only_once() -> None:
    ledger = Ledger(slo_s=1.0)
    ledger.observe(arrived("a"), [START], 0.0)
    ledger.observe(ready(), [dispatch("a", cold=True)], 0.0)
    assert ledger.drain(3.0)[ACME].busy_s == 3.0
    ledger.observe(finished("a"), [], 5.0)
    assert ledger.drain(5.0)[ACME].busy_s == 2.0
    assert ledger.drain(9.0)[ACME].idle_s == 4.0


@pytest.mark.parametrize(
    "end",
    [ReplicaLost(N, R, M, "killed"), NodeLost(N, 1), NodeJoined(node(epoch=2))],
)
def test_a_replica_that_is_lost_costs_nothing_any_more(end: object) -> None:
    ledger = Ledger(slo_s=1.0)
    ledger.observe(NodeJoined(node(epoch=1)), [], 0.0)
    ledger.observe(arrived("a"), [START], 0.0)
    ledger.observe(ready(), [dispatch("a", cold=True)], 0.0)
    ledger.observe(end, [], 5.0)  # type: ignore[arg-type]
    again = ReplicaId("m#2")
    start = StartReplica(N, 2, again, model("m"), "again")
    ledger.observe(Tick(), [start], 6.0)
    onward = Dispatch(RequestId("a"), N, again, Tier.DRAM, Phases(), PHASES, "goes on")
    ledger.observe(ReplicaReady(N, again, M, PHASES), [onward], 8.0)
    ledger.observe(finished("a"), [], 9.0)
    (usage,) = ledger.drain(9.0).values()
    assert (usage.busy_s, usage.loading_s, usage.requests, usage.cold) == (6.0, 2.0, 1, 1)


def test_a_loss_of_an_earlier_life_of_the_node_changes_nothing() -> None:
    ledger = Ledger(slo_s=1.0)
    ledger.observe(NodeJoined(node(epoch=2)), [], 0.0)
    ledger.observe(Tick(), [START], 0.0)
    ledger.observe(ready(), [], 0.0)
    ledger.observe(NodeLost(N, 1), [], 1.0)
    (usage,) = ledger.drain(5.0).values()
    assert usage.idle_s == 5.0


def test_what_is_not_known_is_left_out() -> None:
    ledger = Ledger(slo_s=1.0)
    ledger.observe(finished("x"), [dispatch("x"), STOP], 1.0)
    ledger.observe(ready(), [], 2.0)
    ledger.observe(ModelDeleted(M), [], 3.0)
    assert ledger.drain(4.0) == {}


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(0, 40))
def test_every_second_of_every_replica_is_somebodys(seed: int, keep_alive_s: int) -> None:
    ledger = Ledger(slo_s=1.0)
    world = World(FixedKeepAlive(float(keep_alive_s)), [ledger.observe])
    world.play_random(seed)
    charged = ledger.drain(world.now)
    assert math.fsum(usage.held_s for usage in charged.values()) == pytest.approx(world.held_s())
    assert sum(usage.requests for usage in charged.values()) == world.num_dispatched
