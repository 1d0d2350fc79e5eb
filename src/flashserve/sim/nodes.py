"""A modelled node: it carries out orders in virtual time, and says what becomes of them.

What is modelled: bytes that move share their path (links.py) and live within the budgets of DRAM
and disk (storage.py); workers are claimed in order, and a model that sleeps in one starts sooner
there (workers.py); requests run through the engine's own batching, or the same in closed form
(replicas.py, steps.py). Nothing is drawn at random.
"""

from __future__ import annotations

import dataclasses

from flashserve.messages.commands import (
    Dispatch,
    Evict,
    NodeCommand,
    Stage,
    StartReplica,
    StopReplica,
)
from flashserve.messages.events import (
    Event,
    Evicted,
    NodeJoined,
    NodeLost,
    ReplicaFailed,
    ReplicaLost,
    ReplicaStopped,
    Staged,
    StageFailed,
    WorkersChanged,
)
from flashserve.sim.closed import ClosedEngine
from flashserve.sim.cores import Cores
from flashserve.sim.ledger import Ledger
from flashserve.sim.links import CallAt
from flashserve.sim.profiles import THIS, EngineShape, Profile, Speeds, StepCosts
from flashserve.sim.replicas import BUSY, IDLE, Emit, ModelledReplica, ReplicaHost
from flashserve.sim.steps import EngineMaker, Job
from flashserve.sim.storage import Storage
from flashserve.sim.workers import Claim, Workers
from flashserve.types import ModelSpec, NodeId, NodeSpec, Tier


class ModelledNode(ReplicaHost):
    """`attach` it before anything else. Everything that it says goes to `emit`.

    Args:
        costs: of steps of a model of their size; those of others follow from it.
        make_engine: ClosedEngine, or engine.BatchedEngine, which is the real batching and slower.
        adapter_size_bytes: of each adapter.
    """

    def __init__(
        self,
        spec: NodeSpec,
        speeds: Speeds | None = None,
        costs: StepCosts = THIS.costs,
        engine: EngineShape | None = None,
        *,
        disk_bytes: int = THIS.disk_bytes,
        ledger: Ledger | None = None,
        make_engine: EngineMaker = ClosedEngine,
        adapter_size_bytes: int = 64 << 20,
    ) -> None:
        shape = engine or EngineShape()
        self.spec = spec
        self._speeds = speeds or Speeds()
        self._costs = costs
        self._shape = dataclasses.replace(shape, max_sequences=spec.max_sequences)
        self._disk_bytes = disk_bytes
        self._ledger = ledger or Ledger()
        self._make_engine = make_engine
        self._num_adapters = self._shape.adapter_bytes // adapter_size_bytes
        self._shares_cores = self._speeds.compute_at_once is not None

    @classmethod
    def of(
        cls,
        profile: Profile,
        node_id: NodeId,
        ledger: Ledger | None = None,
        make_engine: EngineMaker = ClosedEngine,
    ) -> ModelledNode:
        spec = NodeSpec(
            node_id, 1, profile.num_workers, profile.dram_bytes, profile.engine.max_sequences
        )
        return cls(
            spec,
            profile.speeds,
            profile.costs,
            profile.engine,
            disk_bytes=profile.disk_bytes,
            ledger=ledger,
            make_engine=make_engine,
        )

    def attach(self, call_at: CallAt, emit: Emit) -> None:
        """Give it a clock and a listener; it is up and empty, and has said nothing yet."""
        self._call_at = call_at
        self._emit = emit
        self._reset()

    def _reset(self) -> None:
        self._is_up = True
        self._storage = Storage(
            self._call_at,
            self._speeds,
            self.spec.num_workers,
            dram_bytes=self.spec.dram_bytes,
            disk_bytes=self._disk_bytes,
            ledger=self._ledger,
            loading=self._compute_load,
            staged=self._say_staged,
            left_disk=lambda model_id, _: self._emit(
                Evicted(self.spec.node_id, model_id, Tier.DISK)
            ),
        )
        self._replicas = {}
        self._stopping: set[ModelledReplica] = set()
        self._workers = Workers(self.spec.num_workers, self._speeds.max_asleep)
        self._cores = Cores(self._call_at, self._speeds.compute_at_once)
        self._num_live = self.spec.num_workers

    def join(self) -> None:
        """Say that the node is there, with all its workers started."""
        self._emit(NodeJoined(self.spec))
        self._say_workers()

    def execute(self, command: NodeCommand, now: float) -> None:
        """Carry out an order; one of another epoch is ignored."""
        if command.epoch != self.spec.epoch or not self._is_up:
            return
        model_id = command.model.model_id
        match command:
            case StartReplica():
                self._start(command, now)
            case StopReplica():
                self._stop(command, now)
            case Stage():
                self._stage(command, now)
            case Evict():
                self._storage.evict(model_id, command.tier, now)
                self._emit(Evicted(command.node_id, model_id, command.tier))

    def generate(self, command: Dispatch, job: Job, now: float) -> None:
        """Answer a request: RequestFinished follows, unless its replica is gone."""
        replica = self._replicas.get(command.replica_id)
        if replica is None or replica.engine is None:
            return
        if not job.num_emitted:
            job.dispatched_at = now
        replica.num_jobs += 1
        if replica.use is IDLE:
            self._use(replica, BUSY, now)
        replica.engine.add(job, now)
        if self._shares_cores:
            self._compute(replica, now)
        self._plan_wake(replica, now)

    def suffer(self, event: Event, now: float) -> None:
        """A fault, which the controller is told as well."""
        match event:
            case NodeLost(epoch=self.spec.epoch) if self._is_up:
                self._go_down(now)
            case NodeJoined():
                if self._is_up:
                    self._go_down(now)
                self.spec = event.node
                self._reset()
                self._say_workers()
            case ReplicaLost() if replica := self._replicas.pop(event.replica_id, None):
                self._end(replica, now)
                self._replace_worker(replica, now)
            case ReplicaFailed() if replica := self._replicas.pop(event.replica_id, None):
                self._end(replica, now)
                self._free(replica, now)
            case _:
                pass

    def settle(self, now: float) -> None:
        """Count what is held and used until now, at the end of a run."""
        if not self._is_up:
            return
        self._storage.settle(now)
        for replica in (*self._replicas.values(), *self._stopping):
            if replica.use is not None:
                self._use(replica, replica.use, now)
            if replica.engine is not None:
                replica.engine.catch_up(now)

    # Ends

    def _stop(self, order: StopReplica, now: float) -> None:
        replica = self._replicas.pop(order.replica_id, None)
        if replica is not None:
            self._end(replica, now)
            self._stopping.add(replica)
        stopped = ReplicaStopped(order.node_id, order.replica_id, order.model.model_id)
        epoch = self.spec.epoch

        def over(now: float) -> None:
            if self._is_up and self.spec.epoch == epoch:
                if replica is not None:
                    self._stopping.discard(replica)
                    self._free(replica, now)
                self._emit(stopped)

        self._call_at(now + self._speeds.stop_s, over)

    def _end(self, replica: ModelledReplica, now: float) -> None:
        """It serves no more; its worker is still its own."""
        replica.is_gone = True
        self._cores.end(replica, now)
        if replica.move is not None:
            self._storage.device.cancel(replica.move, now)
        if replica.engine is not None:
            replica.engine.drop(now)
            self._ledger.hold(replica.account, Tier.DEVICE, -1)

    def _free(self, replica: ModelledReplica, now: float) -> None:
        claim = self._let_go(replica, now)
        if claim is None or claim.worker is None:
            if claim is not None:
                self._workers.withdraw(claim)
            return
        if replica.is_loading:
            self._workers.fall_asleep(claim.worker, replica.model.model_id, replica.model.source)
        self._workers.release(claim.worker, now)

    def _let_go(self, replica: ModelledReplica, now: float) -> Claim | None:
        """Its claim. Nothing refers back to it any more, so that no collector need find it."""
        self._unuse(replica, now)
        claim = replica.claim
        replica.claim = replica.move = replica.wake = None
        return claim

    def _replace_worker(self, replica: ModelledReplica, now: float) -> None:
        claim = self._let_go(replica, now)
        if claim is None or claim.worker is None:
            if claim is not None:
                self._workers.withdraw(claim)
            return
        self._num_live -= 1
        self._say_workers()
        epoch = self.spec.epoch

        def started(now: float) -> None:
            if self._is_up and self.spec.epoch == epoch:
                self._num_live += 1
                self._say_workers()
                self._workers.add(now)

        self._call_at(now + self._speeds.worker_start_s, started)

    def _go_down(self, now: float) -> None:
        self._is_up = False
        for replica in (*self._replicas.values(), *self._stopping):
            if not replica.is_gone:
                self._end(replica, now)
            self._unuse(replica, now)
        self._replicas.clear()
        self._stopping.clear()
        self._storage.close(now)

    # Bytes

    def _stage(self, order: Stage, now: float) -> None:
        model = order.model
        if order.tier is Tier.DISK:
            if self._storage.is_on_disk(model):
                self._say_staged(model, Tier.DISK, 0, 0.0, now)
            else:
                self._storage.fetch(model, now, lambda _: None)
            return
        resident = self._storage.hold(model, now)
        if resident is None:
            message = f"{self.spec.node_id} has no room for {model.model_id}"
            failed = StageFailed(order.node_id, model.model_id, Tier.DRAM, "unavailable", message)
            self._emit(failed)
        elif resident.is_loaded:
            self._say_staged(model, Tier.DRAM, 0, 0.0, now)

    def _compute_load(self, model: ModelSpec, now: float) -> None:
        """What cores do for bytes that come; nobody waits for the end of it."""
        seconds = model.size_bytes * self._speeds.load_compute_s_per_byte
        if self._cores.are_shared and seconds > 0:
            self._cores.work(seconds, now, lambda _: None)

    def _say_staged(
        self, model: ModelSpec, tier: Tier, num_bytes: int, seconds: float, _now: float
    ) -> None:
        self._emit(Staged(self.spec.node_id, model.model_id, tier, num_bytes, seconds))

    def _say_workers(self) -> None:
        self._emit(WorkersChanged(self.spec.node_id, self._num_live))
