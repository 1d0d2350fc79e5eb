from __future__ import annotations

import pytest

from flashserve.control.estimates import Estimates, Quantity
from flashserve.policy.cost import Rates, WorkerState, startup_s
from flashserve.types import ModelId, NodeId, Phases, Tier

N1, N2, M = NodeId("n1"), NodeId("n2"), ModelId("m")


def test_what_is_not_known_of_one_node_is_taken_from_the_others_and_else_a_default() -> None:
    estimates = Estimates()
    default = estimates.value(Quantity.DISK_BYTES_PER_S, N1)
    estimates.observe_staged(N1, Tier.DRAM, 1000_000, 0.5)
    assert estimates.value(Quantity.DISK_BYTES_PER_S, N1) == 2000_000
    assert estimates.value(Quantity.DISK_BYTES_PER_S, N2) == 2000_000
    estimates.observe_staged(N2, Tier.DRAM, 8000_000, 1.0)
    assert estimates.value(Quantity.DISK_BYTES_PER_S, N1) == 2000_000
    assert estimates.value(Quantity.DISK_BYTES_PER_S, N2) == 8000_000
    assert Estimates().value(Quantity.DISK_BYTES_PER_S, N1) == default


def test_tiers_are_learnt_apart() -> None:
    estimates = Estimates()
    estimates.observe_staged(N1, Tier.DISK, 1000_000, 1.0)
    estimates.observe_staged(N1, Tier.DRAM, 1000_000, 0.1)
    costs = estimates.costs(N1, M, WorkerState.SPARE)
    assert costs.remote_bytes_per_s == pytest.approx(1e6)
    assert costs.disk_bytes_per_s == pytest.approx(1e7)


def test_a_hit_teaches_nothing() -> None:
    estimates = Estimates()
    before = estimates.costs(N1, M, WorkerState.SPARE)
    estimates.observe_staged(N1, Tier.DRAM, 0, 0.0)
    estimates.observe_staged(N1, Tier.DRAM, 0, 1.0)
    estimates.observe_start(N1, M, 1000, WorkerState.SPARE, Phases())
    assert estimates.costs(N1, M, WorkerState.SPARE) == before


def test_the_wait_for_a_worker_is_learnt_by_what_the_start_found() -> None:
    estimates = Estimates()
    estimates.observe_start(N1, M, 1000, WorkerState.STOPPING, Phases(place_s=0.4, init_s=0.2))
    assert estimates.costs(N1, M, WorkerState.STOPPING).place_s == 0.4
    assert estimates.costs(N1, M, WorkerState.SPARE).place_s < 0.01
    assert estimates.costs(N1, M, WorkerState.STARTING).place_s > 1
    assert estimates.costs(N2, M, WorkerState.SPARE).init_s == 0.2


def test_what_is_gone_is_forgotten() -> None:
    estimates = Estimates()
    estimates.observe(Quantity.PREFILL_S, "m", 2.0)
    estimates.observe(Quantity.PREFILL_S, "other", 4.0)
    estimates.forget("m")
    assert estimates.value(Quantity.PREFILL_S, "m") == pytest.approx(2.6)


def test_what_was_measured_ahead_stands_in_for_the_defaults_until_something_is_learnt() -> None:
    estimates = Estimates(Rates(disk_bytes_per_s=5e8))
    costs = estimates.costs(N1, M, WorkerState.SPARE)
    assert costs.disk_bytes_per_s == 5e8
    assert costs.remote_bytes_per_s == Estimates().value(Quantity.REMOTE_BYTES_PER_S, N1)
    estimates.observe_staged(N1, Tier.DRAM, 1000_000, 0.5)
    assert estimates.value(Quantity.DISK_BYTES_PER_S, N1) == 2000_000


@pytest.mark.parametrize("tier", [Tier.REMOTE, Tier.DISK, Tier.DRAM])
@pytest.mark.parametrize("worker", WorkerState)
def test_the_seconds_of_a_start_are_those_of_its_costs(tier: Tier, worker: WorkerState) -> None:
    estimates = Estimates()
    estimates.observe_staged(N1, Tier.DISK, 1000_000, 1.0)
    phases = Phases(place_s=0.5, device_s=0.25, init_s=2.0)
    estimates.observe_start(N1, M, 1000_000, worker, phases)
    for node_id in (N1, N2):
        expected = startup_s(5000_000, tier, estimates.costs(node_id, M, worker))
        assert estimates.startup_s(node_id, M, 5000_000, tier, worker) == expected
