"""The replicas of a modelled node: how one starts, and when its engine is called.

With `executes_while_loading` a replica is ready before its bytes are there, and its first step
waits for them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import msgspec

from flashserve.messages.commands import StartReplica
from flashserve.messages.events import Event, ReplicaFailed, ReplicaReady, RequestFinished
from flashserve.sim.cores import Cores
from flashserve.sim.ledger import Account, Ledger, Use
from flashserve.sim.links import CallAt, Move
from flashserve.sim.profiles import EngineShape, Speeds, StepCosts
from flashserve.sim.steps import INFINITE, AdapterSlots, EngineMaker, SteppedEngine
from flashserve.sim.storage import Resident, Storage
from flashserve.sim.workers import Claim, Workers
from flashserve.types import ModelSpec, NodeSpec, Phases, ReplicaId, Tier

Emit = Callable[[Event], None]
LOADING, BUSY, IDLE = Use
_NUM_GROUPS = 32
"""The copy to the device follows the bytes from disk by groups; one of them is left at the end."""


class ModelledReplica(msgspec.Struct, eq=False):
    """From the order to start it until its worker is free again."""

    replica_id: ReplicaId
    model: ModelSpec
    account: Account
    resident: Resident
    ordered_at: float
    claim: Claim | None = None
    use: Use | None = None
    since: float = 0.0
    move: Move | None = None
    engine: SteppedEngine | None = None
    wake: Callable[[float], None] | None = None
    wake_at: float = INFINITE
    num_jobs: int = 0
    is_loading: bool = False
    """Its worker has been told to load."""
    is_open: bool = False
    """Its weights are where it computes."""
    is_gone: bool = False


class ReplicaHost:
    """What a node and its replicas share; nodes.py says what it all is."""

    spec: NodeSpec
    _speeds: Speeds
    _costs: StepCosts
    _shape: EngineShape
    _ledger: Ledger
    _make_engine: EngineMaker
    _num_adapters: int
    _shares_cores: bool
    _call_at: CallAt
    _emit: Emit
    _storage: Storage
    _replicas: dict[ReplicaId, ModelledReplica]
    _workers: Workers
    _cores: Cores

    # Starts

    def _start(self, order: StartReplica, now: float) -> None:
        resident = self._storage.hold(order.model, now)
        if resident is None:
            message = f"{self.spec.node_id} has no room for {order.model.model_id}"
            model_id = order.model.model_id
            self._emit(
                ReplicaFailed(order.node_id, order.replica_id, model_id, "unavailable", message)
            )
            return
        account = self._ledger.add_model(order.model)
        replica = ModelledReplica(order.replica_id, order.model, account, resident, now)
        self._replicas[order.replica_id] = replica
        if not resident.is_loaded:
            resident.waiting.append(functools.partial(self._bytes_there, replica))
        claimed = functools.partial(self._claimed, replica)
        replica.claim = self._workers.claim(order.model.model_id, claimed, now)
        self._proceed(replica, now)

    def _claimed(self, replica: ModelledReplica, now: float) -> None:
        self._use(replica, LOADING, now)
        if replica.claim is not None:  # else `_start` goes on itself
            self._proceed(replica, now)

    def _bytes_there(self, replica: ModelledReplica, now: float) -> None:
        if replica.is_gone:
            return
        if replica.is_loading:
            self._copy(replica, replica.model.size_bytes / _NUM_GROUPS, self._opened, now)
        else:
            self._proceed(replica, now)

    def _proceed(self, replica: ModelledReplica, now: float) -> None:
        """Go on once there is a worker, and bytes if the start waits for them."""
        claim, speeds = replica.claim, self._speeds
        if claim is None or claim.worker is None or replica.is_loading:
            return
        early = speeds.executes_while_loading
        if not replica.resident.is_loaded and not early:
            return
        replica.is_loading = True
        woken = claim.worker.asleep.pop(replica.model.model_id, None) == replica.model.source
        init_s = speeds.wake_s if woken else speeds.init_s
        began_at = now
        if early:
            if replica.resident.is_loaded:
                self._copy(replica, replica.model.size_bytes, self._opened, now)
            self._build(replica, self._phases(replica, began_at, 0.0, init_s), now)
            return

        def bound(replica: ModelledReplica, now: float) -> None:
            replica.is_open = True
            self._build(replica, self._phases(replica, began_at, now - began_at, init_s), now)

        self._copy(replica, replica.model.size_bytes, bound, now)

    def _phases(
        self, replica: ModelledReplica, began_at: float, device_s: float, init_s: float
    ) -> Phases:
        """What the start takes; of bytes that came for somebody else too, what it waited for."""
        resident = replica.resident
        waited_s = began_at - replica.ordered_at
        moved_s = 0.0
        if resident.is_loaded:
            arrived_at = resident.since + resident.fetch_s + resident.dram_s
            moved_s = max(0.0, arrived_at - replica.ordered_at)
        dram_s = min(resident.dram_s, moved_s)
        return Phases(
            place_s=max(0.0, waited_s - moved_s),
            fetch_s=moved_s - dram_s,
            dram_s=dram_s,
            device_s=device_s,
            init_s=init_s,
        )

    def _copy(
        self,
        replica: ModelledReplica,
        num_bytes: float,
        done: Callable[[ModelledReplica, float], None],
        now: float,
    ) -> None:
        replica.move = self._storage.device.send(num_bytes, now, functools.partial(done, replica))

    def _opened(self, replica: ModelledReplica, now: float) -> None:
        replica.is_open = True
        if replica.engine is not None:
            replica.engine.open(now)
            self._loaded(replica, now)
            if self._shares_cores:
                self._compute(replica, now)
            self._plan_wake(replica, now)

    def _build(self, replica: ModelledReplica, phases: Phases, now: float) -> None:
        """Make or wake the module, which takes `init_s` of a worker's compute."""
        ready = functools.partial(self._ready, replica, phases, now)
        self._cores.work(phases.init_s, now, ready)

    def _ready(
        self, replica: ModelledReplica, phases: Phases, built_from: float, now: float
    ) -> None:
        if replica.is_gone:
            return
        if self._cores.are_shared:
            phases = msgspec.structs.replace(phases, init_s=now - built_from)
        slots = AdapterSlots(self._num_adapters, self._speeds.adapter_s)
        costs = self._costs.of(replica.model.size_bytes)
        replica.engine = self._make_engine(costs, self._shape, slots, is_open=replica.is_open)
        replica.wake = functools.partial(self._wake, replica)
        self._ledger.hold(replica.account, Tier.DEVICE, 1)
        if replica.is_open:
            self._loaded(replica, now)
        model_id = replica.model.model_id
        self._emit(ReplicaReady(self.spec.node_id, replica.replica_id, model_id, phases))

    def _loaded(self, replica: ModelledReplica, now: float) -> None:
        self._use(replica, BUSY if replica.num_jobs else IDLE, now)

    # Engines

    def _compute(self, replica: ModelledReplica, now: float) -> None:
        """Let the others that compute know, once this one begins or ends to."""
        assert replica.engine is not None
        if replica.engine.is_computing:
            self._cores.begin(replica, functools.partial(self._pace, replica), now)
        else:
            self._cores.end(replica, now)

    def _pace(self, replica: ModelledReplica, stretch: float, now: float) -> None:
        assert replica.engine is not None
        replica.engine.pace(stretch, now)
        self._plan_wake(replica, now)

    def _plan_wake(self, replica: ModelledReplica, now: float) -> None:
        assert replica.engine is not None
        assert replica.wake is not None
        at = replica.engine.next_at
        at = max(at, now)  # sums of steps may fall a rounding short
        if at < replica.wake_at:  # what was planned for later comes too, and finds nothing to do
            replica.wake_at = at
            self._call_at(at, replica.wake)

    def _wake(self, replica: ModelledReplica, now: float) -> None:
        if replica.is_gone or now != replica.wake_at or replica.engine is None:
            return
        replica.wake_at = INFINITE
        for job in replica.engine.advance(now):
            replica.num_jobs -= 1
            prefill_s = job.first_token_at - job.dispatched_at - job.gated_s
            self._emit(RequestFinished(job.request_id, max(prefill_s, 0.0)))
        if not replica.num_jobs and replica.use is BUSY:
            self._use(replica, IDLE, now)
        if self._shares_cores:
            self._compute(replica, now)
        self._plan_wake(replica, now)

    # Accounts

    def _use(self, replica: ModelledReplica, use: Use, now: float) -> None:
        if replica.use is not None:
            self._unuse(replica, now)
        replica.use, replica.since = use, now
        self._ledger.num_workers[use] += 1

    def _unuse(self, replica: ModelledReplica, now: float) -> None:
        if replica.use is not None:
            replica.account.seconds[replica.use] += now - replica.since
            self._ledger.num_workers[replica.use] -= 1
            replica.use = None
