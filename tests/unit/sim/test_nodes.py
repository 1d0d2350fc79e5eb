"""A modelled node by itself: bytes, workers and replicas in virtual time."""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import math
from collections.abc import Callable
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashserve.messages.commands import Dispatch, Evict, Stage, StartReplica, StopReplica
from flashserve.messages.events import (
    Event,
    Evicted,
    ReplicaLost,
    ReplicaReady,
    ReplicaStopped,
    RequestFinished,
    Staged,
    WorkersChanged,
)
from flashserve.policy.cost import EXTENT_BYTES
from flashserve.sim.ledger import Ledger
from flashserve.sim.links import Link
from flashserve.sim.nodes import ModelledNode
from flashserve.sim.profiles import THIS, EngineShape, Speeds, StepCosts
from flashserve.sim.steps import Job
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

N = NodeId("n")
SPEEDS = Speeds(
    remote_bytes_per_s=EXTENT_BYTES / 4,
    disk_bytes_per_s=EXTENT_BYTES,
    dram_bytes_per_s=EXTENT_BYTES * 10,
    init_s=0.2,
    wake_s=0.05,
    stop_s=0.5,
    worker_start_s=3.0,
)
COSTS = StepCosts(EXTENT_BYTES, 0.1, 0.0, 0.0, 0.0)
E = TypeVar("E", bound=Event)


class Bench:
    """A node with a clock that only moves when told."""

    def __init__(
        self, *, workers: int = 2, extents: int = 8, disk_extents: int = 8, **speeds: object
    ) -> None:
        self.now = 0.0
        self.said: list[tuple[float, Event]] = []
        self.ledger = Ledger()
        self._numbers = itertools.count()
        self._heap: list[tuple[float, int, Callable[[float], None]]] = []
        self.node = ModelledNode(
            NodeSpec(N, 1, workers, extents * EXTENT_BYTES),
            dataclasses.replace(SPEEDS, **speeds),  # type: ignore[arg-type]
            COSTS,
            EngineShape(),
            disk_bytes=disk_extents * EXTENT_BYTES,
            ledger=self.ledger,
        )
        self.node.attach(self._call_at, lambda event: self.said.append((self.now, event)))

    def _call_at(self, at: float, call: Callable[[float], None]) -> None:
        assert at >= self.now
        heapq.heappush(self._heap, (at, next(self._numbers), call))

    def start(self, name: str, number: int = 1, **spec: object) -> ReplicaId:
        replica_id = ReplicaId(f"{name}#{number}")
        model_spec = model(name, **spec)
        self.node.execute(StartReplica(N, 1, replica_id, model_spec, ""), self.now)
        return replica_id

    def stop(self, replica_id: ReplicaId, **spec: object) -> None:
        name = replica_id.split("#")[0]
        self.node.execute(StopReplica(N, 1, replica_id, model(name, **spec), ""), self.now)

    def ask(self, replica_id: ReplicaId, name: str = "r") -> Job:
        job = Job(RequestId(name), 10, 6)
        dispatch = Dispatch(job.request_id, N, replica_id, Tier.DEVICE, Phases(), None, "")
        self.node.generate(dispatch, job, self.now)
        return job

    def run(self, until: float = math.inf) -> None:
        while self._heap and self._heap[0][0] <= until:
            self.now, _, call = heapq.heappop(self._heap)
            call(self.now)
        if until < math.inf:
            self.now = until

    def heard(self, kind: type[E]) -> list[tuple[float, E]]:
        return [(at, event) for at, event in self.said if isinstance(event, kind)]


def model(name: str, extents: int = 1, tier: Tier = Tier.DISK) -> ModelSpec:
    return ModelSpec(ModelId(name), f"/{name}", extents * EXTENT_BYTES, tier)


def ready_at(bench: Bench) -> dict[str, float]:
    return {event.model_id: at for at, event in bench.heard(ReplicaReady)}


def test_two_loads_at_once_slow_each_other() -> None:
    bench = Bench()
    bench.start("a")
    bench.run(until=0.5)
    bench.start("b")
    bench.run()
    # Each has half of the disk from 0.5 s on: a is there at 1.5 s, b at 2.
    assert ready_at(bench) == {"a": pytest.approx(1.8), "b": pytest.approx(2.3)}
    assert [event.seconds for _, event in bench.heard(Staged)] == [
        pytest.approx(1.5),
        pytest.approx(1.5),
    ]


def test_a_worker_has_a_path_of_its_own_to_the_device_within_the_nodes() -> None:
    times = []
    for total in (None, EXTENT_BYTES * 10.0):
        bench = Bench(dram_total_bytes_per_s=total)
        for name in "ab":
            bench.node.execute(Stage(N, 1, model(name), Tier.DRAM, ""), 0.0)
        bench.run()
        start = bench.now
        bench.start("a")
        bench.start("b")
        bench.run()
        times.append({name: at - start for name, at in ready_at(bench).items()})
    assert times[0] == {"a": pytest.approx(0.3), "b": pytest.approx(0.3)}
    assert times[1] == {"a": pytest.approx(0.4), "b": pytest.approx(0.4)}


def test_a_start_computes_while_its_bytes_arrive() -> None:
    bench = Bench(executes_while_loading=True)
    replica_id = bench.start("a")
    bench.run(until=0.2)
    assert ready_at(bench) == {"a": 0.2}
    job = bench.ask(replica_id)
    bench.run()
    # The bytes are in DRAM at 1 s, their last part on the device a 32nd of 0.1 s later.
    assert job.first_token_at == pytest.approx(1.0 + 0.1 / 32 + 0.1 / 32)
    assert job.gated_s == pytest.approx(job.first_token_at - 0.3)
    [(_, finished)] = bench.heard(RequestFinished)
    assert finished.prefill_s == pytest.approx(0.1)


def test_a_model_that_sleeps_in_a_worker_starts_sooner_there() -> None:
    bench = Bench()
    first = bench.start("a", 1)
    bench.run()
    bench.stop(first)
    bench.run()
    before = bench.now
    bench.start("a", 2)
    bench.run()
    assert bench.now - before == pytest.approx(0.1 + 0.05)


def test_a_model_deployed_anew_does_not_wake_as_the_old_one() -> None:
    bench = Bench()
    bench.stop(bench.start("a", 1))
    bench.run()
    before = bench.now
    anew = ModelSpec(ModelId("a"), "/elsewhere", EXTENT_BYTES)
    bench.node.execute(StartReplica(N, 1, ReplicaId("a#2"), anew, ""), bench.now)
    bench.run()
    assert bench.now - before > 0.1 + 0.19


def test_starts_wait_for_workers_in_the_order_in_which_they_were_ordered() -> None:
    bench = Bench(workers=1)
    first = bench.start("a")
    bench.start("b")
    bench.start("c")
    bench.run()
    assert set(ready_at(bench)) == {"a"}
    bench.stop(first)
    at = bench.now
    bench.run()
    assert ready_at(bench)["b"] == pytest.approx(at + 0.5 + 0.1 + 0.2)
    [(_, ready)] = [item for item in bench.heard(ReplicaReady) if item[1].model_id == "b"]
    assert ready.phases.place_s > 0.4
    assert "c" not in ready_at(bench)


def test_the_disk_gives_up_what_was_used_longest_ago() -> None:
    bench = Bench(disk_extents=2, workers=4)
    for name in "ab":
        bench.node.execute(Stage(N, 1, model(name, tier=Tier.REMOTE), Tier.DISK, ""), bench.now)
        bench.run()
    bench.node.execute(Stage(N, 1, model("a", tier=Tier.REMOTE), Tier.DRAM, ""), bench.now)
    bench.node.execute(Stage(N, 1, model("c", tier=Tier.REMOTE), Tier.DISK, ""), bench.now)
    bench.run()
    assert [event for _, event in bench.heard(Evicted)] == [Evicted(N, ModelId("b"), Tier.DISK)]


def test_a_remote_model_goes_straight_to_memory_and_to_disk_beside() -> None:
    bench = Bench()
    bench.start("a", tier=Tier.REMOTE)
    bench.run()
    assert [(at, event.tier) for at, event in bench.heard(Staged)] == [
        (4.0, Tier.DISK),
        (4.0, Tier.DRAM),
    ]
    assert ready_at(bench) == {"a": pytest.approx(4.3)}


def test_an_evict_stops_a_move_that_is_under_way() -> None:
    bench = Bench()
    bench.node.execute(Stage(N, 1, model("a", 4), Tier.DRAM, ""), 0.0)
    bench.run(until=1.0)
    bench.node.execute(Evict(N, 1, model("a", 4), Tier.DRAM, ""), 1.0)
    bench.node.execute(Stage(N, 1, model("b"), Tier.DRAM, ""), 1.0)
    bench.run()
    assert [(at, event.model_id) for at, event in bench.heard(Staged)] == [(2.0, "b")]


def test_a_lost_replica_takes_its_worker_with_it_for_a_while() -> None:
    bench = Bench(workers=1)
    replica_id = bench.start("a")
    bench.run()
    lost = ReplicaLost(N, replica_id, ModelId("a"), "killed")
    bench.node.suffer(lost, bench.now)
    at = bench.now
    bench.start("a", 2)
    bench.run()
    assert [event.num_ready for _, event in bench.heard(WorkersChanged)] == [0, 1]
    assert ready_at(bench)["a"] == pytest.approx(at + 3.0 + 0.3)


def test_seconds_are_counted_by_what_the_worker_does() -> None:
    bench = Bench()
    replica_id = bench.start("a")
    bench.run()
    bench.run(until=10.0)
    bench.ask(replica_id)
    bench.run(until=20.0)
    bench.stop(replica_id)
    bench.run(until=30.0)
    bench.node.settle(30.0)
    spent = bench.ledger.spent([ModelId("a")])
    assert spent.loading_s[0] == pytest.approx(1.3)
    assert spent.busy_s[0] == pytest.approx(0.6)
    assert spent.idle_s[0] == pytest.approx(20.5 - 1.3 - 0.6)
    assert spent.dram_gb_s[0] == pytest.approx(30.0 * EXTENT_BYTES / 1e9)
    assert [at for at, _ in bench.heard(ReplicaStopped)] == [20.5]
    assert bench.ledger.num_workers == [0, 0, 0]


@settings(max_examples=60, deadline=None)
@given(
    sends=st.lists(st.tuples(st.floats(0, 10), st.integers(1, 1000)), min_size=1, max_size=12),
    each=st.sampled_from([None, 40.0]),
)
def test_a_link_moves_all_bytes_and_no_faster_than_it_can(
    sends: list[tuple[float, int]], each: float | None
) -> None:
    heap: list[tuple[float, int, Callable[[float], None]]] = []
    number = 0

    def call_at(at: float, call: Callable[[float], None]) -> None:
        nonlocal number
        number += 1
        heapq.heappush(heap, (at, number, call))

    link = Link(call_at, 100.0, each)
    done: dict[int, float] = {}
    for index, (at, num_bytes) in enumerate(sends):

        def send(now: float, index: int = index, num_bytes: int = num_bytes) -> None:
            link.send(num_bytes, now, lambda end: done.update({index: end}))

        call_at(at, send)
    while heap:
        at, _, call = heapq.heappop(heap)
        call(at)
    assert len(done) == len(sends)
    assert link.num_moves == 0
    for index, (at, num_bytes) in enumerate(sends):
        assert done[index] - at >= num_bytes / (each or 100.0) - 1e-6
    first, total = min(at for at, _ in sends), sum(size for _, size in sends)
    assert max(done.values()) - first >= total / 100.0 - 1e-6


def test_the_profile_of_this_machine_predicts_its_measured_first_tokens() -> None:
    """As benchmarks/results has them: 0.111 s warm and 0.134 s from DRAM, of 32 tokens."""
    spec = ModelSpec(ModelId("m"), "/m", 269_000_000)
    warm = THIS.costs.of(spec.size_bytes).step_s(32, 0)
    assert warm == pytest.approx(0.111, rel=0.05)
    assert THIS.costs.step_s(512, 0) == pytest.approx(1.109, rel=0.05)
    assert THIS.costs.step_s(0, 8) == pytest.approx(0.0848, rel=0.05)
    assert warm + THIS.speeds.init_s == pytest.approx(0.134, rel=0.05)


def test_engines_that_share_cores_slow_each_other_and_starts_as_well() -> None:
    bench = Bench(compute_at_once=1.0)
    first, second = bench.start("a"), bench.start("b")
    bench.run()
    # Both loads take 2 s for sharing the disk and 0.1 s to the device; then both build together.
    assert ready_at(bench) == pytest.approx({"a": 2.5, "b": 2.5}, abs=0.11)
    began = bench.now
    bench.ask(first, "r1")
    bench.run()
    assert bench.now - began == pytest.approx(6 * 0.1)
    began = bench.now
    bench.ask(first, "r2")
    bench.ask(second, "r3")
    bench.run()
    assert bench.now - began == pytest.approx(2 * 6 * 0.1)
    ready = [event for _, event in bench.heard(ReplicaReady)]
    assert [event.phases.init_s for event in ready] == pytest.approx([0.4, 0.4])


def test_bytes_that_come_slow_an_engine_on_the_same_cores() -> None:
    bench = Bench(compute_at_once=1.0, load_compute_s_per_byte=0.3 / EXTENT_BYTES)
    first = bench.start("a")
    bench.run()
    began = bench.now
    bench.ask(first)
    bench.start("b")
    bench.run(began + 0.9)
    assert bench.heard(RequestFinished)[0][0] - began == pytest.approx(6 * 0.1 + 0.3)
