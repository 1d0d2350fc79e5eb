from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.control.fake_nodes import model, node
from tests.unit.control.worlds import World

from flashserve.config import PolicySettings
from flashserve.control.ledger import Ledger
from flashserve.control.shadow import Shadow
from flashserve.control.usage import WorkerUsage
from flashserve.messages.commands import Command, Dispatch, Hold, Reject
from flashserve.messages.events import (
    BoundsChanged,
    Event,
    ForecastReady,
    ModelDeleted,
    ModelDeployed,
    NodeJoined,
    RequestArrived,
    RequestFinished,
    Tick,
)
from flashserve.policy.baselines import AlwaysOn, FixedKeepAlive
from flashserve.policy.plans import Facts, Plan, Policy
from flashserve.types import (
    ModelId,
    NodeId,
    Phases,
    ReplicaId,
    RequestId,
    Scaling,
    SeriesForecast,
    Tier,
)

M = ModelId("m")
NO_PHASES = Phases()


class Planned:
    """Answers what it is told to."""

    name, shares_slots = "planned", True

    def __init__(self, *plans: Plan) -> None:
        self.plans = list(plans)
        self.asked: list[tuple[float, Facts]] = []

    def arrived(self, model_id: ModelId, now: float) -> None:
        pass

    def forget(self, model_id: ModelId) -> None:
        pass

    def plan(self, facts: Facts, now: float) -> Plan:
        self.asked.append((now, facts))
        return self.plans.pop(0) if len(self.plans) > 1 else self.plans[0]


class World1:
    """One model whose starts take about `start_s`, and a real world that is told by hand."""

    def __init__(self, policy: Policy, *, limit: int = 4, max_replicas: int = 8) -> None:
        self.shadow = Shadow(policy, PolicySettings(max_replicas=max_replicas), slo_s=1.0)
        self.tell(NodeJoined(node(max_sequences=limit)), 0.0)
        self.tell(ModelDeployed(model("m")), 0.0)

    def tell(self, event: Event, now: float, *commands: Command) -> None:
        self.shadow.observe(event, commands, now)

    def request(self, name: str, at: float, dispatched_at: float, end: float) -> None:
        """One request alone in the real world."""
        request_id = RequestId(name)
        sent = Dispatch(
            request_id, NodeId("n1"), ReplicaId("m#1"), Tier.DRAM, NO_PHASES, None, "why"
        )
        if at == dispatched_at:
            self.tell(RequestArrived(request_id, M), at, sent)
        else:
            hold = Hold(request_id, Tier.DRAM, NO_PHASES, "why")
            self.tell(RequestArrived(request_id, M), at, hold)
            self.tell(Tick(), dispatched_at, sent)
        self.tell(RequestFinished(request_id, 0.1), end)

    def usage(self, now: float) -> WorkerUsage:
        return self.shadow.drain(now).get(M, WorkerUsage())


def test_a_keep_alive_pays_for_the_start_the_answer_and_the_time_after_it() -> None:
    world = World1(FixedKeepAlive(60.0))
    world.request("a", 100.0, 100.0, 110.0)
    usage = world.usage(1000.0)
    start_s = usage.loading_s
    assert 0.1 < start_s < 1.0
    assert usage.busy_s == pytest.approx(10.0)
    assert usage.idle_s == pytest.approx(60.0)
    assert (usage.requests, usage.cold, usage.misses) == (1, 1, 0)
    assert usage.wait_s == pytest.approx(start_s)


def test_within_the_keep_alive_a_request_is_warm() -> None:
    world = World1(FixedKeepAlive(60.0))
    world.request("a", 100.0, 100.0, 110.0)
    world.request("b", 169.0, 169.0, 170.0)
    world.request("c", 240.0, 240.0, 241.0)
    usage = world.usage(1000.0)
    assert (usage.requests, usage.cold) == (3, 2)
    assert usage.busy_s == pytest.approx(12.0)


def test_always_on_idles_from_the_deployment_on() -> None:
    world = World1(AlwaysOn())
    world.request("a", 100.0, 105.0, 110.0)  # the real server was cold
    usage = world.usage(1000.0)
    assert (usage.cold, usage.wait_s) == (0, 0.0)
    assert usage.held_s == pytest.approx(1000.0)
    assert usage.busy_s == pytest.approx(5.0)


def test_a_request_that_the_real_server_refused_for_want_of_room_is_served_here() -> None:
    world = World1(FixedKeepAlive(10.0))
    world.request("a", 0.0, 0.0, 4.0)
    refused = RequestArrived(RequestId("b"), M)
    world.tell(refused, 100.0, Reject(RequestId("b"), "queue_full", "full"))
    world.tell(RequestFinished(RequestId("b")), 100.0)
    usage = world.usage(1000.0)
    assert usage.requests == 2
    assert usage.busy_s == pytest.approx(8.0)


def test_a_request_that_could_be_served_nowhere_counts_for_nothing() -> None:
    world = World1(FixedKeepAlive(0.0))
    world.tell(RequestArrived(RequestId("b"), M), 1.0, Reject(RequestId("b"), "draining", "no"))
    world.tell(RequestArrived(RequestId("c"), M), 2.0)
    world.tell(RequestFinished(RequestId("c")), 2.1)  # its client left
    usage = world.usage(1000.0)
    assert (usage.requests, usage.busy_s) == (0, 0.0)


def test_more_requests_than_one_replica_takes_wait_or_get_another() -> None:
    for max_replicas, expected in ((1, 0), (8, 1)):
        world = World1(AlwaysOn(), limit=2, max_replicas=max_replicas)
        for i in range(3):
            request_id = RequestId(str(i))
            sent = Dispatch(
                request_id, NodeId("n1"), ReplicaId("m#1"), Tier.DRAM, NO_PHASES, None, "why"
            )
            world.tell(RequestArrived(request_id, M), 100.0, sent)
        for i in range(3):
            world.tell(RequestFinished(RequestId(str(i)), 0.1), 110.0)
        usage = world.usage(1000.0)
        assert usage.requests == 3
        assert usage.cold == expected


def test_the_policy_is_asked_at_the_time_that_it_named() -> None:
    class Timed(Planned):
        def plan(self, facts: Facts, now: float) -> Plan:
            super().plan(facts, now)
            if now < 50.0:
                return Plan(0, 10.0, review_at=50.0)
            return Plan(1, 10.0, review_at=80.0) if now < 80.0 else Plan(0, 0.0)

    policy = Timed(Plan(0, 0.0))
    world = World1(policy)
    usage = world.usage(1000.0)
    when = [when for when, _ in policy.asked]
    assert when[:2] == [0.0, 50.0]
    assert when[-1] == 80.0
    assert usage.loading_s + usage.idle_s == pytest.approx(30.0)
    assert usage.cold == 0


@pytest.mark.parametrize(
    "plan",
    [
        Plan(10**9, 0.0),
        Plan(-5, -1.0, review_at=-math.inf),
        Plan(1, math.nan, review_at=math.nan),
        Plan(10**9, math.inf, review_at=0.0),
    ],
)
def test_a_policy_that_answers_nonsense_stays_within_bounds(plan: Plan) -> None:
    world = World1(Planned(plan), max_replicas=2)
    world.request("a", 100.0, 100.0, 110.0)
    usage = world.usage(200.0)
    assert usage.requests == 1
    assert 0.0 <= usage.held_s <= 2 * 200.0


def test_bounds_and_forecasts_reach_the_policy() -> None:
    policy = Planned(Plan(0, 0.0))
    world = World1(policy)
    world.tell(BoundsChanged(M, Scaling(1, 3, 2)), 5.0)
    forecast = SeriesForecast(M, 6.0, (60.0,), (0.5,), (0.5,), (1.0,))
    world.tell(ForecastReady((forecast,)), 6.0)
    facts = policy.asked[-1][1]
    assert facts.scaling == Scaling(1, 3, 2)
    assert facts.forecast is not None
    assert facts.forecast.said == forecast
    assert world.usage(100.0).held_s == pytest.approx(95.0)


def test_a_deleted_model_is_forgotten_once_it_is_accounted_for() -> None:
    world = World1(AlwaysOn())
    world.tell(RequestArrived(RequestId("a"), M), 10.0)
    world.tell(ModelDeleted(M), 20.0)
    world.tell(RequestFinished(RequestId("a")), 21.0)
    assert world.usage(30.0).held_s == pytest.approx(20.0)
    assert world.usage(50.0).held_s == 0.0


def test_nothing_of_a_deleted_model_stays() -> None:
    world = World1(FixedKeepAlive(0.0))
    for i in range(9):
        request_id = RequestId(str(i))
        world.tell(RequestArrived(request_id, M), 10.0, Reject(request_id, "queue_full", "full"))
    world.tell(ModelDeleted(M), 10.1)
    assert not world.shadow._requests


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 5.0, 60.0]))
def test_with_room_for_all_the_shadow_of_the_same_policy_takes_what_the_server_takes(
    seed: int, keep_alive_s: float
) -> None:
    ledger = Ledger(slo_s=1.0)
    shadow = Shadow(FixedKeepAlive(keep_alive_s), PolicySettings(max_replicas=8), slo_s=1.0)
    world = World(FixedKeepAlive(keep_alive_s), [ledger.observe, shadow.observe])
    world.play_random(seed)
    real, other = WorkerUsage(), WorkerUsage()
    for usage in ledger.drain(world.now).values():
        real.add(usage)
    for usage in shadow.drain(world.now).values():
        other.add(usage)
    assert other.requests == real.requests
    # Starts of three models are estimated until the first was seen; a request may fall between.
    assert other.held_s == pytest.approx(real.held_s, rel=0.05, abs=10.0)
    # Where nothing is kept, many a request comes just before or after another one's end.
    assert abs(other.cold - real.cold) <= 3 + 0.1 * real.cold
