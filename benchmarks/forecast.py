"""Does the forecaster warm models better than what platforms do today, on real traces?

Decisions: Azure functions of one day, series below one arrival a minute (in the first two thirds,
which is all that decides), weighted by how many functions each stands for. Models are fitted on
the first half of the day of one half of the functions, thresholds are fixed there until two thirds
of it, and the last third of the day of the other half is reported: neither series nor time leak.
ServeGen's clients and GenTD26's models: days, fitted and reported likewise in time, on all series,
whose own past is known; ServeGen's minutes are drawn. With --fit-traces and --test-traces, the
same minutes of two folders, all series of each.

Idle ratios compare idle minutes with the best of fixed keep-alives (1 to 720 minutes) and hybrid
histograms (18 settings) at the share of cold starts that the threshold, fixed before, came to; the
peers' frontiers are those of the reported time, which favours them. Costs use the threshold that
theory gives, and compare with a keep-alive of as many minutes as a cold start costs;
`servegen_cost` is the worst of these. Log losses compare with the EWMA whose half-life is best on
the reported time.

Counts: series that are always busy, at most 600 of a trace by a seeded draw, every fifth minute.
Pinball losses of the 0.9 and 0.99 quantiles of the arrivals within each lead, over those of a
reactive maximum of the last windows with headroom, both chosen where thresholds are fixed;
`max_pinball` is of the larger of the two, as a platform would scale. Coverage is the share of
minutes in which the quantile sufficed.

Paper: the published hybrid (Prophet and an LSTM on its residual) and FlashServe's on the same few
series (a seeded draw: Prophet takes seconds for each) of every trace of more than a day, and the
decomposition beside Prophet alone on the day ahead.

Scale: see benchmarks/forecast_scale.py; run it alone (--parts scale), it takes times.

Values are the unfavourable bounds of bootstrap 95 % intervals over series, of the worst of the
seeds (of training and of drawn arrivals). Models that learn nothing at random run with the first
seed alone.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

import common
import forecast_paper as paper
import forecast_traces as traces
from flashserve.forecast import backtest, registry, scores
from flashserve.forecast.backtest import COLD_COSTS, LEADS, Forecasts, Split
from flashserve.forecast.core import ArrivalModel
from forecast_judge import EWMAS, Judge, Measured, Peers, interval_over
from forecast_traces import ALWAYS_BUSY, SPARSE, Source, Traces

SEEDS = (0, 1, 2)
CANDIDATE = "hybrid"
SEEDED = ("hybrid", "boosted", "auto")
# Too slow for every minute of every series; EWMAs always run as peers, the paper's in its part.
SKIPPED = ("arima", "prophet-lstm", *EWMAS)
PARTS = ("decisions", "counts", "paper", "scale")
PAPER_SERIES = 12
DECOMPOSITION_SERIES = 15
AIMS = {
    "azure_idle_at_5pct_cold": 0.60,
    "azure_idle_at_10pct_cold": 0.45,
    **{f"azure_cost_{cold_cost}": 0.80 for cold_cost in COLD_COSTS},
    "servegen_cost": 1.00,
    **{f"logloss_ratio_{lead}": 0.95 for lead in LEADS},
}
COHORT_AIM = 0.95


def decide(
    names: Sequence[str], args: argparse.Namespace, found: Traces, seeds: Sequence[int]
) -> Iterator[Measured]:
    """Every figure of every model on every trace of series that come and go."""
    for source in SPARSE:
        peers: Peers | None = None
        for seed in seeds:
            parts = found.sparse(source, seed)
            if parts is None:
                break
            if peers is None or source.is_drawn:
                peers = Peers(parts)
            for name in names:
                if seed != seeds[0] and name not in (*SEEDED, args.candidate):
                    continue
                said = run(name, parts, source, seed)
                yield from judged(source.name, parts, peers, said, seed, args.resamples)


def run(name: str, parts: Split, source: Source, seed: int) -> Forecasts:
    say(f"seed {seed}: {source.name}: {name}")
    [model] = registry.make_models([name], seed)
    return backtest.run_model(model, parts)


def judged(
    trace: str, parts: Split, peers: Peers, said: Forecasts, seed: int, resamples: int
) -> Iterator[Measured]:
    for cohort, num_series, figure, interval in Judge(parts, peers, said, resamples).figures():
        yield Measured(trace, said.model, seed, cohort, num_series, figure, interval)


def count(args: argparse.Namespace, found: Traces, seeds: Sequence[int]) -> Iterator[Measured]:
    """How many will come, of series that are always busy."""
    for source in ALWAYS_BUSY:
        for seed in seeds:
            parts = found.busy(source, seed)
            if parts is None:
                break
            say(f"seed {seed}: counts of {source.name}: {args.candidate}")
            model = fitted(args.candidate, parts, seed)
            models = {args.candidate: model}
            yield from paper.busy_figures(source.name, parts, models, seed, args.resamples)


def fitted(name: str, parts: Split, seed: int) -> ArrivalModel:
    [model] = registry.make_models([name], seed)
    past = parts.past
    model.fit(past.history.before(past.history.start + parts.fit_until), past.weights)
    return model


def beside_the_paper(
    args: argparse.Namespace, found: Traces, seeds: Sequence[int]
) -> Iterator[Measured]:
    """Both hybrids on the same few series of every trace of more than a day."""
    at_most = 2 if args.quick else PAPER_SERIES
    fits = paper.RememberedFits()
    for source in SPARSE:
        yield from _beside_on_sparse(source, args, found, seeds, fits, at_most)
    for source in ALWAYS_BUSY:
        for seed in seeds:
            # The arrivals of the first seed: Prophet's fits are those of all.
            parts = found.busy(source, seeds[0])
            if parts is None or not paper.spans_days(parts.future):
                break
            say(f"seed {seed}: {paper.PAPER} beside {args.candidate} on busy {source.name}")
            few = paper.drawn(parts, at_most // 2)
            theirs = paper.paper_model(seed, fits)
            theirs.fit(
                few.past.history.before(few.past.history.start + few.fit_until), few.past.weights
            )
            models = {args.candidate: fitted(args.candidate, parts, seed), paper.PAPER: theirs}
            yield from paper.busy_figures(
                f"{source.name} ({len(few.future.weights)} busy series)",
                few,
                models,
                seed,
                args.resamples,
            )


def _beside_on_sparse(
    source: Source,
    args: argparse.Namespace,
    found: Traces,
    seeds: Sequence[int],
    fits: paper.RememberedFits,
    at_most: int,
) -> Iterator[Measured]:
    parts = found.sparse(source, seeds[0])
    if parts is None or not paper.spans_days(parts.future):
        return
    few = paper.drawn(parts, at_most)
    peers = Peers(few)
    label = f"{source.name} ({len(few.future.weights)} series)"
    for seed in seeds:
        say(f"seed {seed}: {paper.PAPER} beside {args.candidate} on {source.name}")
        theirs = backtest.run_model(paper.paper_model(seed, fits), few)
        ours = of_drawn(run(args.candidate, parts, source, seed), parts, few)
        for said in (theirs, ours):
            yield from judged(label, few, peers, said, seed, args.resamples)
        for figure, interval in direct_ratios(ours, theirs, few, args.resamples):
            yield Measured(
                label,
                f"{args.candidate}/{paper.PAPER}",
                seed,
                "all",
                len(few.future.weights),
                figure,
                interval,
            )


def of_drawn(said: Forecasts, parts: Split, few: Split) -> Forecasts:
    """What was said of the series of `few`; the thresholds are those of all."""
    wanted = set(few.future.history.names)
    rows = [at for at, name in enumerate(parts.future.history.names) if name in wanted]
    return Forecasts(said.model, said.p[rows], said.thresholds)


def direct_ratios(
    ours: Forecasts, theirs: Forecasts, parts: Split, resamples: int
) -> Iterator[tuple[str, scores.Interval]]:
    """Log losses of one model over those of another."""
    losses = [backtest.losses(said, parts) for said in (ours, theirs)]
    weights = parts.future.weights
    for at, lead in enumerate(LEADS):
        known = ~np.isnan(losses[0][:, at])
        mine, other = (np.where(known, loss[:, at], 0) for loss in losses)
        yield (
            f"logloss_{lead}",
            interval_over(
                lambda chosen, mine=mine, other=other: (  # type: ignore[misc]
                    float(chosen @ mine) / max(float(chosen @ other), 1e-12)
                ),
                np.arange(len(weights)),
                weights,
                resamples,
            ),
        )


def decompositions(args: argparse.Namespace, found: Traces) -> Iterator[Measured]:
    """The decomposition beside Prophet, of all traces of more than two days together."""
    at_most = 2 if args.quick else DECOMPOSITION_SERIES
    errors = []
    for source, choose in [(s, found.sparse) for s in SPARSE] + [
        (s, found.busy) for s in ALWAYS_BUSY
    ]:
        parts = choose(source, SEEDS[0])
        if parts is None or parts.future.history.counts.shape[1] < 3 * 1440:
            continue
        say(f"decomposition beside Prophet on {source.name}")
        ours, theirs = paper.daily_errors(parts.future, at_most)
        errors.append((ours, theirs))
        if len(ours):
            interval = paper.mae_ratio(ours, theirs, args.resamples)
            yield Measured(
                source.name, "decomposition/prophet", 0, "all", len(ours), "mae_day", interval
            )
    ours, theirs = (np.concatenate([pair[side] for pair in errors] or [[]]) for side in (0, 1))
    if len(ours):
        interval = paper.mae_ratio(ours, theirs, args.resamples)
        yield Measured("all", "decomposition/prophet", 0, "all", len(ours), "mae_day", interval)


def scale(candidate: str) -> dict[str, Any]:
    """What 10,000 series cost, measured in a process of its own."""
    script = pathlib.Path(__file__).with_name("forecast_scale.py")
    say(f"10,000 series: {candidate}")
    done = subprocess.run(
        [sys.executable, str(script), candidate], stdout=subprocess.PIPE, text=True, check=True
    )
    measured: dict[str, Any] = json.loads(done.stdout)
    return measured


def values_of(measured: Sequence[Measured], candidate: str) -> dict[str, dict[str, Any]]:
    """The unfavourable bounds of the candidate, the worst of all seeds; what was not run is not."""
    ours = [each for each in measured if each.model == candidate]
    values = {}

    def worst(key: str, trace: str, cohort: str, figures: set[str], aim: float) -> None:
        highs = [
            each.interval.high
            for each in ours
            if (each.trace, each.cohort) == (trace, cohort) and each.figure in figures
        ]
        if highs:
            values[key] = ratio(max(highs), aim)

    for key, aim in AIMS.items():
        if key == "servegen_cost":
            worst(key, "servegen", "all", {f"cost_{cost}" for cost in COLD_COSTS}, aim)
        else:
            worst(key, "azure", "all", {key.removeprefix("azure_")}, aim)
    cohorts = {each.cohort for each in ours if each.trace == "azure"} - {"all"}
    for trace, cohort in [*(("azure", cohort) for cohort in sorted(cohorts)), ("servegen", "llm")]:
        for lead in LEADS:
            figure = f"logloss_ratio_{lead}"
            worst(f"{figure}_{cohort}", trace, cohort, {figure}, COHORT_AIM)
    beside = [each.interval.high for each in measured if each.figure == "mae_day"]
    if beside:
        # The last one is of all traces together.
        values["decomposition_mae_ratio"] = ratio(beside[-1], 1.03)
    return values


def ratio(number: float, aim: float) -> dict[str, Any]:
    """A value that is none where there is nothing to compare with."""
    if math.isfinite(number):
        return common.value(number, "ratio", better="lower", aim=aim)
    return {**common.value(0.0, "ratio", better="lower", aim=aim), "value": None, "met": False}


def scale_values(costs: dict[str, Any]) -> dict[str, dict[str, Any]]:
    numbers = {
        "tick_10k_ms": (max(costs["tick_ms"], default=float("nan")), "ms", 100.0),
        "refit_10k_s": (max(costs["refit_s"]), "s", 2.0),
        "finetune_10k_cpu_s": (costs["finetune_cpu_s"], "s", 600.0),
        "memory_10k_gb": (max(costs["tick_peak_gb"], costs["finetune_peak_gb"]), "GB", 1.0),
        "decomposition_time_ratio": (
            max(costs["refit_s"]) / 10_000 / costs["prophet_s"],
            "ratio",
            0.001,
        ),
    }
    return {
        key: common.value(number, unit, better="lower", aim=aim)
        for key, (number, unit, aim) in numbers.items()
    }


def say(line: str) -> None:
    print(line, flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few series and resamplings")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    for option in ("--traces", "--fit-traces", "--test-traces"):
        parser.add_argument(option, metavar="DIR", type=pathlib.Path)
    parser.add_argument("--models", default="", help="names with commas between; else quick ones")
    parser.add_argument("--candidate", default=CANDIDATE, help="whose figures are the values")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, with commas between")
    args = parser.parse_args()
    args.parts = [part for part in args.parts.split(",") if part]
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    args.resamples = 200 if args.quick else 1000
    return args


def main() -> None:
    args = parse()
    seeds = SEEDS[:1] if args.quick else SEEDS
    folders = traces.folders_of(args)
    found = Traces(folders, quick=args.quick)
    names = [name for name in args.models.split(",") if name]
    names = names or [name for name in registry.MODELS if name not in SKIPPED]
    names = names if args.candidate in names else [*names, args.candidate]
    registry.make_models(names, 0)  # a wrong name is said before the work
    measured: list[Measured] = []
    if "decisions" in args.parts:
        measured += decide(names, args, found, seeds)
    if "counts" in args.parts:
        measured += count(args, found, seeds)
    if "paper" in args.parts:
        measured += beside_the_paper(args, found, seeds)
        measured += decompositions(args, found)
    values = values_of(measured, args.candidate)
    rows = [each.row() for each in measured]
    if "scale" in args.parts:
        costs = scale(args.candidate)
        values |= scale_values(costs)
        rows = rows or [costs]
    notes = __doc__ or ""
    if folders.past is None:
        notes += "\nNO TRACES WERE GIVEN: synthetic series.\n"
    common.write_report(
        "forecast",
        seed=SEEDS[0],
        rows=rows or [{"nothing": "was measured"}],
        ratios={},
        values=values,
        notes=notes,
        json_file=args.json,
    )


if __name__ == "__main__":
    main()
