"""What one event costs does not grow with the cluster: counted are records looked at, no time."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest

from flashserve.config import PolicySettings
from flashserve.control.controller import Controller
from flashserve.forecast import registry, synthetic
from flashserve.messages.commands import Command, StartReplica
from flashserve.messages.events import Event
from flashserve.policy.cost import Prices
from flashserve.policy.registry import make_policy
from flashserve.sim.forecasts import forecast_events
from flashserve.sim.profiles import H100_NODE
from flashserve.sim.run import Cluster, simulate
from flashserve.sim.workload import WorkloadSettings, make_workload

INDEXES = (
    "models",
    "nodes",
    "replicas",
    "requests",
    "free_nodes",
    "idle",
    "busy",
    "short",
    "unplanned",
    "reviewed",
)
MODELS_PER_NODE = 5
TRACE = synthetic.functions(40, 12, seed=5).trace


class Counted(OrderedDict[Any, Any]):
    """A mapping that counts the entries that somebody goes through."""

    num_seen = 0

    def __iter__(self) -> Iterator[Any]:
        for key in super().__iter__():
            Counted.num_seen += 1
            yield key

    def values(self) -> Any:
        return (self[key] for key in self)

    def items(self) -> Any:
        return ((key, self[key]) for key in self)


class Watched(Controller):
    """Counts for each event how many entries of the controller's indexes were gone through."""

    def __init__(self) -> None:
        super().__init__(
            PolicySettings(), H100_NODE.rates, make_policy("flashserve", Prices()), Prices()
        )
        for name in INDEXES:
            setattr(self._state, name, Counted())
        self._state.line.models = Counted()
        self._state.line.shunning = Counted()
        self.seen: list[int] = []
        self.num_starts = 0

    def handle(self, event: Event, now: float) -> list[Command]:
        Counted.num_seen = 0
        commands = super().handle(event, now)
        self.seen.append(Counted.num_seen)
        self.num_starts += sum(isinstance(command, StartReplica) for command in commands)
        return commands


def most_seen(num_nodes: int) -> int:
    """Of any event of a few minutes' traffic, forecasts and joins included."""
    settings = WorkloadSettings(num_models=num_nodes * MODELS_PER_NODE, seed=1)
    workload = make_workload(TRACE, settings)
    [model] = registry.make_models(["hazard"], 1)
    model.fit(TRACE.history, TRACE.weights)
    controller = Watched()
    simulate(
        controller,
        workload,
        Cluster(H100_NODE, num_nodes),
        forecasts=forecast_events(model, workload),
        keep_decisions=0,
    )
    assert controller.num_starts > num_nodes
    return max(controller.seen)


@pytest.mark.parametrize("num_nodes", [20, 120])
def test_no_event_goes_through_all_nodes_or_models(num_nodes: int) -> None:
    assert most_seen(num_nodes) < 100
