"""What `flashserve simulate` was asked for, as a trial: trace, models, nodes and forecaster."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from flashserve.config import load_settings
from flashserve.errors import InputError
from flashserve.forecast import backtest, registry, synthetic
from flashserve.forecast.traces import DAY, Trace, read_trace
from flashserve.policy import text
from flashserve.policy.cost import Prices, extent_bytes
from flashserve.sim.forecasts import forecast_events
from flashserve.sim.profiles import Profile, load_profile
from flashserve.sim.report import About
from flashserve.sim.run import Cluster
from flashserve.sim.trial import PREDICTIVE, Trial
from flashserve.sim.workload import MAX_REQUESTS, Workload, WorkloadSettings, make_workload

FORECASTER = "hazard"
"""Fitted in a second; a server's `auto` takes minutes, and is idle less."""
_NUM_SYNTHETIC = 400
_MAX_NODES = 10_000
_MAX_COUNTS = 300_000_000
"""Minutes of all models together: what a few GB of memory hold."""
_FEWEST_SERIES = 8
_FEWEST_MINUTES = 90

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """The options of the command; see its help. model_bytes: None is what the profile's costs are
    of.
    """

    trace: Path | None = None
    fit_trace: Path | None = None
    profile: str = "8xh100"
    num_nodes: int = 1
    num_models: int = 16
    num_requests: int | None = None
    hours: float | None = None
    seed: int = 0
    forecaster: str = FORECASTER
    model_bytes: int | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Scenario:
    trial: Trial
    about: About


def make(wanted: Wanted, names: Sequence[str], progress: Progress) -> Scenario:
    """Read, fit and draw everything that the policies of these names need.

    Raises:
        InputError: a file, profile, forecaster or number is not usable; says which.
    """
    profile = load_profile(wanted.profile)
    [model] = registry.make_models([wanted.forecaster], wanted.seed)
    if wanted.num_nodes > _MAX_NODES:
        raise InputError(f"--nodes {wanted.num_nodes} is more than {_MAX_NODES}")
    if wanted.num_requests is not None and wanted.num_requests > MAX_REQUESTS:
        raise InputError(f"--requests {wanted.num_requests} is more than {MAX_REQUESTS}")
    if wanted.hours is not None and not (wanted.hours > 0 and math.isfinite(wanted.hours)):
        raise InputError(f"--hours {wanted.hours:g} is no positive number")
    model_bytes = _model_bytes(wanted, profile)
    progress("reading", 0, 1)
    fitted, replayed, basis = _traces(wanted)
    if wanted.hours is not None:
        replayed = _first_hours(replayed, wanted.hours)
    _check_fits_memory(wanted.num_models, replayed)
    settings = WorkloadSettings(
        wanted.num_models, wanted.num_requests, (model_bytes,), seed=wanted.seed
    )
    workload = make_workload(replayed, settings)
    cluster = Cluster(profile, wanted.num_nodes)
    configured = load_settings()
    prices = Prices.of(configured.price, profile.worker_cores)
    trial = Trial(workload, cluster, prices, configured.policy)
    about = About(replayed.name, _described(workload, cluster, wanted))
    if PREDICTIVE in names:
        progress("fitting", 0, 1)
        model.fit(fitted.history, fitted.weights)
        trial = dataclasses.replace(trial, forecasts=lambda: forecast_events(model, workload))
        said = f"{about.text} Forecasts are by {wanted.forecaster}, fitted on {basis}."
        about = dataclasses.replace(about, text=said)
    return Scenario(trial, about)


def _traces(wanted: Wanted) -> tuple[Trace, Trace, str]:
    """What the forecaster is fitted on, what is replayed, and the first in words."""
    seed = wanted.seed
    made = synthetic.functions(_NUM_SYNTHETIC, DAY, seed + 1).trace
    if wanted.trace is None:
        replayed = synthetic.functions(_NUM_SYNTHETIC, DAY, seed).trace
    else:
        replayed = read_trace(wanted.trace, seed)
    if wanted.fit_trace is not None:
        return read_trace(wanted.fit_trace, seed), replayed, wanted.fit_trace.name
    if wanted.trace is None:
        return made, replayed, "other synthetic functions"
    num_series, num_minutes = replayed.history.counts.shape
    if num_minutes > DAY:
        parts = backtest.split(replayed)
        start = parts.future.history.start
        after = _after(parts.future, parts.report_from)
        return parts.past.before(start + parts.fit_until), after, "the first half of the trace"
    if num_series >= _FEWEST_SERIES and num_minutes >= _FEWEST_MINUTES:
        parts = backtest.split(replayed, halves=True)
        return parts.past, parts.future, "the half of the trace's series that are not replayed"
    return made, replayed, "synthetic functions, since the trace is too small to divide"


def _model_bytes(wanted: Wanted, profile: Profile) -> int:
    """Raises InputError where no node could hold a model of that size."""
    size_bytes = wanted.model_bytes or profile.costs.size_bytes
    if extent_bytes(size_bytes) > profile.dram_bytes:
        raise InputError(
            f"a model of {text.size(size_bytes)} is larger than the {text.size(profile.dram_bytes)}"
            f" of DRAM that a node of the profile {profile.name} has: give a smaller --size"
        )
    return size_bytes


def _check_fits_memory(num_models: int, trace: Trace) -> None:
    num_minutes = trace.history.counts.shape[1]
    if num_models * num_minutes > _MAX_COUNTS:
        raise InputError(
            f"--models {num_models} for {num_minutes} minutes is more than fits in memory: at most "
            f"{_MAX_COUNTS // num_minutes}, or fewer --hours"
        )


def _after(trace: Trace, column: int) -> Trace:
    history = trace.history
    later = dataclasses.replace(
        history, start=history.start + column, counts=history.counts[:, column:]
    )
    return dataclasses.replace(trace, history=later)


def _first_hours(trace: Trace, hours: float) -> Trace:
    num_minutes = math.ceil(hours * 60)
    if num_minutes > trace.history.counts.shape[1]:
        has = trace.history.counts.shape[1] / 60
        raise InputError(f"--hours {hours:g} is more than the {has:g} hours that there are")
    return trace.before(trace.history.start + num_minutes)


def _described(workload: Workload, cluster: Cluster, wanted: Wanted) -> str:
    source = "" if wanted.trace else "No trace was given: these functions are made up. "
    models = text.count(len(workload.models), "model")
    requests = "request" if workload.num_requests == 1 else "requests"
    return (
        f"{source}{models} of {text.size(workload.models[0].size_bytes)} with "
        f"{workload.num_requests:,} {requests} in {workload.duration_s / 3600:.3g} hours on "
        f"{text.count(wanted.num_nodes, 'node')} ({cluster.profile.name}) with "
        f"{text.count(cluster.num_workers, 'worker')} in all; seed {wanted.seed}."
    )
