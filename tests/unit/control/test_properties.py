"""Whatever happens, in whatever order: no request is lost, nothing is exceeded, nobody starves."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from tests.unit.control.fake_nodes import Fleet, model, node

from flashserve.config import PolicySettings
from flashserve.control.records import Model, Node, Status
from flashserve.messages import events
from flashserve.messages.commands import Reject
from flashserve.policy import baselines
from flashserve.policy.cost import Prices, extent_bytes
from flashserve.policy.histogram import HybridHistogram
from flashserve.policy.plans import Facts, Plan, Policy
from flashserve.policy.scaling import Predictive
from flashserve.types import (
    ModelId,
    ModelSpec,
    NodeId,
    Phases,
    RequestId,
    Scaling,
    SeriesForecast,
    Tier,
)

MODELS = [
    model("a"),
    model("b", 2),
    model("c", 3, keep_alive_s=0.0),
    model("d", 5, keep_alive_s=2.0),
    model("e", 2, lowest_tier=Tier.REMOTE),
    model("huge", 50),
]
NAMES = st.sampled_from([spec.model_id for spec in MODELS])
NODES = {"n1": node("n1", 2, 6, max_sequences=3), "n2": node("n2", 1, 5, max_sequences=3)}
NODE_NAMES = st.sampled_from(sorted(NODES))
TIERS = st.sampled_from([Tier.DISK, Tier.DRAM])


class Liar(baselines.FixedKeepAlive):
    """Says what no policy may mean, one thing after the other."""

    _REPLICAS = (0, 10**9, -1, 1)
    _NUMBERS = (math.nan, -1.0, math.inf, 0.0, 1e300, -math.inf, 3.0)

    def __init__(self) -> None:
        super().__init__()
        self._replicas = itertools.cycle(self._REPLICAS)
        self._numbers = itertools.cycle(self._NUMBERS)

    def plan(self, facts: Facts, now: float) -> Plan:
        keep_idle_s, review_at, rate = itertools.islice(self._numbers, 3)
        return Plan(next(self._replicas), keep_idle_s, review_at, rate)


POLICIES: dict[str, Callable[[], Policy]] = {
    "keep-alive": baselines.FixedKeepAlive,
    "always-on": baselines.AlwaysOn,
    "reactive": baselines.Reactive,
    "serverlessllm": baselines.ServerlessLlm,
    "histogram": HybridHistogram,
    "flashserve": lambda: Predictive(Prices()),
    "flashserve, starts dear": lambda: Predictive(Prices(wait_per_s=100.0)),
    "liar": Liar,
}
SCALINGS = [Scaling(), Scaling(0, 1), Scaling(1, 1), Scaling(1, 2), Scaling(0, 3, 1)]
LEADS = (60.0, 300.0, 1800.0)


class Anything(RuleBasedStateMachine):
    """Random events and faults, through nodes that check every order they get."""

    def __init__(self) -> None:
        super().__init__()
        self.num_requests = 0
        self.epochs = dict.fromkeys(NODES, 0)

    @initialize(
        patience=st.sampled_from([0.0, 1.0, 10.0]),
        backoff=st.sampled_from([0.0, 2.0]),
        queue_limit=st.sampled_from([3, 50]),
        deadline=st.sampled_from([5.0, 1e5]),
        keep_alive=st.sampled_from([0.0, 5.0, 300.0]),
        policy=st.sampled_from(sorted(POLICIES)),
        max_replicas=st.sampled_from([1, 2]),
    )
    def begin(
        self,
        patience: float,
        backoff: float,
        queue_limit: int,
        deadline: float,
        keep_alive: float,
        policy: str,
        max_replicas: int,
    ) -> None:
        self.fleet = Fleet(
            PolicySettings(
                slot_patience_s=patience,
                failure_backoff_s=backoff,
                queue_limit=queue_limit,
                deadline_s=deadline,
                keep_alive_s=keep_alive,
                max_replicas=max_replicas,
            ),
            POLICIES[policy](),
        )
        for spec in MODELS:
            self.fleet.tell(events.ModelDeployed(spec))
        self.join("n1")

    @rule(name=NODE_NAMES)
    def join(self, name: str) -> None:
        self.epochs[name] += 1
        self.fleet.join(dataclasses.replace(NODES[name], epoch=self.epochs[name]))

    @rule(name=NAMES, deadline=st.sampled_from([None, None, 0.5, 3.0]))
    def arrive(self, name: str, deadline: float | None) -> None:
        self.num_requests += 1
        caused = self.fleet.arrive(f"r{self.num_requests}", name, deadline)
        about = [c for c in caused if getattr(c, "request_id", None) == f"r{self.num_requests}"]
        assert len(about) == 1, "a request gets exactly one answer when it arrives"

    @rule(name=NAMES, number=st.integers(2, 6))
    def arrive_together(self, name: str, number: int) -> None:
        for _ in range(number):
            self.arrive(name, None)

    @precondition(lambda self: self.fleet.requests)
    @rule(data=st.data(), prefill=st.sampled_from([None, 0.1, 0.0, -1.0, float("nan"), 1e300]))
    def finish(self, data: st.DataObject, prefill: float | None) -> None:
        alive = self.fleet.running() + self.fleet.waiting()
        if alive:
            self.fleet.finish(data.draw(st.sampled_from(alive)), prefill)

    @rule()
    def finish_all_running(self) -> None:
        for request_id in self.fleet.running():
            self.fleet.finish(request_id)

    @rule(data=st.data())
    def answer(self, data: st.DataObject) -> None:
        pending = [(n, m) for n, fake in self.fleet.nodes.items() for m in fake.answers]
        if pending:
            self.fleet.answer_one(*data.draw(st.sampled_from(pending)))

    @rule()
    def answer_all(self) -> None:
        self.fleet.answer_all()

    @rule()
    def wake(self) -> None:
        if (wakeup := self.fleet.controller.next_wakeup()) is not None:
            self.fleet.tick(wakeup)

    @rule(seconds=st.sampled_from([0.0, 0.4, 1.0, 7.0, 400.0]))
    def pass_time(self, seconds: float) -> None:
        self.fleet.tick(self.fleet.now + seconds)

    @rule(seconds=st.sampled_from([0.1, 2.0]))
    def pass_time_without_a_tick(self, seconds: float) -> None:
        self.fleet.now += seconds

    @rule(seconds=st.sampled_from([0.5, 1e4]))
    def step_the_clock_back(self, seconds: float) -> None:
        self.fleet.now -= seconds

    @rule(
        name=NODE_NAMES,
        model_id=NAMES,
        number=st.sampled_from([-1, 0, 1, 1 << 62]),
        seconds=st.sampled_from([math.nan, -1.0, 0.0, 1e-300, math.inf]),
    )
    def report_nonsense(self, name: str, model_id: ModelId, number: int, seconds: float) -> None:
        """A rate that is none, for bytes that the node holds or holds not."""
        fake = self.fleet.nodes.get(NodeId(name))
        if fake is not None and not fake.answers.get(model_id):
            held = model_id in fake.dram
            tier = Tier.DRAM if held else Tier.REMOTE
            self.fleet.tell(events.Staged(NodeId(name), model_id, tier, number, seconds))

    @rule(seconds=st.sampled_from([math.nan, -1.0, 0.0, 1e-300, math.inf, 1e300]))
    def start_at_nonsense_speed(self, seconds: float) -> None:
        phases = Phases(*[seconds] * 7)
        self.fleet.answer_phases(phases)

    @rule(data=st.data())
    def lose_replica(self, data: st.DataObject) -> None:
        if replicas := sorted(self.fleet.replicas()):
            self.fleet.lose_replica(data.draw(st.sampled_from(replicas)))

    @rule(data=st.data(), code=st.sampled_from(["unavailable", "bad_checkpoint"]))
    def fail_start(self, data: st.DataObject, code: str) -> None:
        starting = sorted(
            r for fake in self.fleet.nodes.values() for r in fake.replicas if r not in fake.ready
        )
        if starting:
            self.fleet.fail_replica(data.draw(st.sampled_from(starting)), code)

    @precondition(lambda self: len(self.fleet.nodes) > 1)
    @rule(name=NODE_NAMES)
    def lose_node(self, name: str) -> None:
        self.fleet.lose_node(NodeId(name))

    @rule(name=NODE_NAMES, number=st.integers(-1, 5))
    def change_workers(self, name: str, number: int) -> None:
        self.fleet.tell(events.WorkersChanged(NodeId(name), number))

    @rule(name=NAMES, tier=TIERS)
    def stage(self, name: ModelId, tier: Tier) -> None:
        self.fleet.tell(events.StageRequested(name, tier))

    @rule(name=NAMES, tier=TIERS)
    def evict(self, name: ModelId, tier: Tier) -> None:
        self.fleet.tell(events.EvictRequested(name, tier))

    @rule(spec=st.sampled_from(MODELS), source=st.sampled_from(["/x", "/y"]))
    def deploy(self, spec: ModelSpec, source: str) -> None:
        self.fleet.tell(events.ModelDeployed(dataclasses.replace(spec, source=source)))

    @rule(
        name=NAMES,
        p=st.sampled_from([0.0, 0.01, 0.5, 1.0, 7.0, float("nan")]),
        count=st.sampled_from([0.0, 3.0, 1e9, float("inf")]),
        age=st.sampled_from([0.0, 30.0, 1e4, -1e4]),
    )
    def forecast(self, name: ModelId, p: float, count: float, age: float) -> None:
        made_at = self.fleet.now - age
        said = SeriesForecast(name, made_at, LEADS, (p,) * 3, (count,) * 3, (count,) * 3)
        self.fleet.tell(events.ForecastReady((said,)))

    @rule(name=st.sampled_from(["a", "b", "d"]), scaling=st.sampled_from(SCALINGS))
    def bound(self, name: str, scaling: Scaling) -> None:
        self.fleet.tell(events.BoundsChanged(ModelId(name), scaling))

    @rule(name=NAMES)
    def delete(self, name: ModelId) -> None:
        self.fleet.tell(events.ModelDeleted(name))

    @precondition(lambda self: self.num_requests > 12)
    @rule()
    def drain(self) -> None:
        self.fleet.tell(events.DrainStarted())

    @invariant()
    def accounts_are_true(self) -> None:
        if hasattr(self, "fleet"):
            check_accounts(self.fleet)

    def teardown(self) -> None:
        if hasattr(self, "fleet"):
            settle(self.fleet)


def check_accounts(fleet: Fleet) -> None:
    """Every index of the controller's state equals what its records say."""
    state = fleet.controller._state
    assert set(state.replicas) == set(fleet.replicas())
    for fake in fleet.nodes.values():
        known = state.nodes[fake.spec.node_id]
        assert set(known.replicas) == set(fake.replicas)
        assert len(known.replicas) <= fake.spec.num_workers
        assert known.used_bytes == sum(r.num_bytes for r in known.resident.values())
        assert known.used_bytes <= known.capacity_bytes
        assert fake.dram.items() <= {m: r.num_bytes for m, r in known.resident.items()}.items()
        pinned = {r.model_id for r in known.replicas.values() if not r.is_spare}
        assert known.num_staging == sum(r.is_staging for r in known.resident.values())
        pinned |= {m for m, resident in known.resident.items() if resident.is_staging}
        assert {m for m, r in known.resident.items() if r.is_pinned} == pinned
        assert known.pinned_bytes == sum(known.resident[m].num_bytes for m in pinned)
        held = {r.model_id for r in known.replicas.values()}
        assert set(known.evictable) == set(known.resident) - pinned - held
        assert set(known.idle) == {r.replica_id for r in known.replicas.values() if r.is_spare}
        assert (fake.spec.node_id in state.free_nodes) == (known.free_slots > 0)
        for model_id in known.claims:
            assert state.models[model_id].claim == fake.spec.node_id
        for replica in known.replicas.values():
            assert not replica.is_yielding or known.claims
            assert replica.status is not Status.DRAINING or replica.in_flight
    assert not state.unplanned
    assert set(state.idle) == {r.replica_id for r in state.replicas.values() if r.is_spare}
    assert set(state.busy) == {
        r.replica_id for r in state.replicas.values() if r.status is Status.READY and r.in_flight
    }
    assert set(state.line.models) == {m for m, known in state.models.items() if known.is_wanting}
    for known_model in state.models.values():
        if not known_model.is_deleted:
            check_bounds(fleet, known_model)
        assert known_model.num_running == sum(
            len(r.in_flight) for r in known_model.replicas.values()
        )
        order = [request.sequence for request in known_model.waiting.values()]
        assert order == sorted(order)
        assert known_model.claim is None or known_model.model_id in state.line.models
        assert not known_model.is_deleted or known_model.replicas
        assert set(known_model.dram_nodes) == {
            n for n, known in state.nodes.items() if known_model.model_id in known.resident
        }


def check_bounds(fleet: Fleet, known: Model) -> None:
    """No more replicas than the model may have were started; idle ones beyond that are stopped."""
    scaling = known.spec.scaling
    most = max(scaling.max_replicas or fleet.settings.max_replicas, scaling.min_replicas)
    assert known.plan.replicas <= most
    kept = [r for r in known.replicas.values() if r.is_kept]
    if fleet.controller._state.policy.shares_slots:
        assert len(kept) <= scaling.min_replicas


def settle(fleet: Fleet) -> None:
    """Once nodes answer and requests end, everyone who waits is served or refused."""
    for _ in range(300):
        fleet.answer_all()
        if not fleet.waiting() and not fleet.running():
            break
        for request_id in fleet.running():
            fleet.finish(request_id)
        if (wakeup := fleet.controller.next_wakeup()) is not None:
            fleet.tick(wakeup)
        check_accounts(fleet)
    assert not fleet.waiting() or minimum_takes_all(fleet), "somebody starves"


def minimum_takes_all(fleet: Fleet) -> bool:
    """Whether replicas that are always there leave no node with a worker and the memory for those
    who wait. They stay where they are, also where others would find room if they moved.
    """
    state = fleet.controller._state
    wanted = sum(known.spec.scaling.min_replicas for known in state.models.values())
    if wanted >= sum(fake.spec.num_workers for fake in fleet.nodes.values()):
        return True
    return not any(
        _is_left_by_minimum(node, extent_bytes(known.spec.size_bytes))
        for known in state.models.values()
        if known.waiting
        for node in state.nodes.values()
    )


def _is_left_by_minimum(node: Node, num_bytes: int) -> bool:
    """Whether a worker and so much memory are free of replicas that are always there."""
    kept = [replica for replica in node.replicas.values() if replica.is_kept]
    kept_bytes = sum(node.resident[name].num_bytes for name in {r.model_id for r in kept})
    return len(kept) < node.spec.num_workers and kept_bytes + num_bytes <= node.capacity_bytes


def test_a_model_whose_replica_gave_way_to_bytes_is_planned_in_the_same_event() -> None:
    machine = Anything()
    machine.begin(
        patience=0.0,
        backoff=0.0,
        queue_limit=3,
        deadline=5.0,
        keep_alive=0.0,
        policy="liar",
        max_replicas=1,
    )
    machine.pass_time(seconds=1.0)
    machine.pass_time(seconds=7.0)
    machine.answer_all()
    machine.forecast(name=ModelId("a"), p=0.0, count=0.0, age=0.0)
    machine.delete(name=ModelId("a"))
    machine.report_nonsense(name="n1", model_id="c", number=-1, seconds=float("nan"))
    for _ in range(2):
        machine.wake()
        machine.accounts_are_true()
    machine.teardown()


def test_replicas_that_are_always_there_may_take_the_worker_here_and_the_memory_there() -> None:
    machine = Anything()
    machine.begin(
        patience=0.0,
        backoff=0.0,
        queue_limit=3,
        deadline=30.0,
        keep_alive=0.0,
        policy="flashserve",
        max_replicas=1,
    )
    machine.join("n2")
    machine.bound("a", Scaling(1, 1))
    machine.join("n1")
    machine.bound("d", Scaling(1, 1))
    machine.arrive("b", None)
    assert minimum_takes_all(machine.fleet)
    settle(machine.fleet)
    assert machine.fleet.requests[RequestId("r1")].state == "rejected: deadline_exceeded"
    [refusal] = [command for command in machine.fleet.log if isinstance(command, Reject)]
    assert "4.2 MB of DRAM that no running model holds" in refusal.message
    machine.bound("a", Scaling(0, 1))
    machine.arrive("b", None)
    settle(machine.fleet)
    assert machine.fleet.requests[RequestId("r2")].state == "finished"


TestAnything = Anything.TestCase
TestAnything.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
