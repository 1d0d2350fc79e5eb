"""Does the forecaster warm models better than what platforms do today, on real traces?

Azure functions: one day, series below one arrival a minute (in the first two thirds, which is all
that decides), weighted by how many functions each stands for. Models are fitted on the first half
of the day of one half of the functions, thresholds are fixed there until two thirds of it, and the
last third of the day of the other half is reported: neither series nor time leak. ServeGen's
clients and GenTD26's models: days, fitted and reported likewise in time, on all series, whose own
past is known; ServeGen's minutes are drawn. With --fit-traces and --test-traces, the same minutes
of two folders, all series of each.

Idle ratios compare idle minutes with the best of fixed keep-alives (1 to 720 minutes) and hybrid
histograms (18 settings) at the share of cold starts that the threshold, fixed before, came to; the
peers' frontiers are those of the reported time, which favours them. Costs use the threshold that
theory gives, and compare with a keep-alive of as many minutes as a cold start costs;
`servegen_cost` is the worst of these. Log losses compare with the EWMA whose half-life is best on
the reported time. Values are the unfavourable bounds of bootstrap 95 % intervals over series, of
the worst of the seeds (of training and of drawn arrivals). The tick's clock covers one minute told
and one forecast of 10,000 series, warm; its value is the slowest.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

import common
from flashserve.forecast import backtest, decisions, registry, scores, summary, synthetic
from flashserve.forecast.backtest import COLD_COSTS, COLD_SHARES, LEADS, Forecasts, Split
from flashserve.forecast.core import Floats
from flashserve.forecast.decisions import Outcome
from flashserve.forecast.traces import Trace, read_trace

SEEDS = (0, 1, 2)
CANDIDATE = "hybrid" if "hybrid" in registry.MODELS else "hazard"
EWMAS = tuple(f"ewma-{half_life}" for half_life in registry.EWMA_HALF_LIVES)
SKIPPED = ("arima", *EWMAS)  # too slow for every minute of every function; always run as peers
TICK_SERIES = 10_000
TICKS = 20
AIMS = {
    "azure_idle_at_5pct_cold": 0.60,
    "azure_idle_at_10pct_cold": 0.45,
    **{f"azure_cost_{cold_cost}": 0.80 for cold_cost in COLD_COSTS},
    "servegen_cost": 1.00,
    **{f"logloss_ratio_{lead}": 0.95 for lead in LEADS},
}


@dataclasses.dataclass(frozen=True, slots=True)
class Source:
    """A trace's file, what stands in for it where there is none, and whether to divide series."""

    file: str
    stand_in: Callable[[int], Trace]
    halves: bool


SOURCES = {
    "azure": Source(
        "azure2019_functions_1day.parquet",
        lambda seed: synthetic.functions(600, 1440, seed).trace,
        halves=True,
    ),
    "servegen": Source(
        "servegen_client_rates.parquet",
        lambda seed: synthetic.clients(60, 4320, seed).trace,
        halves=False,
    ),
    "gentd26": Source(
        "gentd26_requests.parquet",
        lambda seed: synthetic.clients(30, 4320, seed + 100).trace,
        halves=False,
    ),
}


class Peers:
    """What every model is compared with, on one split."""

    def __init__(self, parts: Split) -> None:
        self.keep_alives = backtest.keep_alives(parts)
        outcomes = [backtest.run_policy(policy, parts) for policy in registry.histograms()]
        self.histograms = decisions.stack(outcomes)
        ewmas = registry.make_models(EWMAS, seed=0)
        self.forecasts = [backtest.run_model(model, parts) for model in ewmas]
        self.losses = np.stack([backtest.losses(said, parts) for said in self.forecasts])


@dataclasses.dataclass(frozen=True, slots=True)
class Measured:
    """One figure of one model on one trace: by name, with its interval."""

    trace: str
    model: str
    seed: int
    cohort: str
    figure: str
    interval: scores.Interval

    def row(self) -> dict[str, Any]:
        row = dataclasses.asdict(self)
        return {**{key: row[key] for key in list(row)[:-1]}, **row["interval"]}


class Judge:
    """Intervals of one model's figures on one split."""

    def __init__(self, parts: Split, peers: Peers, forecasts: Forecasts, resamples: int) -> None:
        self._parts, self._peers, self._forecasts = parts, peers, forecasts
        self._resamples = resamples
        self._weights = parts.future.weights
        self._cohorts = np.array(parts.cohorts())

    def figures(self) -> Iterator[tuple[str, str, scores.Interval]]:
        """Cohort, figure and interval."""
        everything = np.ones(len(self._weights), np.bool_)
        groups = {"all": everything} | {str(c): self._cohorts == c for c in set(self._cohorts)}
        losses = backtest.losses(self._forecasts, self._parts)
        for cohort, chosen in sorted(groups.items()):
            for share in COLD_SHARES:
                ours = self._at(self._forecasts.thresholds[share])
                figure = self._idle(ours, chosen)
                yield cohort, f"idle_at_{share * 100:g}pct_cold", figure
                yield cohort, f"cold_at_{share * 100:g}pct_cold", self._cold(ours, chosen)
            for cold_cost in COLD_COSTS:
                ours = self._at(decisions.fixed_threshold(cold_cost))
                yield cohort, f"cost_{cold_cost}", self._cost(ours, cold_cost, chosen)
            for at, lead in enumerate(LEADS):
                yield cohort, f"logloss_ratio_{lead}", self._loss(losses[:, at], at, chosen)

    def _at(self, threshold: float) -> Outcome:
        return self._forecasts.at_threshold(threshold, self._parts.counts)

    def _interval(
        self, figure: Callable[[Floats], float], chosen: decisions.Bools
    ) -> scores.Interval:
        """figure: of the weights of all series, those outside the chosen being zero."""
        rows = np.flatnonzero(chosen)

        def of_drawn(drawn: Floats) -> float:
            weights = np.zeros(len(self._weights))
            weights[rows] = self._weights[rows] * drawn
            return figure(weights)

        return scores.bootstrap(of_drawn, len(rows), seed=0, num_resamples=self._resamples)

    def _idle(self, ours: Outcome, chosen: decisions.Bools) -> scores.Interval:
        def ratio(weights: Floats) -> float:
            share = float(ours.cold_share(weights))
            best = min(
                decisions.idle_at(peer.cold_share(weights), peer.idle_minutes(weights), share)
                for peer in (self._peers.keep_alives, self._peers.histograms)
            )
            return float(ours.idle_minutes(weights)) / best if best else float("nan")

        return self._interval(ratio, chosen)

    def _cold(self, ours: Outcome, chosen: decisions.Bools) -> scores.Interval:
        return self._interval(lambda weights: float(ours.cold_share(weights)), chosen)

    def _cost(self, ours: Outcome, cold_cost: int, chosen: decisions.Bools) -> scores.Interval:
        theirs = self._peers.keep_alives
        return self._interval(
            lambda weights: summary.cost_ratio(ours, theirs, cold_cost, weights), chosen
        )

    def _loss(self, ours: Floats, at: int, chosen: decisions.Bools) -> scores.Interval:
        def ratio(weights: Floats) -> float:
            best = min(summary.mean_loss(theirs[:, at], weights) for theirs in self._peers.losses)
            return summary.mean_loss(ours, weights) / best if best else float("nan")

        return self._interval(ratio, chosen)


def load(source: Source, directory: pathlib.Path | None, seed: int, quick: bool) -> Trace:
    """The series of a source that there is something to decide about."""
    if directory is None:
        trace = source.stand_in(seed)
    else:
        trace = read_trace(directory / source.file, seed)
    trace = backtest.below(trace, 1.0)
    if quick:
        few = np.random.default_rng(0).permutation(len(trace.weights)) < 240
        trace = trace.select(few)
        trace = trace.before(trace.history.start + min(trace.history.counts.shape[1], 4320))
    return trace


def measure(names: list[str], args: argparse.Namespace, seed: int) -> Iterator[Measured]:
    """Every figure of every model on every trace, with the arrivals and training of one seed."""
    resamples = 200 if args.quick else 1000
    for trace_name, source in SOURCES.items():
        past_dir, future_dir = folders(args)
        past = load(source, past_dir, seed, args.quick)
        apart = past_dir != future_dir
        future = load(source, future_dir, seed, args.quick) if apart else None
        parts = backtest.split(past, future, halves=source.halves and not apart)
        peers = Peers(parts)
        for name in names:
            [model] = registry.make_models([name], seed)
            print(f"seed {seed}: {trace_name}: {name}", flush=True)
            judge = Judge(parts, peers, backtest.run_model(model, parts), resamples)
            for cohort, figure, interval in judge.figures():
                yield Measured(trace_name, name, seed, cohort, figure, interval)


def folders(args: argparse.Namespace) -> tuple[pathlib.Path | None, pathlib.Path | None]:
    """Where to fit and where to report; None where there are no traces."""
    if args.fit_traces or args.test_traces:
        if not (args.fit_traces and args.test_traces):
            raise SystemExit("--fit-traces and --test-traces go together")
        return args.fit_traces, args.test_traces
    traces = args.traces or default_traces()
    return traces, traces


def default_traces() -> pathlib.Path | None:
    """What FLASHSERVE_TRACES names, or the folder beside the clone, if it is there."""
    if named := os.environ.get("FLASHSERVE_TRACES"):
        return pathlib.Path(named)
    beside = pathlib.Path(__file__).resolve().parents[2] / "shared" / "traces"
    return beside if beside.is_dir() else None


def tick_ms(name: str) -> list[float]:
    """Milliseconds of each tick of many series, after two hours."""
    trace = synthetic.functions(1000, 1440, seed=1).trace
    [model] = registry.make_models([name], 0)
    model.fit(trace.history.before(960), trace.weights)
    if not hasattr(model, "follow"):
        return []
    table = np.tile(trace.history.counts, (TICK_SERIES // 1000, 1))
    follower = model.follow([f"s{number}" for number in range(TICK_SERIES)], 0)
    for counts in table.T[:120]:
        follower.advance(counts)
    times = []
    for counts in table.T[120 : 120 + TICKS]:
        started = time.perf_counter()
        follower.advance(counts)
        follower.forecast(LEADS)
        times.append((time.perf_counter() - started) * 1000)
    return times


def values_of(measured: list[Measured], candidate: str, tick: float) -> dict[str, dict[str, Any]]:
    """The unfavourable bounds of the candidate, the worst of all seeds."""
    ours = [each for each in measured if each.model == candidate]

    def worst(trace: str, figures: set[str], *, of_cohorts: bool = False) -> float:
        return max(
            each.interval.high
            for each in ours
            if each.trace == trace
            and each.figure in figures
            and (each.cohort != "all") == of_cohorts
        )

    numbers = {}
    for key in AIMS:
        if key == "servegen_cost":
            numbers[key] = worst("servegen", {f"cost_{cold_cost}" for cold_cost in COLD_COSTS})
        else:
            numbers[key] = worst("azure", {key.removeprefix("azure_")})
    values = {
        key: common.value(number, "ratio", better="lower", aim=AIMS[key])
        for key, number in numbers.items()
    }
    for lead in LEADS:
        number = worst("azure", {f"logloss_ratio_{lead}"}, of_cohorts=True)
        values[f"logloss_worst_cohort_{lead}"] = common.value(
            number, "ratio", better="lower", aim=0.95
        )
    values["tick_10k_ms"] = common.value(tick, "ms", better="lower", aim=100.0)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few series and resamplings")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    for option in ("--traces", "--fit-traces", "--test-traces"):
        parser.add_argument(option, metavar="DIR", type=pathlib.Path)
    parser.add_argument(
        "--models", default="", help="names with commas between; else all quick ones"
    )
    parser.add_argument("--candidate", default=CANDIDATE, help="whose figures are the values")
    args = parser.parse_args()
    names = [name for name in args.models.split(",") if name]
    names = names or [name for name in registry.MODELS if name not in SKIPPED]
    names = names if args.candidate in names else [*names, args.candidate]
    measured: list[Measured] = []
    for seed in SEEDS[:1] if args.quick else SEEDS:
        measured += measure(names, args, seed)
    times = tick_ms(args.candidate)
    stands_in = folders(args) == (None, None)
    common.write_report(
        "forecast",
        seed=SEEDS[0],
        rows=[each.row() for each in measured],
        ratios={},
        values=values_of(measured, args.candidate, max(times, default=float("nan"))),
        notes=(__doc__ or "")
        + ("\nNO TRACES WERE GIVEN: synthetic series.\n" if stands_in else ""),
        json_file=args.json,
    )


if __name__ == "__main__":
    main()
