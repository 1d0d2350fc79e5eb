"""Simulated runs for benchmarks/policy.py: cases, variants, and what each model came to in each."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import numpy.typing as npt

from flashserve.config import PolicySettings
from flashserve.forecast import backtest, registry, synthetic
from flashserve.forecast.core import ArrivalModel, Floats
from flashserve.forecast.traces import DAY, Trace, read_trace
from flashserve.policy.cost import Prices
from flashserve.sim import trial
from flashserve.sim.closed import ClosedEngine
from flashserve.sim.forecasts import forecast_events
from flashserve.sim.lengths import lengths_in
from flashserve.sim.profiles import H100_NODE, EngineShape, Profile, StepCosts
from flashserve.sim.results import Results
from flashserve.sim.run import Cluster
from flashserve.sim.steps import AdapterSlots, EngineMaker
from flashserve.sim.workload import Arrival, Workload, WorkloadSettings, make_workload
from flashserve.types import Tier

TRACES = ("azure2019_functions_1day.parquet", "azure2019_sample500_8h.parquet")
PRICES = Prices()
_GB = 10**9
SMALL_NODE = dataclasses.replace(
    # Google Cloud's a3-highgpu-8g: 8 H100, 1,872 GB of memory of which three quarters, and 16 local
    # SSDs of 375 GB, which together read 1.6 million blocks of 4 KiB a second. About one PCIe 4.0
    # drive's rate, as in the servers on which ServerlessLLM's paper measures its scheduler.
    H100_NODE,
    name="8xh100, 1.4 TB of DRAM, 6.5 GB/s of disk",
    dram_bytes=1404 * _GB,
    disk_bytes=5400 * _GB,
    speeds=dataclasses.replace(H100_NODE.speeds, disk_bytes_per_s=6.5e9),
)
_EDGES = np.geomspace(1e-3, 1e4, 1200)


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """num_requests: busy models are thinned to about so many in all.

    warm_up_s: requests before it are served and paid for, but not reported. compression: how many
    times faster than in the trace everything comes.
    """

    name: str
    num_nodes: int
    num_models: int
    num_requests: int
    adapters_per_model: int = 0
    profile: Profile = H100_NODE
    warm_up_s: float = 0.0
    compression: float = 1.0
    max_replicas: int = 1


@dataclasses.dataclass(frozen=True, slots=True)
class Sources:
    """Folders to fit and to report on, None where there are none; and who forecasts."""

    fit: pathlib.Path | None
    test: pathlib.Path | None
    forecaster: str


@dataclasses.dataclass(frozen=True, slots=True)
class Task:
    """One run. price, worker_price: factors on the prices of waiting and of a worker that the
    policy is told.

    ablation: what the run goes without: forecast, tiers, grouping or affinity. on_fit: replays the
    fit half.
    """

    case: Case
    seed: int
    policy: str
    price: float = 1.0
    ablation: str = ""
    on_fit: bool = False
    worker_price: float = 1.0


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """[models] each; ttft: [models, len(_EDGES) + 1], requests by time to the first token.

    missed: whose start had to read from below DRAM; rejected: those that were given up. idle_s: of
    workers held without a request, idle or loading; cost: of all that was held.
    """

    requests: Floats
    cold: Floats
    missed: Floats
    rejected: Floats
    under_1s: Floats
    idle_s: Floats
    busy_s: Floats
    cost: Floats
    ttft: npt.NDArray[np.float32]

    def cold_share(self, weights: Floats) -> float:
        return self.share("cold", weights)

    def share(self, field: str, weights: Floats) -> float:
        """Of requests: those of a field that counts them."""
        return float(getattr(self, field) @ weights) / max(float(self.requests @ weights), 1.0)

    def share_under_1s(self, weights: Floats) -> float:
        return self.share("under_1s", weights)

    def percentile(self, percent: float, weights: Floats) -> float:
        """Seconds that so many percent of the requests do not exceed, within 2 %."""
        counts = weights @ self.ttft
        reached = np.cumsum(counts) >= counts.sum() * percent / 100 - 1e-9
        return float(_EDGES[min(int(np.argmax(reached)), len(_EDGES) - 1)])


def pooled(outcomes: list[Outcome]) -> Outcome:
    """The models of several seeds as one set."""
    return Outcome(
        *(
            np.concatenate([getattr(outcome, field.name) for outcome in outcomes])
            for field in dataclasses.fields(Outcome)
        )
    )


def summed_up(results: Results, warm_up_s: float = 0.0) -> Outcome:
    requests, spent, num = results.requests, results.spent, len(results.models)
    times = np.where(requests.is_rejected, np.inf, requests.ttft_s)
    counted = ~np.isnan(times) & (requests.arrived_at >= warm_up_s)
    model, times = requests.model[counted], times[counted]
    ttft = np.zeros((num, len(_EDGES) + 1), np.float32)
    np.add.at(ttft, (model, np.searchsorted(_EDGES, times)), 1.0)
    count = functools.partial(np.bincount, minlength=num)
    held_s = spent.idle_s + spent.loading_s
    return Outcome(
        count(model).astype(float),
        count(model, weights=requests.is_cold[counted]),
        count(model, weights=requests.is_cold[counted] & (requests.tier[counted] < Tier.DRAM)),
        count(model, weights=requests.is_rejected[counted]),
        count(model, weights=times < 1.0),
        held_s,
        spent.busy_s,
        (held_s + spent.busy_s) * PRICES.gpu_per_s
        + spent.dram_gb_s * PRICES.dram_gb_per_s
        + spent.disk_gb_s * PRICES.disk_gb_per_s,
        ttft,
    )


def run(sources: Sources, task: Task, make_engine: EngineMaker = ClosedEngine) -> Outcome:
    """In whatever process; what several runs need is made once in each."""
    workload = _workload(sources, task.case, task.seed, task.on_fit)
    settings = PolicySettings(max_replicas=task.case.max_replicas)
    profile, is_forecast = task.case.profile, None
    if task.ablation == "forecast":
        is_forecast = False
    elif task.ablation == "grouping":
        settings = settings.model_copy(update={"slot_patience_s": 0.0})
    elif task.ablation == "tiers":
        profile = without_dram_tier(profile)
    elif task.ablation == "affinity":
        workload = _Blind(workload)
    model = _fitted(sources, task.seed)
    tried = trial.Trial(
        workload,
        Cluster(profile, task.case.num_nodes, make_engine),
        PRICES,
        settings,
        lambda: forecast_events(model, workload),
    )
    told = dataclasses.replace(
        PRICES,
        wait_per_s=PRICES.wait_per_s * task.price,
        slo_miss=PRICES.slo_miss * task.price,
        gpu_per_s=PRICES.gpu_per_s * task.worker_price,
    )
    results = tried.run(
        task.policy,
        is_forecast=is_forecast,
        told_prices=told,
        keep_decisions=0,
        keep_phases=False,
    )
    return summed_up(results, task.case.warm_up_s)


def run_with_copies(sources: Sources, task: Task) -> tuple[Outcome, int]:
    """The same, and how many adapters were copied to engines that did not have them."""
    slots: list[AdapterSlots] = []

    def make_engine(
        costs: StepCosts, shape: EngineShape, adapters: AdapterSlots, *, is_open: bool
    ) -> ClosedEngine:
        slots.append(adapters)
        return ClosedEngine(costs, shape, adapters, is_open=is_open)

    outcome = run(sources, task, make_engine)
    return outcome, sum(each.num_loads for each in slots)


def without_dram_tier(profile: Profile) -> Profile:
    """Every start moves its bytes from disk to the device, through the disk's one path."""
    speeds = profile.speeds
    both = 1 / (1 / speeds.disk_bytes_per_s + 1 / speeds.dram_bytes_per_s)
    changed = dataclasses.replace(
        speeds,
        disk_bytes_per_s=1e15,
        dram_bytes_per_s=both,
        dram_total_bytes_per_s=speeds.disk_bytes_per_s,
    )
    return dataclasses.replace(profile, speeds=changed)


class _Blind(Workload):
    """The controller is not told which adapter a request asks for; engines load them all the same.

    A Workload in all else.
    """

    def __init__(self, workload: Workload) -> None:
        for field in dataclasses.fields(Workload):
            object.__setattr__(self, field.name, getattr(workload, field.name))

    def arrivals(self) -> Iterator[Arrival]:
        for at, event, job in Workload.arrivals(self):
            yield at, msgspec.structs.replace(event, adapter=""), job


@functools.lru_cache(maxsize=4)
def _traces(sources: Sources, seed: int) -> tuple[Trace, Trace]:
    """To fit on, and to report on: other series of one trace, or the traces of two folders."""
    if sources.fit is None or sources.test is None:
        return tuple(synthetic.functions(600, DAY, seed + at).trace for at in (1000, 0))
    if sources.fit != sources.test:
        return _read(sources.fit, seed), _read(sources.test, seed)
    parts = backtest.split(_read(sources.fit, seed), halves=True)
    start = parts.past.history.start
    return parts.past.before(start + parts.tune_until), parts.future


def _read(folder: pathlib.Path, seed: int) -> Trace:
    for name in TRACES:
        if (folder / name).is_file():
            return read_trace(folder / name, seed)
    raise SystemExit(f"{folder} has none of {', '.join(TRACES)}")


@functools.lru_cache(maxsize=2)
def _fitted(sources: Sources, seed: int) -> ArrivalModel:
    [model] = registry.make_models([sources.forecaster], seed)
    past, _ = _traces(sources, seed)
    below = backtest.below(past, 1.0)
    model.fit(below.history, below.weights)
    return model


@functools.lru_cache(maxsize=4)
def _workload(sources: Sources, case: Case, seed: int, on_fit: bool) -> Workload:
    past, future = _traces(sources, seed)
    settings = WorkloadSettings(
        num_models=case.num_models,
        num_requests=case.num_requests,
        adapters_per_model=case.adapters_per_model,
        compression=case.compression,
        seed=seed,
    )
    lengths = lengths_in(sources.fit if on_fit else sources.test)
    return make_workload(past if on_fit else future, settings, lengths)


def interval(figure: Callable[[Floats], float], num: int, resamples: int) -> tuple[float, ...]:
    """The figure, and the bounds of its bootstrap 95 % interval over `num` models."""
    rng = np.random.default_rng(0)
    draws = rng.multinomial(num, np.full(num, 1 / num), resamples).astype(float)
    figures = np.array([figure(draw) for draw in draws])
    low, high = np.quantile(figures, [0.025, 0.975], method="inverted_cdf")
    return figure(np.ones(num)), float(low), float(high)
