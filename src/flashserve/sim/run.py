"""One policy on one workload: the whole of a simulated run, from nodes to results."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

from flashserve.control.controller import Controller
from flashserve.messages.commands import (
    Command,
    Evict,
    NodeCommand,
    Stage,
    StartReplica,
    StopReplica,
)
from flashserve.messages.events import Event
from flashserve.sim.closed import ClosedEngine
from flashserve.sim.ledger import Ledger
from flashserve.sim.loop import Arrivals, Simulation
from flashserve.sim.nodes import ModelledNode
from flashserve.sim.profiles import Profile
from flashserve.sim.records import Records
from flashserve.sim.results import Decided, Results
from flashserve.sim.steps import EngineMaker
from flashserve.sim.workload import Workload
from flashserve.types import NodeId

Progress = Callable[[float, float], None]
_VERBS: dict[type, str] = {
    StartReplica: "start",
    StopReplica: "stop",
    Stage: "stage",
    Evict: "evict",
}
_PROGRESS_EVERY = 2000
_COLLECTION = 500_000
"""Objects made between two collections. Nearly all of a run's are freed without them."""


@dataclasses.dataclass(frozen=True, slots=True)
class Cluster:
    """num_nodes equal nodes of a profile."""

    profile: Profile
    num_nodes: int = 1
    make_engine: EngineMaker = ClosedEngine

    @property
    def num_workers(self) -> int:
        return self.num_nodes * self.profile.num_workers

    def nodes(self, ledger: Ledger) -> Iterator[ModelledNode]:
        for number in range(self.num_nodes):
            name = NodeId(f"n{number:04d}")
            yield ModelledNode.of(self.profile, name, ledger, self.make_engine)


class _Decisions:
    """Keeps commands that were no requests': of each verb at most so many, at equal distances."""

    def __init__(self, num_kept: int) -> None:
        self._num_kept = num_kept
        self._kept: dict[str, list[Decided]] = {verb: [] for verb in _VERBS.values()}
        self._num_seen = collections.Counter[str]()
        self._stride = dict.fromkeys(_VERBS.values(), 1)

    def __call__(self, at: float, _event: Event, commands: Sequence[Command]) -> None:
        for command in commands:
            if isinstance(command, StartReplica | StopReplica | Stage | Evict):
                self._add(_VERBS[type(command)], at, command)

    def _add(self, verb: str, at: float, command: NodeCommand) -> None:
        if self._num_seen[verb] % self._stride[verb] == 0:
            kept = self._kept[verb]
            if len(kept) >= self._num_kept:
                del kept[1::2]
                self._stride[verb] *= 2
            if self._num_seen[verb] % self._stride[verb] == 0:
                model_id = command.model.model_id
                kept.append(Decided(at, verb, model_id, command.node_id, command.reason))
        self._num_seen[verb] += 1

    @property
    def kept(self) -> tuple[Decided, ...]:
        """In order of time."""
        return tuple(sorted(itertools.chain(*self._kept.values()), key=lambda each: each.at))


def simulate(
    controller: Controller,
    workload: Workload,
    cluster: Cluster,
    *,
    policy: str = "",
    forecasts: Iterable[tuple[float, Event]] = (),
    after_s: float = 0.0,
    keep_decisions: int = 100,
    keep_phases: bool = True,
    progress: Progress | None = None,
) -> Results:
    """Run a workload through a controller that has handled nothing yet.

    Args:
        policy: what the results call it.
        forecasts: ForecastReady events and their times, in order; see forecasts.py.
        keep_decisions: at most so many of each verb, spread over the run.
        after_s: how long to go on after the last slot of the workload.
        progress: told virtual seconds done and in all, now and then.

    Returns:
        What is reported are the first workload.duration_s + after_s seconds.
    """
    began = time.perf_counter()
    ledger = Ledger()
    for model in workload.models:
        ledger.add_model(model)
    records = Records(workload.num_requests, keep_phases=keep_phases)
    decisions = _Decisions(keep_decisions)
    models = [model.model_id for model in workload.models]
    simulation = Simulation(
        controller,
        cluster.nodes(ledger),
        observer=decisions if keep_decisions else None,
        records=records,
        ledger=ledger,
        models=models,
    )
    until = workload.duration_s + after_s
    arrivals: Arrivals = workload.arrivals()
    if progress is not None:
        arrivals = _reporting(arrivals, until, progress)
    with _rare_collections():
        simulation.run(_chain(workload.deployments(), forecasts), arrivals=arrivals, until=until)
    return Results(
        policy=policy,
        models=tuple(models),
        cohorts=workload.cohorts,
        num_workers=cluster.num_workers,
        duration_s=until,
        requests=records.requests(),
        spent=ledger.spent(models),
        timeline=ledger.timeline(),
        decisions=decisions.kept,
        num_commands={verb: simulation.num_commands[kind] for kind, verb in _VERBS.items()},
        num_events=simulation.num_events,
        wall_s=time.perf_counter() - began,
    )


@contextlib.contextmanager
def _rare_collections() -> Iterator[None]:
    """Going through all that is alive, again and again, would take a tenth of a large run."""
    before = gc.get_threshold()
    gc.set_threshold(_COLLECTION, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _chain(
    first: Iterable[tuple[float, Event]], then: Iterable[tuple[float, Event]]
) -> Iterator[tuple[float, Event]]:
    yield from first
    yield from then


def _reporting(arrivals: Arrivals, until: float, progress: Progress) -> Arrivals:
    for number, arrival in enumerate(arrivals):
        if number % _PROGRESS_EVERY == 0:
            progress(arrival[0], until)
        yield arrival
