"""A node without processes: it records orders, obeys them at once and plays scripted tokens."""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, Callable
from pathlib import Path

from tests.unit.live.tiny import END, byte_tokenizer

from flashserve.errors import FlashServeError, ReplicaError
from flashserve.messages.commands import Evict, NodeCommand, Stage, StartReplica, StopReplica
from flashserve.messages.events import (
    Evicted,
    NodeEvent,
    ReplicaFailed,
    ReplicaLost,
    ReplicaReady,
    ReplicaStopped,
    Staged,
    StageFailed,
    WorkersChanged,
)
from flashserve.messages.work import AdapterFacts, GenerateJob, ModelFacts, TokenBatch, WorkerStats
from flashserve.node.client import AdapterResidence, ModelResidence, NodeStats
from flashserve.store.dram.arena import ArenaUsage
from flashserve.types import (
    AdapterId,
    AdapterSpec,
    KVUsage,
    ModelId,
    ModelSpec,
    NodeId,
    NodeSpec,
    Phases,
    ReplicaId,
    SamplingParams,
    Tier,
    TokenOutput,
)

NODE = NodeId("fake")
START = Phases(place_s=0.001, dram_s=0.002, device_s=0.003, init_s=0.004)


class FakeNode:
    """`answer` is the text that every prompt gets, one token per byte.

    obeys: orders are carried out at once, with events; otherwise they are only recorded.
    paused: clear it and streams wait before their next token.
    slow_adapter: streams of this one wait for `hurry` before each token.
    start_error, stage_error: what the next such order fails with.
    """

    def __init__(self, num_workers: int = 1, dram_bytes: int = 1 << 30, *, obeys: bool = True):
        self.spec = NodeSpec(NODE, 1, num_workers, dram_bytes)
        self.answer = "hello world"
        self.num_reused = 0
        self.obeys = obeys
        self.commands: list[NodeCommand] = []
        self.jobs: list[GenerateJob] = []
        self.num_open_streams = 0
        self.facts = ModelFacts(1 << 20, "id-1", "", "TinyForCausalLM", 512, True, 64)
        self.adapter_facts = AdapterFacts(1 << 16, "adapter-1", 8, 1000, ("q_proj", "v_proj"))
        self.adapters: dict[AdapterId, AdapterSpec] = {}
        self.prefetched: list[AdapterId] = []
        self.expected: list[AdapterId] = []
        """Those of `prefetched` that are to come into pages too."""
        self.describe_error: FlashServeError | None = None
        self.start_error: FlashServeError | None = None
        self.stage_error: FlashServeError | None = None
        self.stream_error: FlashServeError | None = None
        self.slow_adapter: AdapterId | None = None
        self.hurry = asyncio.Event()
        self.running = asyncio.Event()
        self.running.set()
        self._lost: dict[ReplicaId, asyncio.Event] = {}
        self._tiers: dict[ModelId, Tier] = {}

    async def start(self, on_event: Callable[[NodeEvent], None]) -> None:
        self.emit = on_event
        self.emit(WorkersChanged(NODE, self.spec.num_workers))

    def execute(self, command: NodeCommand) -> None:
        self.commands.append(command)
        if self.obeys:
            self._obey(command)

    def _obey(self, command: NodeCommand) -> None:
        model_id = command.model.model_id
        match command:
            case StartReplica(replica_id=replica_id):
                if self.start_error is not None:
                    error = self.start_error
                    failed = ReplicaFailed(NODE, replica_id, model_id, error.code, error.message)
                    self.emit(failed)
                    return
                self._lost[replica_id] = asyncio.Event()
                self._tiers[model_id] = Tier.DRAM
                self.emit(ReplicaReady(NODE, replica_id, model_id, START))
            case StopReplica(replica_id=replica_id):
                self._lost.pop(replica_id).set()
                self.emit(ReplicaStopped(NODE, replica_id, model_id))
            case Stage(tier=tier):
                if self.stage_error is not None:
                    error = self.stage_error
                    self.emit(StageFailed(NODE, model_id, tier, error.code, error.message))
                    return
                self._tiers[model_id] = tier
                self.emit(Staged(NODE, model_id, tier, command.model.size_bytes, 0.5))
            case Evict(tier=tier):
                self._tiers.pop(model_id, None)
                self.emit(Evicted(NODE, model_id, tier))

    def lose(self, model_id: ModelId) -> None:
        """The worker of the model's replica dies: its streams break, and the node says so."""
        for replica_id in [one for one in self._lost if one.startswith(f"{model_id}#")]:
            self._lost.pop(replica_id).set()
            self.emit(ReplicaLost(NODE, replica_id, model_id, "killed"))

    async def generate(
        self, replica_id: ReplicaId, job: GenerateJob
    ) -> AsyncGenerator[TokenBatch, None]:
        self.jobs.append(job)
        lost = self._lost.get(replica_id)
        if lost is None:
            raise ReplicaError(f"replica {replica_id} is gone")
        if self.stream_error is not None:
            raise self.stream_error
        self.num_open_streams += 1
        added_at: float | None = time.monotonic()
        try:
            for token in self._tokens(job.params)[len(job.emitted_ids) :]:
                is_slow = job.adapter_id is not None and job.adapter_id == self.slow_adapter
                await self._next_token(lost, self.hurry if is_slow else self.running)
                now = time.monotonic()
                yield TokenBatch(
                    (dataclasses.replace(token, emitted_at=now),),
                    added_at,
                    num_reused=self.num_reused if added_at is not None else 0,
                )
                added_at = None
        finally:
            self.num_open_streams -= 1

    async def _next_token(self, lost: asyncio.Event, go: asyncio.Event) -> None:
        waits = [asyncio.create_task(event.wait()) for event in (go, lost)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        if lost.is_set():
            raise ReplicaError("the worker has died")

    def _tokens(self, params: SamplingParams) -> list[TokenOutput]:
        ids = [*byte_tokenizer().encode(self.answer).ids, END][: params.max_tokens]
        logprob = None if params.logprobs is None else -0.25
        tokens = [TokenOutput(index, token_id, logprob) for index, token_id in enumerate(ids)]
        reason = "stop" if ids[-1] == END else "length"
        return [*tokens[:-1], dataclasses.replace(tokens[-1], finish_reason=reason)]

    async def describe(self, uri: str) -> ModelFacts:
        if self.describe_error is not None:
            raise self.describe_error
        return dataclasses.replace(self.facts, directory=self.facts.directory or str(Path(uri)))

    async def describe_adapter(self, uri: str, base: ModelSpec) -> AdapterFacts:
        if self.describe_error is not None:
            raise self.describe_error
        return self.adapter_facts

    def declare_adapter(self, spec: AdapterSpec) -> None:
        self.adapters[spec.adapter_id] = spec

    def retire_adapter(self, adapter_id: AdapterId) -> None:
        del self.adapters[adapter_id]

    def prefetch_adapter(self, adapter_id: AdapterId, *, into_pages: bool = False) -> None:
        self.prefetched.append(adapter_id)
        if into_pages:
            self.expected.append(adapter_id)

    async def stats(self) -> NodeStats:
        models = {model_id: ModelResidence(tier, 2 << 20) for model_id, tier in self._tiers.items()}
        replicas = {one: WorkerStats(KVUsage(10, 4, 1, 5), 1, 0) for one in self._lost}
        near = {one: AdapterResidence(Tier.DRAM, 1 << 16, 0) for one in self.prefetched}
        return NodeStats(ArenaUsage(0, 0, 0), models, replicas, adapters=near)

    async def close(self, grace_s: float) -> None:
        for lost in self._lost.values():
            lost.set()
        self._lost.clear()
