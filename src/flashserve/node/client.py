"""What the live side asks of a node, whether it runs in this process or elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

from flashserve.messages.commands import NodeCommand
from flashserve.messages.events import NodeEvent
from flashserve.messages.work import GenerateJob, ModelFacts, TokenBatch, WorkerStats
from flashserve.store.dram import ArenaUsage
from flashserve.types import ModelId, NodeSpec, ReplicaId, Tier


@dataclasses.dataclass(frozen=True, slots=True)
class ModelResidence:
    """Where a model's bytes are on a node, replicas apart."""

    tier: Tier
    dram_bytes: int


@dataclasses.dataclass(frozen=True, slots=True)
class NodeStats:
    """models: those that the node has had an order for; replicas: those that answered in time."""

    dram: ArenaUsage
    models: dict[ModelId, ModelResidence]
    replicas: dict[ReplicaId, WorkerStats]


class Node(Protocol):
    """A node agent. All of it runs on the event loop's thread.

    An in-process node is node.agent.Agent; one behind a socket is `RemoteNode`.
    """

    spec: NodeSpec

    async def start(self, on_event: Callable[[NodeEvent], None]) -> None:
        """Joins the node: its slots are empty, `spec.epoch` is new, events follow.

        Workers become ready later; WorkersChanged tells.
        """

    def execute(self, command: NodeCommand) -> None:
        """Takes an order. Never raises: failures come as events; an old epoch is ignored."""

    def generate(self, replica_id: ReplicaId, job: GenerateJob) -> AsyncGenerator[TokenBatch, None]:
        """The tokens of one sequence. Closing it, or cancelling whoever waits, aborts it.

        Raises (at the first item or later):
            ReplicaError: the replica is gone.
            FlashServeError: the engine refuses the job.
        """

    async def describe(self, uri: str) -> ModelFacts:
        """Checks a source and says what it holds, without moving its bytes.

        Raises:
            DeployError: it cannot be served.
        """

    async def stats(self) -> NodeStats: ...

    async def close(self, grace_s: float) -> None:
        """Ends everything that the node has started; what runs is cut off."""
