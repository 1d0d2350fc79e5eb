from __future__ import annotations

import pytest

from flashserve.config import PolicySettings
from flashserve.control.controller import Controller
from flashserve.messages.commands import (
    Command,
    Dispatch,
    Evict,
    Hold,
    Reject,
    Stage,
    StartReplica,
    StopReplica,
)
from flashserve.messages.events import (
    Event,
    EvictRequested,
    ModelDeployed,
    NodeJoined,
    NodeLost,
    ReplicaFailed,
    ReplicaLost,
    RequestArrived,
    StageFailed,
    StageRequested,
)
from flashserve.policy.cost import EXTENT_BYTES
from flashserve.sim.loop import CommandLog, Simulation
from flashserve.sim.nodes import ModelledNode
from flashserve.sim.profiles import Speeds, StepCosts
from flashserve.types import ModelId, ModelSpec, NodeId, NodeSpec, ReplicaId, RequestId, Tier

SPEEDS = Speeds(
    remote_bytes_per_s=EXTENT_BYTES / 4,
    disk_bytes_per_s=EXTENT_BYTES,
    dram_bytes_per_s=EXTENT_BYTES * 8,
    init_s=0.25,
    wake_s=0.25,
    stop_s=0.5,
    worker_start_s=2.0,
)
"""A model of one extent is fetched in 4 s, read in 1, bound in 0.125."""

COSTS = StepCosts(EXTENT_BYTES, 0.25, 0.0, 0.0025, 0.0)
"""A prompt of 100 tokens takes 0.5 s and each further token 0.25: an answer of 7 takes 2 s."""

NUM_TOKENS = 7

M, N1 = ModelId("m"), NodeId("n1")


def spec(name: str = "m", extents: int = 1, tier: Tier = Tier.DISK) -> ModelSpec:
    return ModelSpec(ModelId(name), f"/models/{name}", extents * EXTENT_BYTES, tier)


def arrived(name: str, model: str = "m") -> RequestArrived:
    return RequestArrived(RequestId(name), ModelId(model))


def run(
    *script: tuple[float, Event],
    nodes: int = 1,
    extents: int = 4,
    workers: int = 1,
    **policy: float,
) -> list[tuple[float, Command]]:
    names = [NodeId(f"n{i + 1}") for i in range(nodes)]
    made = [
        ModelledNode(NodeSpec(name, 1, workers, extents * EXTENT_BYTES), SPEEDS, COSTS)
        for name in names
    ]
    log = CommandLog()
    controller = Controller(PolicySettings(**policy))
    Simulation(controller, made, observer=log, output_tokens=NUM_TOKENS).run(script)
    return log.commands


def told(commands: list[tuple[float, Command]]) -> list[tuple[float, str]]:
    return [(at, type(command).__name__) for at, command in commands]


def test_a_cold_and_a_warm_request_take_the_modelled_times() -> None:
    commands = run((0.0, ModelDeployed(spec())), (1.0, arrived("r1")), (5.0, arrived("r2")))
    assert told(commands) == [
        (1.0, "StartReplica"),
        (1.0, "Hold"),
        (2.375, "Dispatch"),
        (5.0, "Dispatch"),
        (307.0, "StopReplica"),
    ]
    cold = commands[2][1]
    assert isinstance(cold, Dispatch)
    assert cold.startup is not None
    assert (cold.startup.dram_s, cold.startup.device_s, cold.startup.init_s) == (1.0, 0.125, 0.25)


def test_a_remote_model_is_fetched_first_and_kept_on_disk() -> None:
    commands = run(
        (0.0, ModelDeployed(spec(tier=Tier.REMOTE))),
        (0.0, arrived("r1")),
        (60.0, EvictRequested(M, Tier.DRAM)),
        (70.0, arrived("r2")),
    )
    dispatched = [(at, c) for at, c in commands if isinstance(c, Dispatch)]
    assert [at for at, _ in dispatched] == [4.375, 71.375]
    assert dispatched[0][1].startup is not None
    assert dispatched[0][1].startup.fetch_s == 4.0
    assert dispatched[1][1].startup is not None
    assert dispatched[1][1].startup.fetch_s == 0.0
    assert dispatched[1][1].tier is Tier.DISK


def test_predictions_come_to_equal_what_the_node_does() -> None:
    script: list[tuple[float, Event]] = [(0.0, ModelDeployed(spec()))]
    for i in range(20):
        script.append((i * 100.0, arrived(f"r{i}")))
        script.append((i * 100.0 + 50, EvictRequested(M, Tier.DRAM)))
    commands = run(*script)
    holds = [c for _, c in commands if isinstance(c, Hold)]
    assert abs(holds[0].predicted.startup_s - 1.375) > 0.5
    assert abs(holds[-1].predicted.startup_s - 1.375) < 0.05
    assert holds[-1].predicted.prefill_s == 0.5


def test_a_start_in_the_slot_of_another_waits_for_its_worker() -> None:
    commands = run(
        (0.0, ModelDeployed(spec("a"))),
        (0.0, ModelDeployed(spec("b"))),
        (0.0, arrived("a1", "a")),
        (10.0, StageRequested(ModelId("b"), Tier.DRAM)),
        (20.0, arrived("b1", "b")),
    )
    (last,) = [(at, c) for at, c in commands if isinstance(c, Dispatch) and c.request_id == "b1"]
    assert last[0] == 20.0 + 0.5 + 0.125 + 0.25
    assert last[1].startup is not None
    assert last[1].startup.place_s == 0.5
    assert [type(c) for _, c in commands if isinstance(c, Stage)] == [Stage]


def test_bytes_give_way_within_the_memory_of_the_node() -> None:
    commands = run(
        (0.0, ModelDeployed(spec("a", 3))),
        (0.0, ModelDeployed(spec("b", 3))),
        (0.0, arrived("a1", "a")),
        (60.0, arrived("b1", "b")),
    )
    orders = [
        (at, type(c), c.model.model_id)
        for at, c in commands
        if isinstance(c, StartReplica | StopReplica | Evict)
    ]
    assert orders[1:4] == [
        (60.0, StopReplica, "a"),
        (60.0, Evict, "a"),
        (60.0, StartReplica, "b"),
    ]


def test_a_lost_replica_costs_a_new_start_on_a_new_worker() -> None:
    lost = ReplicaLost(N1, ReplicaId("m#1"), M, "killed")
    commands = run((0.0, ModelDeployed(spec())), (0.0, arrived("r1")), (2.0, lost))
    dispatched = [(at, c.replica_id) for at, c in commands if isinstance(c, Dispatch)]
    assert dispatched == [(1.375, "m#1"), (2.0 + 2.0 + 0.125 + 0.25, "m#2")]
    # It had its first token; prompt and token are computed anew, and the other five follow.
    stops = [at for at, c in commands if isinstance(c, StopReplica)]
    assert stops == [pytest.approx(4.375 + 0.5025 + 5 * 0.25 + 300.0)]


def test_a_failed_start_frees_the_worker() -> None:
    failed = ReplicaFailed(N1, ReplicaId("m#1"), M, "bad_checkpoint", "cut off")
    commands = run(
        (0.0, ModelDeployed(spec())), (0.0, arrived("r1")), (0.5, failed), (60.0, arrived("r2"))
    )
    assert [(at, c.code) for at, c in commands if isinstance(c, Reject)] == [
        (0.5, "bad_checkpoint")
    ]
    assert [at for at, c in commands if isinstance(c, Dispatch)] == [60.375]


def test_a_lost_node_says_nothing_more_and_comes_back_empty() -> None:
    back = NodeJoined(NodeSpec(N1, 2, 1, 4 * EXTENT_BYTES))
    commands = run(
        (0.0, ModelDeployed(spec())),
        (0.0, arrived("r1")),
        (1.0, NodeLost(N1, 1)),
        (10.0, back),
    )
    (dispatched,) = [(at, c) for at, c in commands if isinstance(c, Dispatch)]
    assert dispatched[0] == 11.375
    assert dispatched[1].replica_id == "m#2"


def test_nodes_share_the_models_that_arrive_together() -> None:
    commands = run(
        *((0.0, ModelDeployed(spec(name))) for name in "abc"),
        *((1.0, arrived(f"{name}1", name)) for name in "abc"),
        nodes=3,
    )
    assert {c.node_id for _, c in commands if isinstance(c, StartReplica)} == {"n1", "n2", "n3"}


def test_a_run_repeats_exactly() -> None:
    script: list[tuple[float, Event]] = [(0.0, ModelDeployed(spec(name))) for name in "abcd"]
    script += [(i * 0.37, arrived(f"r{i}", "abcd"[i * 7 % 4])) for i in range(40)]
    assert run(*script, nodes=2, slot_patience_s=2) == run(*script, nodes=2, slot_patience_s=2)


def test_a_run_can_end_before_everything_has_happened() -> None:
    node = ModelledNode(NodeSpec(N1, 1, 1, 4 * EXTENT_BYTES), SPEEDS, COSTS)
    log = CommandLog()
    simulation = Simulation(Controller(PolicySettings()), [node], observer=log)
    simulation.run([(0.0, ModelDeployed(spec())), (0.0, arrived("r1"))], until=2.0)
    assert told(log.commands)[-1] == (1.375, "Dispatch")
    assert simulation.controller.num_in_flight == 1


def alone(node: ModelledNode) -> list[Event]:
    """A node that nobody drives: what it says at once."""
    said: list[Event] = []
    node.attach(lambda _at, _call: None, said.append)
    return said


def test_orders_of_another_epoch_and_for_a_lost_node_are_ignored() -> None:
    node = ModelledNode(NodeSpec(N1, 2, 1, 4 * EXTENT_BYTES), SPEEDS)
    said = alone(node)
    old = StopReplica(N1, 1, ReplicaId("m#1"), spec(), "old")
    new = Evict(N1, 2, spec(), Tier.DRAM, "new")
    node.execute(old, 0.0)
    node.suffer(NodeLost(N1, 2), 0.0)
    node.execute(new, 0.0)
    assert said == []


def test_a_node_refuses_what_does_not_fit() -> None:
    node = ModelledNode(NodeSpec(N1, 1, 2, 4 * EXTENT_BYTES), SPEEDS)
    said = alone(node)
    node.execute(StartReplica(N1, 1, ReplicaId("a#1"), spec("a", 3), "first"), 0.0)
    node.execute(StartReplica(N1, 1, ReplicaId("b#2"), spec("b", 2), "second"), 0.0)
    node.execute(Stage(N1, 1, spec("b", 2), Tier.DRAM, "asked for"), 0.0)
    start, stage = said
    assert isinstance(start, ReplicaFailed)
    assert isinstance(stage, StageFailed)
    assert (start.code, stage.code) == ("unavailable", "unavailable")
