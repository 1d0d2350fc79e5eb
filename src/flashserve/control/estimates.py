"""What the controller has learnt of speeds and times, from what the nodes report."""

from __future__ import annotations

import enum
from typing import NamedTuple

from flashserve.policy.cost import UNMEASURED, Costs, Rates, WorkerState, average
from flashserve.types import ModelId, NodeId, Phases, Tier


class _Bounds(NamedTuple):
    """The value until something was learnt, and the interval outside which a report is no fact."""

    default: float
    low: float
    high: float


@enum.unique
class Quantity(enum.Enum):
    REMOTE_BYTES_PER_S = _Bounds(300e6, 1e3, 1e13)
    DISK_BYTES_PER_S = _Bounds(1.5e9, 1e3, 1e13)
    DRAM_BYTES_PER_S = _Bounds(10e9, 1e3, 1e15)
    PLACE_SPARE_S = _Bounds(0.001, 1e-7, 3600.0)
    PLACE_STOPPING_S = _Bounds(0.05, 1e-7, 3600.0)
    PLACE_STARTING_S = _Bounds(3.0, 1e-7, 3600.0)
    INIT_S = _Bounds(0.15, 1e-7, 3600.0)
    PREFILL_S = _Bounds(0.3, 1e-7, 3600.0)
    RUN_S = _Bounds(5.0, 1e-7, 86400.0)
    """From a request's dispatch to its end."""


_PLACE = {
    WorkerState.SPARE: Quantity.PLACE_SPARE_S,
    WorkerState.STOPPING: Quantity.PLACE_STOPPING_S,
    WorkerState.STARTING: Quantity.PLACE_STARTING_S,
}
_EVERYWHERE = ""


class Estimates:
    """Running averages per scope (a node, or a model), each with one over all scopes beside it.

    A scope about which nothing is known gets the average of the others, and without any the
    default. Reports that cannot be true (NaN, zero, negative, absurd) are left out.

    Args:
        rates: measured ahead on such machines; they stand in for the defaults.
    """

    def __init__(self, rates: Rates = UNMEASURED) -> None:
        self._averages: dict[tuple[Quantity, str], float] = {}
        measured = {
            Quantity.REMOTE_BYTES_PER_S: rates.remote_bytes_per_s,
            Quantity.DISK_BYTES_PER_S: rates.disk_bytes_per_s,
            Quantity.DRAM_BYTES_PER_S: rates.dram_bytes_per_s,
        }
        self._measured = {what: rate for what, rate in measured.items() if rate is not None}

    def value(self, what: Quantity, scope: str) -> float:
        known = self._averages.get((what, scope))
        if known is None:
            default = self._measured.get(what, what.value.default)
            known = self._averages.get((what, _EVERYWHERE), default)
        return known

    def observe(self, what: Quantity, scope: str, sample: float) -> None:
        bounds = what.value
        for key in ((what, scope), (what, _EVERYWHERE)):
            learnt = average(self._averages.get(key), sample, bounds.low, bounds.high)
            if learnt is not None:
                self._averages[key] = learnt

    def forget(self, scope: str) -> None:
        """Drop what was learnt of a node or model that is gone."""
        for what in Quantity:
            self._averages.pop((what, scope), None)

    def costs(self, node_id: NodeId, model_id: ModelId, worker: WorkerState) -> Costs:
        return Costs(
            remote_bytes_per_s=self.value(Quantity.REMOTE_BYTES_PER_S, node_id),
            disk_bytes_per_s=self.value(Quantity.DISK_BYTES_PER_S, node_id),
            dram_bytes_per_s=self.value(Quantity.DRAM_BYTES_PER_S, node_id),
            place_s=self.value(_PLACE[worker], node_id),
            init_s=self.value(Quantity.INIT_S, model_id),
        )

    def observe_start(
        self,
        node_id: NodeId,
        model_id: ModelId,
        size_bytes: int,
        worker: WorkerState,
        phases: Phases,
    ) -> None:
        """A replica became ready. Its fetch_s and dram_s are learnt from `Staged` alone."""
        self.observe(_PLACE[worker], node_id, phases.place_s)
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
