"""What the controller has learnt of speeds and times, from what the nodes report."""

from __future__ import annotations

import enum
from typing import NamedTuple

from flashserve.policy.cost import UNMEASURED, Costs, Rates, WorkerState, average
from flashserve.types import ModelId, NodeId, Phases, Tier


class Quantity(enum.IntEnum):
    """What is learnt. An index, because every event looks several of them up."""

    REMOTE_BYTES_PER_S = 0
    DISK_BYTES_PER_S = 1
    DRAM_BYTES_PER_S = 2
    PLACE_SPARE_S = 3
    PLACE_STOPPING_S = 4
    PLACE_STARTING_S = 5
    INIT_S = 6
    PREFILL_S = 7
    RUN_S = 8
    """From a request's dispatch to its end."""


class _Bounds(NamedTuple):
    """The value until something was learnt, and the interval outside which a report is no fact."""

    default: float
    low: float
    high: float


_BOUNDS = (
    _Bounds(300e6, 1e3, 1e13),
    _Bounds(1.5e9, 1e3, 1e13),
    _Bounds(10e9, 1e3, 1e15),
    _Bounds(0.001, 1e-7, 3600.0),
    _Bounds(0.05, 1e-7, 3600.0),
    _Bounds(3.0, 1e-7, 3600.0),
    _Bounds(0.15, 1e-7, 3600.0),
    _Bounds(0.3, 1e-7, 3600.0),
    _Bounds(5.0, 1e-7, 86400.0),
)
"""By Quantity."""


_EVERYWHERE = ""
_REMOTE, _DISK, _DRAM, _SPARE, _, _, _INIT, _PREFILL, _RUN = map(int, Quantity)
"""Plain numbers, since they are looked up in nearly every event."""
_SPARE_WORKER, _DRAM_TIER = WorkerState.SPARE, Tier.DRAM


def _place(worker: WorkerState) -> Quantity:
    if worker is WorkerState.SPARE:
        return Quantity.PLACE_SPARE_S
    if worker is WorkerState.STOPPING:
        return Quantity.PLACE_STOPPING_S
    return Quantity.PLACE_STARTING_S


class Estimates:
    """Running averages per scope (a node, or a model), each with one over all scopes beside it.

    A scope about which nothing is known gets the average of the others, and without any the
    default. Reports that cannot be true (NaN, zero, negative, absurd) are left out.

    Args:
        rates: measured ahead on such machines; they stand in for the defaults.
    """

    def __init__(self, rates: Rates = UNMEASURED) -> None:
        self._averages: list[dict[str, float]] = [{} for _ in _BOUNDS]
        self._default = [bounds.default for bounds in _BOUNDS]
        """What holds where nothing is known of a scope."""
        for what, rate in (
            (Quantity.REMOTE_BYTES_PER_S, rates.remote_bytes_per_s),
            (Quantity.DISK_BYTES_PER_S, rates.disk_bytes_per_s),
            (Quantity.DRAM_BYTES_PER_S, rates.dram_bytes_per_s),
        ):
            if rate is not None:
                self._default[what] = rate

    def value(self, what: Quantity, scope: str) -> float:
        known = self._averages[what].get(scope)
        return self._default[what] if known is None else known

    def observe(self, what: int, scope: str, sample: float) -> None:
        """what: a Quantity."""
        _, low, high = _BOUNDS[what]
        averages = self._averages[what]
        for key in (scope, _EVERYWHERE):
            learnt = average(averages.get(key), sample, low, high)
            if learnt is not None:
                averages[key] = learnt
        self._default[what] = averages.get(_EVERYWHERE, self._default[what])

    def observe_run(self, model_id: ModelId, prefill_s: float, run_s: float) -> None:
        """A request has ended: seconds from its dispatch to its first token, and to its last."""
        self.observe(_PREFILL, model_id, prefill_s)
        self.observe(_RUN, model_id, run_s)

    def forget(self, scope: str) -> None:
        """Drop what was learnt of a node or model that is gone."""
        for averages in self._averages:
            averages.pop(scope, None)

    def costs(self, node_id: NodeId, model_id: ModelId, worker: WorkerState) -> Costs:
        remote, disk, dram, *_ = self._averages
        place = _place(worker)
        default = self._default
        return Costs(
            remote.get(node_id, default[_REMOTE]),
            disk.get(node_id, default[_DISK]),
            dram.get(node_id, default[_DRAM]),
            self._averages[place].get(node_id, default[place]),
            self._averages[_INIT].get(model_id, default[_INIT]),
        )

    def startup_s(
        self,
        node_id: NodeId,
        model_id: ModelId,
        size_bytes: int,
        tier: Tier,
        worker: WorkerState = _SPARE_WORKER,
    ) -> float:
        """`cost.startup_s` of `costs`, which nobody else needs then."""
        averages, default = self._averages, self._default
        place = _SPARE if worker is _SPARE_WORKER else _place(worker)
        seconds = averages[place].get(node_id, default[place])
        seconds += averages[_INIT].get(model_id, default[_INIT])
        seconds += size_bytes / averages[_DRAM].get(node_id, default[_DRAM])
        if tier < _DRAM_TIER:
            below = _DISK if tier else _REMOTE
            seconds += size_bytes / averages[below].get(node_id, default[below])
        return seconds

    def prefill_s(self, model_id: ModelId) -> float:
        """From a request's dispatch to its first token."""
        return self._averages[_PREFILL].get(model_id, self._default[_PREFILL])

    def run_s(self, model_id: ModelId) -> float:
        """From a request's dispatch to its end."""
        return self._averages[_RUN].get(model_id, self._default[_RUN])

    def observe_start(
        self,
        node_id: NodeId,
        model_id: ModelId,
        size_bytes: int,
        worker: WorkerState,
        phases: Phases,
    ) -> None:
        """A replica became ready. Its fetch_s and dram_s are learnt from `Staged` alone."""
        self.observe(_place(worker), node_id, phases.place_s)
        self.observe(Quantity.INIT_S, model_id, phases.init_s)
        if phases.device_s > 0:
            rate = size_bytes / phases.device_s
            self.observe(Quantity.DRAM_BYTES_PER_S, node_id, rate)

    def observe_staged(self, node_id: NodeId, tier: Tier, num_bytes: int, seconds: float) -> None:
        """Bytes reached `tier`; a hit reports zeros and teaches nothing."""
        if seconds > 0:
            disk = tier is Tier.DISK
            what = Quantity.REMOTE_BYTES_PER_S if disk else Quantity.DISK_BYTES_PER_S
            self.observe(what, node_id, num_bytes / seconds)
