"""Drives the controller by a virtual clock: a heap of events, and modelled nodes that answer."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence

from flashserve.control.controller import Controller
from flashserve.messages.commands import Command, Dispatch, Hold, NodeCommand, Reject
from flashserve.messages.events import (
    Event,
    NodeJoined,
    NodeLost,
    ReplicaFailed,
    ReplicaLost,
    Tick,
)
from flashserve.sim.nodes import ModelledNode, Report
from flashserve.types import NodeId, NodeSpec


class Simulation:
    """One run of a controller over modelled nodes.

    Events of one time are handled in the order in which they became known, and before a Tick.
    """

    def __init__(self, controller: Controller, nodes: Iterable[ModelledNode]) -> None:
        self.controller = controller
        self.now = 0.0
        self._nodes: dict[NodeId, ModelledNode] = {node.spec.node_id: node for node in nodes}
        self._heap: list[tuple[float, int, NodeId | None, Report | Event]] = []
        self._num_pushed = 0
        self._commands: list[tuple[float, Command]] = []

    def run(
        self, script: Sequence[tuple[float, Event]], until: float = math.inf
    ) -> list[tuple[float, Command]]:
        """Play a script of (time, event) until nothing more happens, or to `until`.

        Every node joins at 0 with all its workers started. Faults in the script (ReplicaFailed,
        ReplicaLost, NodeLost, and NodeJoined with a new epoch) befall the modelled node as well.

        Returns:
            Every command, with the time at which it was given.
        """
        for node in self._nodes.values():
            self._plan(node, node.join(self.now))
        for at, event in script:
            self._push(at, None, event)
        while self._step(until):
            pass
        return self._commands

    def _step(self, until: float) -> bool:
        """Let the next thing happen; False when nothing is left until then."""
        wakeup = self.controller.next_wakeup()
        next_tick = math.inf if wakeup is None else max(wakeup, self.now)
        next_event = self._heap[0][0] if self._heap else math.inf
        at = min(next_tick, next_event)
        if at > until or at == math.inf:
            return False
        self.now = at
        if next_tick < next_event:
            self._handle(Tick())
            return True
        _, _, node_id, entry = heapq.heappop(self._heap)
        if isinstance(entry, Report):
            if node_id is not None and self._nodes[node_id].holds(entry):
                self._handle(entry.event)
        else:
            self._befall(entry)
            self._handle(entry)
        return True

    def _befall(self, event: Event) -> None:
        """A fault in the script is the node's before it is the controller's."""
        match event:
            case NodeJoined(node=NodeSpec(node_id=node_id)):
                pass
            case NodeLost(node_id=node_id) | ReplicaLost(node_id=node_id):
                pass
            case ReplicaFailed(node_id=node_id):
                pass
            case _:
                return
        node = self._nodes[node_id]
        self._plan(node, node.suffer(event, self.now))

    def _handle(self, event: Event) -> None:
        for command in self.controller.handle(event, self.now):
            self._commands.append((self.now, command))
            self._carry_out(command)

    def _carry_out(self, command: Command) -> None:
        match command:
            case Hold() | Reject():
                pass
            case Dispatch():
                node = self._nodes[command.node_id]
                self._plan(node, node.generate(command, self.now))
            case _:
                self._order(command)

    def _order(self, command: NodeCommand) -> None:
        node = self._nodes[command.node_id]
        self._plan(node, node.execute(command, self.now))

    def _plan(self, node: ModelledNode, reports: list[Report]) -> None:
        for report in reports:
            self._push(report.at, node.spec.node_id, report)

    def _push(self, at: float, node_id: NodeId | None, entry: Report | Event) -> None:
        assert at >= self.now, "nothing happens in the past"
        self._num_pushed += 1
        heapq.heappush(self._heap, (at, self._num_pushed, node_id, entry))
