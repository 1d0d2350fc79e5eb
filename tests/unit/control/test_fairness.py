"""Nobody starves: under traffic that never pauses, every model gets its turn in bounded time."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.control.fake_nodes import model, node

from flashserve.config import PolicySettings
from flashserve.control.controller import Controller
from flashserve.messages.commands import Dispatch, Reject
from flashserve.messages.events import Event, ModelDeployed, RequestArrived
from flashserve.policy.cost import EXTENT_BYTES
from flashserve.sim.loop import CommandLog, Simulation
from flashserve.sim.nodes import ModelledNode
from flashserve.sim.profiles import Speeds, StepCosts
from flashserve.types import RequestId

SPEEDS = Speeds(disk_bytes_per_s=4e6, init_s=0.2)
COSTS = StepCosts(EXTENT_BYTES, 0.1, 0.0, 0.0, 0.0)
NUM_TOKENS = 25
RUN_S = 2.5
"""Every step takes 0.1 s, whatever is in it."""
TRAFFIC_S = 200


@settings(max_examples=40, deadline=None)
@given(
    extents=st.lists(st.integers(1, 4), min_size=2, max_size=6),
    workers=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    dram_extents=st.integers(4, 8),
    patience_s=st.sampled_from([0.0, 2.0, 6.0]),
    gap_s=st.sampled_from([0.7, 2.0, 5.0]),
)
def test_every_request_is_served_in_bounded_time(
    extents: list[int], workers: list[int], dram_extents: int, patience_s: float, gap_s: float
) -> None:
    policy = PolicySettings(slot_patience_s=patience_s, deadline_s=1e6, queue_limit=10_000)
    nodes = [
        ModelledNode(node(f"n{i}", count, dram_extents, max_sequences=100), SPEEDS, COSTS)
        for i, count in enumerate(workers)
    ]
    script: list[tuple[float, Event]] = [
        (0.0, ModelDeployed(model(f"m{i}", size))) for i, size in enumerate(extents)
    ]
    arrived: dict[RequestId, float] = {}
    for i in range(len(extents)):
        for k in range(int(TRAFFIC_S / gap_s)):
            at = k * gap_s + i * 0.01
            request_id = RequestId(f"m{i}/{k}")
            arrived[request_id] = at
            script.append((at, RequestArrived(request_id, model(f"m{i}").model_id)))
    log = CommandLog()
    simulation = Simulation(Controller(policy), nodes, observer=log, output_tokens=NUM_TOKENS)
    simulation.run(sorted(script, key=lambda step: step[0]))
    commands = log.commands
    waited = {
        c.request_id: at - arrived[c.request_id] for at, c in commands if isinstance(c, Dispatch)
    }
    assert set(waited) == set(arrived)
    assert not [c for _, c in commands if isinstance(c, Reject)]
    start_s = 4 * (2 << 20) / SPEEDS.disk_bytes_per_s + 1.0
    turn_s = 2 * max(patience_s, 1.0) + RUN_S + start_s
    assert max(waited.values()) <= turn_s * (len(extents) + 1)
