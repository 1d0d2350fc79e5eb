"""One script of events through both drivers, simulated and live, gives the same commands."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Callable, Sequence

import pytest
from tests.unit.live.script import ScriptClock, settle

from flashserve.config import PolicySettings
from flashserve.control.controller import Controller
from flashserve.live.runtime import Runtime
from flashserve.messages.commands import (
    Command,
    Dispatch,
    Evict,
    Hold,
    NodeCommand,
    Reject,
    Stage,
    StartReplica,
    StopReplica,
)
from flashserve.messages.events import (
    BoundsChanged,
    DrainStarted,
    Event,
    EvictRequested,
    ForecastReady,
    ModelDeleted,
    ModelDeployed,
    NodeEvent,
    NodeJoined,
    ReplicaLost,
    RequestArrived,
    StageRequested,
)
from flashserve.policy.cost import Prices
from flashserve.policy.plans import Policy
from flashserve.policy.registry import make_policy
from flashserve.sim.loop import CommandLog, Simulation
from flashserve.sim.nodes import ModelledNode
from flashserve.sim.steps import Job
from flashserve.types import (
    ModelId,
    ModelSpec,
    NodeId,
    NodeSpec,
    ReplicaId,
    RequestId,
    Scaling,
    SeriesForecast,
    Tier,
)

pytestmark = pytest.mark.integration
Timed = list[tuple[float, Command]]

SETTINGS = PolicySettings(keep_alive_s=40.0, queue_limit=3, deadline_s=20.0, slot_patience_s=4.0)
SPECS = [
    NodeSpec(NodeId("near"), epoch=1, num_workers=1, dram_bytes=3 << 30, max_sequences=2),
    NodeSpec(NodeId("wide"), epoch=1, num_workers=2, dram_bytes=2 << 30, max_sequences=2),
]
SIZES = {"a": 1 << 30, "b": 1 << 30, "c": 1 << 29, "d": 3 << 28, "huge": 9 << 30}


def script() -> list[tuple[float, Event]]:
    """Deployments, bursts that overflow, a lost replica, orders by hand, and the end.

    No two times are equal, because only the simulation says what comes first then.
    """
    steps: list[tuple[float, Event]] = [
        (0.1 + 0.001 * i, ModelDeployed(ModelSpec(ModelId(name), f"/{name}", size)))
        for i, (name, size) in enumerate(SIZES.items())
    ]
    arrivals = [*"aaaaaaaab", "huge", *"bcccadbacd"]
    steps += [
        (1.0 + 0.61 * i, RequestArrived(RequestId(f"r{i}"), ModelId(name), 100))
        for i, name in enumerate(arrivals)
    ]
    steps += [
        (5.0317, ReplicaLost(NodeId("wide"), ReplicaId("a#1"), ModelId("a"), "killed")),
        (5.0319, ReplicaLost(NodeId("near"), ReplicaId("a#1"), ModelId("a"), "killed")),
        (30.03, EvictRequested(ModelId("a"), Tier.DRAM)),
        (31.07, StageRequested(ModelId("d"), Tier.DRAM)),
        (90.013, RequestArrived(RequestId("late"), ModelId("d"))),
        (91.017, ModelDeleted(ModelId("c"))),
        (92.019, RequestArrived(RequestId("gone"), ModelId("c"))),
        (93.023, RequestArrived(RequestId("last"), ModelId("b"), deadline_s=0.01)),
        (94.029, DrainStarted()),
        (94.031, RequestArrived(RequestId("refused"), ModelId("a"))),
    ]
    return sorted(steps, key=lambda step: step[0])


def predictive_script() -> list[tuple[float, Event]]:
    """Forecasts that start, keep and let go, nonsense among them, and bounds that change."""
    steps: list[tuple[float, Event]] = [
        (0.1 + 0.001 * i, ModelDeployed(ModelSpec(ModelId(name), f"/{name}", SIZES[name])))
        for i, name in enumerate("abcd")
    ]
    chances = {"a": [0.9, 0.9, 0.001, 0.001], "b": [0.001, 0.95, 0.95, math.nan], "c": [1e-6] * 4}
    for minute in range(4):
        forecasts = tuple(
            forecast(name, 60.0 * (minute + 1), row[minute]) for name, row in chances.items()
        )
        steps.append((60.0 * (minute + 1) + 0.537, ForecastReady(forecasts)))
    steps += [
        (130.011, BoundsChanged(ModelId("d"), Scaling(min_replicas=1))),
        (250.017, BoundsChanged(ModelId("d"), Scaling(min_replicas=0, max_replicas=1))),
    ]
    steps += [
        (61.3 + 7.9 * i, RequestArrived(RequestId(f"r{i}"), ModelId(name), 100))
        for i, name in enumerate("abacabdbcabdaacb")
    ]
    return sorted(steps, key=lambda step: step[0])


def forecast(name: str, made_at: float, p: float) -> SeriesForecast:
    leads = (60.0, 300.0, 3600.0)
    return SeriesForecast(ModelId(name), made_at, leads, (p, p, p), (p, 2 * p, 9 * p), (1, 2, 9))


class RecordedController(Controller):
    def __init__(self, policy: Policy | None) -> None:
        super().__init__(SETTINGS, policy=policy)
        self.given: Timed = []

    def handle(self, event: Event, now: float) -> list[Command]:
        commands = super().handle(event, now)
        self.given += [(now, command) for command in commands]
        return commands


class LiveNode:
    """The simulation's modelled node behind the interface of a real one."""

    def __init__(self, spec: NodeSpec, clock: ScriptClock) -> None:
        self.spec = spec
        self.modelled = ModelledNode(spec)
        self._clock = clock

    async def start(self, on_event: Callable[[NodeEvent], None]) -> None:
        def say(event: Event) -> None:
            if not isinstance(event, NodeJoined):  # the runtime says that itself
                on_event(event)  # type: ignore[arg-type]

        self.modelled.attach(
            lambda at, call: self._clock.call_at(at, functools.partial(call, at)), say
        )
        self.modelled.join()

    def execute(self, command: NodeCommand) -> None:
        self.modelled.execute(command, self._clock.now())

    async def close(self, grace_s: float) -> None:
        pass


async def run_live(steps: Sequence[tuple[float, Event]], policy: Policy | None = None) -> Timed:
    clock = ScriptClock()
    controller = RecordedController(policy)
    nodes = {spec.node_id: LiveNode(spec, clock) for spec in SPECS}
    runtime = Runtime(controller, list(nodes.values()), clock=clock)  # type: ignore[arg-type]
    clients: set[asyncio.Task[None]] = set()

    async def wait_for_answer(request_id: RequestId, model_id: ModelId) -> None:
        mailbox = runtime.open_mailbox(request_id, model_id)
        job = Job(request_id, 100, 64)
        while not isinstance(answer := await mailbox.get(), Reject):
            if isinstance(answer, Dispatch):
                nodes[answer.node_id].modelled.generate(answer, job, clock.now())

    def happen(event: Event) -> None:
        if isinstance(event, RequestArrived):
            clients.add(asyncio.create_task(wait_for_answer(event.request_id, event.model_id)))
        if isinstance(event, ReplicaLost):
            nodes[event.node_id].modelled.suffer(event, clock.now())
        asyncio.get_running_loop().call_soon(runtime.post, event)  # after the mailbox is open

    for at, event in steps:
        clock.call_at(at, functools.partial(happen, event))
    await runtime.start()
    await settle()
    await clock.advance(10_000.0)
    await runtime.close()
    for client in clients:
        client.cancel()
    await asyncio.gather(*clients, return_exceptions=True)
    assert runtime.is_healthy
    return controller.given


def test_one_script_through_both_drivers_gives_the_same_commands() -> None:
    steps = script()
    nodes, log = [ModelledNode(spec) for spec in SPECS], CommandLog()
    Simulation(Controller(SETTINGS), nodes, observer=log).run(steps)
    live = asyncio.run(run_live(steps))
    assert live == log.commands
    kinds = {type(command) for _, command in live}
    assert kinds == {StartReplica, StopReplica, Stage, Evict, Hold, Dispatch, Reject}
    codes = {command.code for _, command in live if isinstance(command, Reject)}
    assert codes >= {"queue_full", "model_too_large", "model_not_found", "draining"}
    resumed = [c for _, c in live if isinstance(c, Dispatch) and c.request_id == "r0"]
    assert len(resumed) == 2


def test_forecasts_and_bounds_through_both_drivers_give_the_same_commands() -> None:
    steps = predictive_script()
    nodes, log = [ModelledNode(spec) for spec in SPECS], CommandLog()
    policy = make_policy("flashserve", Prices())
    Simulation(Controller(SETTINGS, policy=policy), nodes, observer=log).run(steps)
    live = asyncio.run(run_live(steps, make_policy("flashserve", Prices())))
    assert live == log.commands
    ahead = [c for _, c in live if isinstance(c, StartReplica) and "ahead of" in c.reason]
    assert "b" in {command.model.model_id for command in ahead}
    # Kept by its bounds, past its keep-alive, until they changed.
    stops = [(at, c.model.model_id) for at, c in live if isinstance(c, StopReplica)]
    assert [at for at, model_id in stops if model_id == "d"] == [250.017]
    assert not [c for _, c in live if isinstance(c, Reject)]
