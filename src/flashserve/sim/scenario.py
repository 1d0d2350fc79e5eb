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
from flashserve.policy.cost import Prices
from flashserve.sim.forecasts import forecast_events
from flashserve.sim.profiles import load_profile
from flashserve.sim.report import About
from flashserve.sim.run import Cluster
from flashserve.sim.trial import PREDICTIVE, Trial
from flashserve.sim.workload import Workload, WorkloadSettings, make_workload

FORECASTER = "hazard"
"""Fitted in a second; a server's `auto` takes minutes, and is idle less."""
_NUM_SYNTHETIC = 400
_MAX_NODES = 10_000
_FEWEST_SERIES = 8
_FEWEST_MINUTES = 90

Progress = Callable[[str, int, int], None]


@dataclasses.dataclass(frozen=True, slots=True)
class Wanted:
    """The options of the command; see its help."""

    trace: Path | None = None
    fit_trace: Path | None = None
    profile: str = "8xh100"
    num_nodes: int = 1
    num_models: int = 16
    num_requests: int | None = None
    hours: float | None = None
    seed: int = 0
    forecaster: str = FORECASTER


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
    if wanted.hours is not None and not (wanted.hours > 0 and math.isfinite(wanted.hours)):
        raise InputError(f"--hours {wanted.hours:g} is no positive number")
    progress("reading", 0, 1)
    fitted, replayed, basis = _traces(wanted)
    if wanted.hours is not None:
        replayed = _first_hours(replayed, wanted.hours)
    settings = WorkloadSettings(wanted.num_models, wanted.num_requests, seed=wanted.seed)
    workload = make_workload(replayed, settings)
    cluster = Cluster(profile, wanted.num_nodes)
    configured = load_settings()
    trial = Trial(workload, cluster, Prices.of(configured.price), configured.policy)
    about = About(replayed.name, _described(workload, cluster, wanted))
    if PREDICTIVE in names:
        progress("fitting", 0, 1)
        model.fit(fitted.history, fitted.weights)
        trial = dataclasses.replace(trial, forecasts=lambda: forecast_events(model, workload))
        text = f"{about.text} Forecasts are by {wanted.forecaster}, fitted on {basis}."
        about = dataclasses.replace(about, text=text)
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
    nodes = f"{wanted.num_nodes} nodes" if wanted.num_nodes > 1 else "1 node"
    source = "" if wanted.trace else "No trace was given: these functions are made up. "
    gigabytes = workload.models[0].size_bytes / 1e9
    return (
        f"{source}{len(workload.models)} models of {gigabytes:.3g} GB with "
        f"{workload.num_requests:,} requests in {workload.duration_s / 3600:.3g} hours on {nodes} "
        f"({cluster.profile.name}) with {cluster.num_workers} workers in all; seed {wanted.seed}."
    )
