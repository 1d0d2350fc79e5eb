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
peers' frontiers are those of the reported time, which favours them; where none of them is as
seldom cold, there is no ratio. Costs use the threshold that
theory gives, and compare with a keep-alive of as many minutes as a cold start costs;
`servegen_cost` is the worst of these. Log losses compare with the EWMA whose half-life is best on
the reported time.

Counts: series that are always busy, at most 600 of a trace by a seeded draw, every fifth minute.
Pinball losses of the 0.9 and 0.99 quantiles of the arrivals within each lead, over those of a
reactive maximum of the last windows with headroom, both chosen where thresholds are fixed;
`max_pinball` is of the larger of the two, as a platform would scale. Coverage is the share of
minutes in which the quantile sufficed.

Paper: the published hybrid (Prophet and an LSTM on its residual, three seeds) and FlashServe's on
the same few series (a seeded draw of 12, of 6 busy ones: Prophet takes seconds for each) of every
trace of more than a day. Seasons: the decomposition beside Prophet alone on the day ahead, twice,
of 12 series of every trace of three days.

Scale: see benchmarks/forecast_scale.py; run it alone (--parts scale), it takes times.

Values are the unfavourable bounds of bootstrap 95 % intervals over series, of the worst of three
seeds (of training and of drawn arrivals). Models other than the candidate, and counts, have the
first seed alone.
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

import common
import forecast_paper as paper
from flashserve.forecast import registry
from flashserve.forecast.backtest import COLD_COSTS, LEADS
from forecast_counts import busy_figures
from forecast_judge import EWMAS, Measured, Peers, Runs, judged, say
from forecast_traces import ALWAYS_BUSY, SPARSE, Traces, folders_of

SEEDS = (0, 1, 2)
CANDIDATE = "auto"
# Too slow for every minute of every series; EWMAs always run as peers, the paper's in its part.
SKIPPED = ("arima", "prophet-lstm", *EWMAS)
PARTS = ("decisions", "counts", "paper", "seasons", "scale")
PAPER_SERIES = 12
AIMS = {
    "azure_idle_at_5pct_cold": 0.60,
    "azure_idle_at_10pct_cold": 0.45,
    **{f"azure_cost_{cold_cost}": 0.80 for cold_cost in COLD_COSTS},
    "servegen_cost": 1.00,
    **{f"logloss_ratio_{lead}": 0.95 for lead in LEADS},
}
COHORT_AIM = 0.95


def decide(
    names: Sequence[str], args: argparse.Namespace, found: Traces, runs: Runs, seeds: Sequence[int]
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
            for name in names if seed == seeds[0] else [args.candidate]:
                said = runs.forecasts(name, source.name, parts, seed)
                yield from judged(source.name, parts, peers, said, seed, args.resamples)


def count(args: argparse.Namespace, found: Traces, runs: Runs, seed: int) -> Iterator[Measured]:
    """How many will come, of series that are always busy."""
    for source in ALWAYS_BUSY:
        parts = found.busy(source, seed)
        if parts is not None:
            model = runs.fitted(args.candidate, source.name, parts, seed)
            yield from busy_figures(source.name, parts, model, seed, args.resamples)


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
    for each in measured:
        if (each.trace, each.figure) == (paper.ALL, "mae_day"):
            values["decomposition_mae_ratio"] = ratio(each.interval.high, 1.03)
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


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, few series and resamplings")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    for option in ("--traces", "--fit-traces", "--test-traces"):
        parser.add_argument(option, metavar="DIR", type=pathlib.Path)
    parser.add_argument("--models", default="", help="names with commas between; else quick ones")
    parser.add_argument("--candidate", default=CANDIDATE, help="whose figures are the values")
    parser.add_argument("--parts", default=",".join(PARTS), help="which, with commas between")
    parser.add_argument("--only", default="", help="which traces, with commas between; else all")
    args = parser.parse_args()
    args.only = [name for name in args.only.split(",") if name]
    known = {source.name for source in (*SPARSE, *ALWAYS_BUSY)}
    if unknown := set(args.only) - known:
        parser.error(f"no trace {', '.join(sorted(unknown))}; there are {', '.join(sorted(known))}")
    args.parts = [part for part in args.parts.split(",") if part]
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    args.resamples = 200 if args.quick else 1000
    return args


def main() -> None:
    args = parse()
    seeds = SEEDS[:1] if args.quick else SEEDS
    folders = folders_of(args)
    found = Traces(folders, quick=args.quick, only=args.only)
    names = [name for name in args.models.split(",") if name]
    names = names or [name for name in registry.MODELS if name not in SKIPPED]
    names = names if args.candidate in names else [*names, args.candidate]
    registry.make_models(names, 0)  # a wrong name is said before the work
    measured: list[Measured] = []
    runs = Runs()
    at_most = 2 if args.quick else PAPER_SERIES
    if "decisions" in args.parts:
        measured += decide(names, args, found, runs, seeds)
    if "counts" in args.parts:
        measured += count(args, found, runs, seeds[0])
    if "paper" in args.parts:
        measured += paper.beside(args.candidate, found, runs, seeds, at_most, args.resamples)
    if "seasons" in args.parts:
        measured += paper.decompositions(found, at_most, args.resamples)
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
