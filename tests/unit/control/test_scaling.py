"""Plans of a policy carried out: starts ahead, bounds, stops, bytes that come to DRAM ahead."""

from __future__ import annotations

import dataclasses

from tests.unit.control.fake_nodes import Fleet, model, node

from flashserve.config import PolicySettings
from flashserve.messages.commands import Command, Evict, Stage, StartReplica, StopReplica
from flashserve.messages.events import (
    BoundsChanged,
    DrainStarted,
    EvictRequested,
    ForecastReady,
    ModelDeployed,
    WorkersChanged,
)
from flashserve.policy.baselines import AlwaysOn
from flashserve.policy.cost import Prices
from flashserve.policy.plans import Facts, Plan, Policy
from flashserve.policy.scaling import Predictive
from flashserve.types import ModelId, ModelSpec, NodeSpec, Scaling, SeriesForecast, Tier

LEADS = (60.0, 600.0, 3600.0)
# A start is dear, so that any fair chance of a request is worth an idle window.
PRICES = Prices(wait_per_s=10.0, slo_miss=0.0)


def fleet(
    *models: ModelSpec,
    nodes: tuple[NodeSpec, ...] = (node(),),
    policy: Policy | None = None,
    **settings: object,
) -> Fleet:
    made = Fleet(
        PolicySettings(max_replicas=4, **settings),  # type: ignore[arg-type]
        policy or Predictive(PRICES),
    )
    for spec in nodes:
        made.join(spec)
    for each in models:
        made.tell(ModelDeployed(each))
    return made


def forecast(f: Fleet, name: str, p: float, mean: float = 1.0) -> list[Command]:
    """P(arrival) by the minute; by the hour it is all but certain where there is any."""
    later = 0.999 if p > 0.01 else p
    said = SeriesForecast(
        ModelId(name), f.now, LEADS, (p, later, later), (mean,) * 3, (mean,) * 3, "test"
    )
    return f.tell(ForecastReady((said,)))


def kinds(commands: list[Command]) -> list[str]:
    return [type(command).__name__ for command in commands]


def test_a_forecast_starts_a_replica_ahead_of_its_requests_and_says_why() -> None:
    f = fleet(model("a"))
    (start,) = forecast(f, "a", 0.9)
    assert isinstance(start, StartReplica)
    assert start.reason.startswith("ahead of requests: P(request in")
    assert "disk on n1" in start.reason
    f.answer_all()
    assert kinds(f.arrive("r1", "a")) == ["Dispatch"]


def test_a_forecast_that_expects_nothing_stops_an_idle_replica_at_once() -> None:
    f = fleet(model("a"))
    forecast(f, "a", 0.9)
    f.answer_all()
    f.now = 60.0
    (stop,) = forecast(f, "a", 0.0)
    assert isinstance(stop, StopReplica)
    assert stop.reason.startswith("idle 60 s; P(request in")


def test_without_news_a_replica_that_was_started_ahead_is_reviewed_and_stops_by_itself() -> None:
    f = fleet(model("a"), keep_alive_s=50.0)
    forecast(f, "a", 0.9)
    f.answer_all()
    stopped: list[Command] = []
    while not stopped and (wakeup := f.controller.next_wakeup()) is not None:
        stopped = [c for c in f.tick(wakeup) if isinstance(c, StopReplica)]
    assert stopped, "a forecaster that died would keep it for ever"


def test_a_start_ahead_never_takes_a_worker_from_requests() -> None:
    f = fleet(model("a"), model("b"))
    f.arrive("r1", "a")
    f.answer_all()
    assert kinds(forecast(f, "b", 0.99)) == ["Stage"], "its bytes may come, its replica may not"


def test_a_start_ahead_takes_the_worker_of_an_idle_model_that_is_worth_less() -> None:
    f = fleet(model("a"), model("b"))
    forecast(f, "a", 0.9)
    f.answer_all()
    f.now += 1.0
    said = SeriesForecast(ModelId("a"), f.now, LEADS, (0.05,) * 3, (0.1,) * 3, (1.0,) * 3)
    f.tell(ForecastReady((said,)))
    assert kinds(forecast(f, "b", 0.99))[:2] == ["StopReplica", "StartReplica"]
    f.answer_all()
    f.now += 1.0
    assert "StartReplica" not in kinds(forecast(f, "a", 0.05)), "they must not take turns"


def test_requests_that_wait_go_before_starts_ahead() -> None:
    f = fleet(model("a"), model("b"), nodes=(node(workers=1),))
    forecast(f, "a", 0.9)
    f.answer_all()
    caused = f.arrive("r1", "b")
    assert kinds(caused)[:2] == ["StopReplica", "StartReplica"]


def test_the_least_number_of_replicas_is_ready_before_any_request_and_gives_way_to_nobody() -> None:
    f = fleet(model("a", scaling=Scaling(min_replicas=1)), model("b"))
    assert kinds(f.log) == ["StartReplica"]
    (start,) = f.log
    assert isinstance(start, StartReplica)
    assert start.reason.startswith("min_replicas 1; ")
    f.answer_all()
    assert "StopReplica" not in kinds(f.arrive("r1", "b"))
    f.tick(1e4)
    assert [spec.model_id for spec in f.replicas().values()] == ["a"]


def test_lower_bounds_give_the_worker_back() -> None:
    f = fleet(model("a", scaling=Scaling(min_replicas=1)), keep_alive_s=5.0)
    f.answer_all()
    f.now = 10.0
    assert kinds(f.tell(BoundsChanged(ModelId("a"), Scaling()))) == ["StopReplica"]


def test_bounds_that_grow_start_what_is_missing() -> None:
    f = fleet(model("a"), nodes=(node(workers=3),))
    caused = f.tell(BoundsChanged(ModelId("a"), Scaling(min_replicas=2)))
    caused += f.answer_all()
    assert kinds(caused).count("StartReplica") == 2
    assert len(f.replicas()) == 2


def test_a_lost_replica_of_the_minimum_is_replaced_but_not_in_a_fast_loop() -> None:
    f = fleet(model("a", scaling=Scaling(min_replicas=1)), failure_backoff_s=5.0)
    (replica,) = f.replicas()
    assert "StartReplica" not in kinds(f.lose_replica(replica)), "it was lost while it started"
    wakeup = f.controller.next_wakeup()
    assert wakeup is not None
    assert wakeup >= 5.0
    assert kinds(f.tick(wakeup)) == ["StartReplica"]


def test_load_beyond_a_replica_starts_another_up_to_the_bound() -> None:
    f = fleet(model("a", scaling=Scaling(0, 2, target=2)), nodes=(node(workers=3),))
    for number in range(9):
        f.arrive(f"r{number}", "a")
        f.answer_all()
    assert len(f.replicas()) == 2
    for number in range(9):
        f.finish(f"r{number}")
    f.tick(f.now + 1e4)
    assert len(f.replicas()) == 0


def test_bytes_of_a_model_that_is_expected_come_to_dram_ahead() -> None:
    f = fleet(model("a"), policy=Predictive(Prices(gpu_per_s=1e3)))  # too dear to start ahead
    (stage,) = forecast(f, "a", 0.5)
    assert isinstance(stage, Stage)
    assert stage.tier is Tier.DRAM
    assert "starts expected: worth its place in DRAM" in stage.reason
    assert forecast(f, "a", 0.5) == [], "it is on its way"


def test_a_request_long_after_the_last_forecast_does_not_hold_a_worker_for_the_keep_alive() -> None:
    f = fleet(model("a"), keep_alive_s=300.0)
    forecast(f, "a", 0.001)
    f.now = 500.0  # nothing has changed since, so nothing was told
    f.arrive("r1", "a")
    f.answer_all()
    f.finish("r1")
    assert "after a request" in f.controller.model_view(ModelId("a")).plan


def test_a_quiet_model_is_not_planned_anew_for_each_forecast_that_changes_nothing() -> None:
    class Counting(Predictive):
        num_plans = 0

        def plan(self, facts: Facts, now: float) -> Plan:
            self.num_plans += 1
            return super().plan(facts, now)

    policy = Counting(Prices())
    f = fleet(model("a"), policy=policy)
    for p in (0.00002, 0.00004, 0.00002):
        forecast(f, "a", p)
    assert policy.num_plans == 2, "when it was deployed, and by its first forecast"
    assert kinds(forecast(f, "a", 0.999)) == ["StartReplica"]


def test_what_somebody_had_evicted_comes_back_by_a_request_and_not_by_a_forecast() -> None:
    f = fleet(model("a"))
    forecast(f, "a", 0.9)
    f.answer_all()
    f.tell(EvictRequested(ModelId("a"), Tier.DRAM))
    f.answer_all()
    assert forecast(f, "a", 0.99) == []
    assert kinds(f.arrive("r1", "a"))[:1] == ["StartReplica"]
    f.answer_all()
    f.finish("r1")
    f.now += 60.0
    assert "StopReplica" not in kinds(forecast(f, "a", 0.99))


def test_bytes_ahead_take_the_place_of_what_is_worth_less_and_of_nothing_else() -> None:
    dear = Predictive(Prices(gpu_per_s=1e3))
    f = fleet(model("a", 5), model("b", 5), nodes=(node(extents=8),), policy=dear)
    forecast(f, "a", 0.5)
    f.answer_all()
    assert forecast(f, "b", 0.5) == [], "as much is expected of what would have to leave"
    f.now += 1.0
    said = SeriesForecast(ModelId("a"), f.now, LEADS, (0.0,) * 3, (0.0,) * 3, (0.0,) * 3)
    f.tell(ForecastReady((said,)))
    caused = forecast(f, "b", 0.5)
    assert [type(command) for command in caused] == [Evict, Stage]


def test_bytes_ahead_come_one_after_the_other_those_that_are_wanted_soonest_first() -> None:
    dear = Predictive(Prices(gpu_per_s=1e3))
    f = fleet(model("a", 5), model("b", 5), model("c", 5), nodes=(node(extents=24),), policy=dear)
    (first,) = forecast(f, "a", 0.3)
    assert isinstance(first, Stage)
    assert forecast(f, "b", 0.2) == [], "the node is bringing another"
    assert forecast(f, "c", 0.6) == []
    f.answer_all()
    staged = [command.model.model_id for command in f.log if isinstance(command, Stage)]
    assert staged == ["a", "c", "b"]


def test_a_start_ahead_that_would_read_for_long_brings_its_bytes_to_dram_first() -> None:
    f = fleet(model("a", 1000), nodes=(node(extents=1200),), policy=Predictive(Prices(slo_s=0.01)))
    (first,) = forecast(f, "a", 0.99)
    assert isinstance(first, Stage)
    f.answer_all()
    assert [type(command) for command in f.log[-2:]] == [Stage, StartReplica]


def test_a_stage_ahead_that_failed_is_not_repeated_at_once() -> None:
    f = fleet(model("a", 5), nodes=(node(extents=8),), policy=Predictive(Prices(gpu_per_s=1e3)))
    fake = next(iter(f.nodes.values()))
    fake.dram[ModelId("stranger")] = fake.spec.dram_bytes  # whatever we count, it is full
    forecast(f, "a", 0.5)
    f.answer_all()
    f.now += 10.0
    assert forecast(f, "a", 0.5) == []


def test_nothing_starts_ahead_once_the_server_drains() -> None:
    f = fleet(model("a"))
    f.tell(DrainStarted())
    assert forecast(f, "a", 0.99) == []


def test_a_forecast_of_an_adapter_or_of_nobody_changes_nothing() -> None:
    f = fleet(model("a"))
    assert forecast(f, "a:polite", 0.99) == []
    assert forecast(f, "gone", 0.99) == []


def test_always_on_fills_the_workers_and_lets_requests_of_others_in() -> None:
    f = fleet(model("a"), model("b"), model("c"), nodes=(node(workers=2),), policy=AlwaysOn())
    f.answer_all()
    assert len(f.replicas()) == 2
    f.arrive("r1", "c")
    f.answer_all()
    assert f.running() == ["r1"]


class Recording:
    """Asks for nothing, and notes what it was told."""

    name = "recording"
    shares_slots = True

    def __init__(self) -> None:
        self.told: list[Facts] = []
        self.arrivals: list[tuple[ModelId, float]] = []
        self.forgotten: list[ModelId] = []

    def arrived(self, model_id: ModelId, now: float) -> None:
        self.arrivals.append((model_id, now))

    def plan(self, facts: Facts, now: float) -> Plan:
        self.told.append(facts)
        return Plan(0, 60.0, review_at=now - 5.0)  # in the past: it must not be asked in a loop

    def forget(self, model_id: ModelId) -> None:
        self.forgotten.append(model_id)


def test_a_policy_is_told_how_its_model_stands() -> None:
    policy = Recording()
    f = fleet(model("a", keep_alive_s=7.0, scaling=Scaling(0, None, 3)), policy=policy)
    f.now = 5.0
    f.arrive("r1", "a")
    f.arrive("r2", "a")
    last = policy.told[-1]
    assert (last.waiting, last.in_flight, last.num_replicas) == (2, 0, 1)
    assert (last.keep_alive_s, last.has_own_keep_alive) == (7.0, True)
    assert (last.max_replicas, last.scaling.target) == (4, 3)
    assert last.idle_since is None
    f.answer_all()
    f.now = 9.0
    f.finish("r1")
    f.finish("r2")
    last = policy.told[-1]
    assert (last.in_flight, last.idle_since, last.last_arrival_at) == (0, 9.0, 5.0)
    assert policy.arrivals == [("a", 5.0), ("a", 5.0)]


def test_a_plan_whose_time_is_past_is_asked_for_again_a_second_later() -> None:
    f = fleet(model("a"), policy=Recording())
    assert f.controller.next_wakeup() == 1.0


def test_a_policy_that_shares_no_slots_keeps_idle_replicas_from_others() -> None:
    policy = Recording()
    policy.shares_slots = False
    f = fleet(model("a"), model("b"), policy=policy)
    f.arrive("r1", "a")
    f.answer_all()
    f.finish("r1")
    assert "StopReplica" not in kinds(f.arrive("r2", "b"))
    f.tick(f.now + 61.0)
    f.answer_all()
    assert f.running() == ["r2"]


def test_workers_that_come_and_go_leave_plans_as_they_are() -> None:
    f = fleet(dataclasses.replace(model("a"), scaling=Scaling(1, 1)))
    f.answer_all()
    assert f.tell(WorkersChanged(next(iter(f.nodes)), 0)) == []
