from __future__ import annotations

import numpy as np
import pytest

from flashserve.config import PolicySettings
from flashserve.control.controller import Controller
from flashserve.forecast import synthetic
from flashserve.messages.commands import StartReplica, StopReplica
from flashserve.messages.events import Tick
from flashserve.sim.profiles import H100_NODE, THIS, Profile
from flashserve.sim.results import Results
from flashserve.sim.run import Cluster, _Decisions, simulate
from flashserve.sim.workload import Workload, WorkloadSettings, make_workload
from flashserve.types import ModelId, ModelSpec, NodeId, ReplicaId, Tier

TRACE = synthetic.functions(30, 120, seed=2).trace


def workload(**settings: object) -> Workload:
    chosen = WorkloadSettings(num_models=25, **settings)  # type: ignore[arg-type]
    return make_workload(TRACE, chosen)


def run(made: Workload, profile: Profile = H100_NODE, num_nodes: int = 1) -> Results:
    controller = Controller(PolicySettings(keep_alive_s=120.0), profile.rates)
    return simulate(controller, made, Cluster(profile, num_nodes), after_s=100.0)


@pytest.fixture(scope="module")
def results() -> Results:
    return run(workload())


def test_a_run_repeats_exactly(results: Results) -> None:
    again = run(workload())
    assert np.array_equal(results.requests.ttft_s, again.requests.ttft_s, equal_nan=True)
    assert results.num_commands == again.num_commands
    assert np.array_equal(results.spent.idle_s, again.spent.idle_s)


def test_every_request_is_answered_or_rejected(results: Results) -> None:
    requests = results.requests
    assert len(requests.model) == workload().num_requests
    assert (np.isfinite(requests.ttft_s) != requests.is_rejected).all()


def test_the_phases_of_a_request_are_all_of_its_time_to_the_first_token(results: Results) -> None:
    requests = results.requests
    assert requests.phases is not None
    answered = ~requests.is_rejected
    total = requests.phases[answered].sum(axis=1)
    assert total == pytest.approx(requests.ttft_s[answered], abs=1e-4)
    assert (requests.phases[answered] >= 0).all()
    warm = answered & ~requests.is_cold
    assert (requests.phases[warm][:, 1:6] == 0).all()
    assert (requests.tier[answered & requests.is_cold] < Tier.DEVICE).any()


def test_no_more_workers_are_used_than_there_are(results: Results) -> None:
    spent, at_once = results.spent, results.timeline
    used = spent.busy_s.sum() + spent.loading_s.sum() + spent.idle_s.sum()
    assert 0 < used <= results.num_workers * results.duration_s
    assert (at_once.busy + at_once.loading + at_once.idle <= results.num_workers).all()
    assert (at_once.tiers.sum(axis=1) == len(results.models)).all()
    assert spent.dram_gb_s.sum() * 1e9 <= H100_NODE.dram_bytes * results.duration_s


def test_more_nodes_do_not_make_requests_wait_longer(results: Results) -> None:
    wide = run(workload(), num_nodes=4)
    assert np.nanmean(wide.requests.ttft_s) <= np.nanmean(results.requests.ttft_s) + 1e-3


def test_remote_models_are_fetched_once_and_are_then_on_disk() -> None:
    made = workload(lowest_tier=Tier.REMOTE, model_bytes=(269_000_000,))
    done = run(made, THIS)
    assert done.timeline.tiers[0, Tier.REMOTE] == 25
    used = np.unique(done.requests.model)
    assert (done.spent.disk_gb_s[used] > 0).all()
    assert done.timeline.tiers[-1, Tier.REMOTE] == 25 - len(used)


def test_kept_decisions_are_spread_over_the_run() -> None:
    kept = _Decisions(num_kept=4)
    model = ModelSpec(ModelId("m"), "sim://m", 1)
    for at in range(1000):
        stop = StopReplica(NodeId("n"), 1, ReplicaId(f"m#{at}"), model, f"because {at}")
        kept(float(at), Tick(), [stop])
    kept(1000.0, Tick(), [StartReplica(NodeId("n"), 1, ReplicaId("m#x"), model, "last")])
    assert [each.at for each in kept.kept] == [0.0, 256.0, 512.0, 768.0, 1000.0]
    assert kept.kept[-1].verb == "start"
