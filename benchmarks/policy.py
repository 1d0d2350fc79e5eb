"""Does the predictive policy pay, against what platforms do and against knowing the future?

Azure functions as models of 7 billion parameters (14 GB, in a directory of every node), drawn in
proportion to how many functions each series stands for, on one simulated node of 8 H100 (`node`)
and on 64 of them (`cluster`); token lengths are those of Azure's LLM traces. Each run is a whole
day from cold. The forecaster is fitted on one half of the functions and on two thirds of the day;
the models that are reported are functions of the other half. With --fit-traces and --test-traces:
fitted on one folder's functions, reported on the other's.

idle_saving_vs_keepalive: GPU-seconds held without a request (idle or loading), to those of the best
fixed keep-alive with equal or fewer cold starts and a TTFT p95 that is at most 5 % longer. Keep-
alives are those of KEEP_ALIVES and any mixture of two of them, on the reported day, which favours
them. Two settings of the policy are measured, whose price of waiting (as a factor on the default)
was chosen on the fit half alone: `saving` saves most against keep-alives there, `tail` has the best
p99 against ServerlessLLM's. p99_ttft_vs_serverlessllm: at equal cost means against the cheapest of
ServerlessLLM's keep-alives that costs at least as much as `tail` does (the dearest, if none does).
Its value is that of `crowded`, 100 models on one node of 8, where requests wait for workers; the
rows have it for the others too, where nobody waits and only the tier of a start differs. A request
that was given up counts as 10,000 s.
ttft_under_1s: of all requests, under `saving`. cost_over_oracle: workers, DRAM and disk, `saving`
over the policy that knows every arrival. Ablations repeat `saving` with one part taken away:
without forecast (keep-alives decide), without tiers (every start comes from disk), without adapter
affinity (the controller is not told of adapters; 8 for each model in both runs), without admission
grouping (no patience before a slot changes hands).

Values are the unfavourable bounds of bootstrap 95 % intervals over the models of all seeds, the
worse of node and cluster. No time of this machine is in them. `--live` is a measure of its own:
see policylive.py.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

import common
from flashserve.forecast import decisions
from flashserve.forecast.core import Floats
from flashserve.sim.scenario import FORECASTER
from forecast_traces import folders_of
from policyruns import Case, Outcome, Sources, Task, interval, pooled, run

NODE = Case("node", 1, 32, 9_600)
CLUSTER = Case("cluster", 64, 160, 40_000)
CROWDED = Case("crowded", 1, 100, 60_000)
QUICK_CROWDED = Case("crowded", 1, 60, 20_000)
ADAPTED = Case("adapters", 1, 16, 4_800, adapters_per_model=8)
QUICK_CLUSTER = Case("cluster", 64, 40, 6_000)
SEEDS = {
    "node": tuple(range(4)),
    "adapters": tuple(range(4)),
    "cluster": (0, 1),
    "crowded": (0, 1),
}
KEEP_ALIVES = (1, 10, 30, 60, 120, 180, 300, 450, 600, 900, 1200, 1800, 3600, 7200)
QUICK_KEEP_ALIVES = KEEP_ALIVES[1::2]
SERVERLESSLLM = (1, 10, 30, 60, 180, 600)
FACTORS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
OTHERS = ("always-on", "histogram", "reactive", "oracle")
OURS = "flashserve"
ABLATIONS = ("forecast", "tiers", "grouping", "affinity")
AIMS = {
    "idle_saving_vs_keepalive": ("fraction", "higher", 0.50),
    "idle_saving_at_equal_cold": ("fraction", "higher", 0.50),
    "ttft_under_1s": ("fraction", "higher", 0.99),
    "cost_over_oracle": ("ratio", "lower", None),
}
_TOLERANCE = 1.05

Ran = Mapping[Task, Outcome]


def run_all(sources: Sources, tasks: Iterable[Task]) -> dict[Task, Outcome]:
    """On all cores; those of one case and seed lie together, so that processes share the making."""
    ordered = sorted(set(tasks), key=lambda task: (-task.case.num_nodes, task.seed, task.on_fit))
    cores = len(os.sched_getaffinity(0))
    ran = {}
    with concurrent.futures.ProcessPoolExecutor(cores) as pool:
        futures = {pool.submit(run, sources, task): task for task in ordered}
        for number, future in enumerate(concurrent.futures.as_completed(futures), start=1):
            ran[futures[future]] = future.result()
            if number % 10 == 0:
                print(f"{number} of {len(ordered)} runs", file=sys.stderr, flush=True)
    return ran


class Compared:
    """All runs of one case, pooled over seeds."""

    def __init__(self, ran: Ran, case: Case, seeds: Sequence[int], *, on_fit: bool = False) -> None:
        self._ran, self._case, self._seeds, self._on_fit = ran, case, seeds, on_fit
        self.keep_alives = self._family("keep-alive-")
        self.serverless = self._family("serverlessllm-")

    def of(self, policy: str, price: float = 1.0, ablation: str = "") -> Outcome:
        return pooled(
            [
                self._ran[Task(self._case, seed, policy, price, ablation, self._on_fit)]
                for seed in self._seeds
            ]
        )

    def _family(self, prefix: str) -> list[Outcome]:
        names = {task.policy for task in self._ran if task.policy.startswith(prefix)}
        found = [name for name in names if self._task(name) in self._ran]
        return [
            self.of(name) for name in sorted(found, key=lambda name: int(name[len(prefix) : -1]))
        ]

    def _task(self, policy: str) -> Task:
        return Task(self._case, self._seeds[0], policy, on_fit=self._on_fit)

    def saving(self, ours: Outcome, weights: Floats, *, at_p95: bool = True) -> float:
        """Of idle seconds, against the best keep-alives that are as good."""
        idle = np.array([float(each.idle_s @ weights) for each in self.keep_alives])
        cold = np.array([each.cold_share(weights) for each in self.keep_alives])
        best = _idle_at(cold, idle, ours.cold_share(weights))
        if at_p95:
            p95 = np.array([each.percentile(95, weights) for each in self.keep_alives])
            best = max(best, _idle_at(p95, idle, ours.percentile(95, weights) * _TOLERANCE))
        return 1 - float(ours.idle_s @ weights) / best if best else 0.0

    def p99_ratio(self, ours: Outcome, weights: Floats) -> float:
        """ServerlessLLM's p99 over ours, at a setting that costs at least as much."""
        cost = float(ours.cost @ weights)
        by_cost = sorted(
            (float(each.cost @ weights), number) for number, each in enumerate(self.serverless)
        )
        number = next((number for theirs, number in by_cost if theirs >= cost), by_cost[-1][1])
        theirs = self.serverless[number]
        return theirs.percentile(99, weights) / ours.percentile(99, weights)


def _idle_at(measure: Floats, idle: Floats, at: float) -> float:
    """Idle seconds of keep-alives whose measure is `at`; the least that any needs who is better."""
    return decisions.idle_at(measure, idle, max(at, float(measure.min())))


def tasks_on_fit(case: Case, keep_alives: Sequence[int]) -> list[Task]:
    names = [f"keep-alive-{s}s" for s in keep_alives] + [
        f"serverlessllm-{s}s" for s in SERVERLESSLLM
    ]
    return [
        *(Task(case, 0, name, on_fit=True) for name in names),
        *(Task(case, 0, OURS, factor, on_fit=True) for factor in FACTORS),
    ]


def chosen_factors(compared: Compared) -> tuple[float, float]:
    """Of `saving` and `tail`, on the fit half."""
    found = {factor: compared.of(OURS, factor) for factor in FACTORS}
    ones = np.ones(len(found[1.0].requests))
    quick = [f for f in FACTORS if found[f].share_under_1s(ones) >= 0.99] or list(FACTORS)
    return (
        max(quick, key=lambda factor: compared.saving(found[factor], ones)),
        best_tail(compared),
    )


def best_tail(compared: Compared) -> float:
    """The factor with the best p99 against ServerlessLLM's; the smallest among equals."""
    found = {factor: compared.of(OURS, factor) for factor in FACTORS}
    ones = np.ones(len(found[1.0].requests))
    return max(FACTORS, key=lambda factor: (compared.p99_ratio(found[factor], ones), -factor))


def tasks_of(
    case: Case, seeds: Sequence[int], keep_alives: Sequence[int], factors: tuple[float, float]
) -> list[Task]:
    names = [f"keep-alive-{s}s" for s in keep_alives] + [
        f"serverlessllm-{s}s" for s in SERVERLESSLLM
    ]
    found = []
    for seed in seeds:
        found += [Task(case, seed, name) for name in (*names, *OTHERS)]
        found += [Task(case, seed, OURS, factor) for factor in {*factors, 1.0}]
        if case.adapters_per_model == 0:
            found += [Task(case, seed, OURS, factors[0], part) for part in ABLATIONS[:-1]]
    return found


def tasks_of_crowded(case: Case, seeds: Sequence[int], factor: float) -> list[Task]:
    found = []
    for seed in seeds:
        found += [Task(case, seed, f"serverlessllm-{s}s") for s in SERVERLESSLLM]
        found += [Task(case, seed, OURS, factor, part) for part in ("", "forecast", "grouping")]
    return found


def judge_crowded(compared: Compared, case: Case, factor: float, resamples: int) -> Judged:
    """Only against ServerlessLLM: what waits for a worker is what differs here."""
    tail = compared.of(OURS, factor)
    bounds = interval(lambda w: compared.p99_ratio(tail, w), len(tail.requests), resamples)
    under = interval(tail.share_under_1s, len(tail.requests), resamples)
    shown = {
        f"serverlessllm-{s}s": each
        for s, each in zip(SERVERLESSLLM, compared.serverless, strict=True)
    }
    shown[f"flashserve tail (x{factor:g})"] = tail
    for part in ("forecast", "grouping"):
        shown[f"tail without {part}"] = compared.of(OURS, factor, part)
    rows = [row(case.name, name, outcome, None) for name, outcome in shown.items()]
    return Judged(rows, {"p99_ttft_vs_serverlessllm": bounds, "ttft_under_1s": under})


def tasks_of_adapters(seeds: Sequence[int], factor: float) -> list[Task]:
    return [Task(ADAPTED, seed, OURS, factor, part) for seed in seeds for part in ("", "affinity")]


@dataclasses.dataclass(frozen=True, slots=True)
class Judged:
    """Intervals of one case: by name, the figure with its bounds."""

    rows: list[dict[str, Any]]
    intervals: dict[str, tuple[float, ...]]


def judge(compared: Compared, case: Case, factors: tuple[float, float], resamples: int) -> Judged:
    saving, tail = compared.of(OURS, factors[0]), compared.of(OURS, factors[1])
    oracle = compared.of("oracle")
    num = len(saving.requests)

    def bounds(figure: Callable[[Floats], float]) -> tuple[float, ...]:
        return interval(figure, num, resamples)

    intervals = {
        "idle_saving_vs_keepalive": bounds(lambda w: compared.saving(saving, w)),
        "idle_saving_at_equal_cold": bounds(lambda w: compared.saving(saving, w, at_p95=False)),
        "ttft_under_1s": bounds(saving.share_under_1s),
        "p99_ttft_vs_serverlessllm": bounds(lambda w: compared.p99_ratio(tail, w)),
        "cost_over_oracle": bounds(
            lambda w: float(saving.cost @ w) / max(float(oracle.cost @ w), 1e-9)
        ),
    }
    return Judged(list(_rows(compared, case, factors)), intervals)


def _rows(compared: Compared, case: Case, factors: tuple[float, float]) -> Iterable[dict[str, Any]]:
    shown = {name: compared.of(name) for name in OTHERS}
    for name in ("keep-alive-60s", "keep-alive-300s", "keep-alive-600s", "keep-alive-3600s"):
        try:
            shown[name] = compared.of(name)
        except KeyError:
            continue
    for seconds in SERVERLESSLLM[1::2]:
        shown[f"serverlessllm-{seconds}s"] = compared.of(f"serverlessllm-{seconds}s")
    shown["flashserve as configured"] = compared.of(OURS)
    shown[f"flashserve saving (x{factors[0]:g})"] = compared.of(OURS, factors[0])
    shown[f"flashserve tail (x{factors[1]:g})"] = compared.of(OURS, factors[1])
    for part in ABLATIONS[:-1]:
        shown[f"saving without {part}"] = compared.of(OURS, factors[0], part)
    for name, outcome in shown.items():
        yield row(case.name, name, outcome, compared)


def row(case: str, name: str, outcome: Outcome, compared: Compared | None) -> dict[str, Any]:
    ones = np.ones(len(outcome.requests))
    return {
        "case": case,
        "policy": name,
        "requests": int(outcome.requests.sum()),
        "cold_share": outcome.cold_share(ones),
        **{f"ttft_p{p}_s": outcome.percentile(p, ones) for p in (50, 95, 99)},
        "under_1s": outcome.share_under_1s(ones),
        "busy_h": float(outcome.busy_s.sum()) / 3600,
        "idle_h": float(outcome.idle_s.sum()) / 3600,
        "cost": float(outcome.cost.sum()),
        "saving": compared.saving(outcome, ones) if compared else None,
    }


def values_of(judged: Mapping[str, Judged]) -> dict[str, dict[str, Any]]:
    """The unfavourable bounds, of the worse case."""
    values = {}
    for key, (unit, better, aim) in AIMS.items():
        bounds = [each.intervals[key] for each in judged.values() if key in each.intervals]
        number = max(b[2] for b in bounds) if better == "lower" else min(b[1] for b in bounds)
        values[key] = common.value(number, unit, better=better, aim=aim)
    return values


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one seed, fewer models and settings")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    parser.add_argument("--live", action="store_true", help="compare with the real server instead")
    parser.add_argument("--forecaster", default=FORECASTER)
    for option in ("--traces", "--fit-traces", "--test-traces"):
        parser.add_argument(option, metavar="DIR", type=pathlib.Path)
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.live:
        import policylive

        policylive.main(args)
        return
    folders = folders_of(args)
    sources = Sources(folders.past, folders.future, args.forecaster)
    seeds = {name: numbers[: 1 if args.quick else None] for name, numbers in SEEDS.items()}
    keep_alives = QUICK_KEEP_ALIVES if args.quick else KEEP_ALIVES
    cases = (NODE, QUICK_CLUSTER if args.quick else CLUSTER)
    ran = run_all(sources, [t for case in cases for t in tasks_on_fit(case, QUICK_KEEP_ALIVES)])
    factors = {case: chosen_factors(Compared(ran, case, (0,), on_fit=True)) for case in cases}
    crowded = QUICK_CROWDED if args.quick else CROWDED
    fitted = Compared(run_all(sources, tasks_on_fit(crowded, ())), crowded, (0,), on_fit=True)
    crowded_factor = best_tail(fitted)
    tasks = [
        t for case in cases for t in tasks_of(case, seeds[case.name], keep_alives, factors[case])
    ]
    tasks += tasks_of_crowded(crowded, seeds["crowded"], crowded_factor)
    ran = run_all(sources, [*tasks, *tasks_of_adapters(seeds["adapters"], factors[NODE][0])])
    resamples = 200 if args.quick else 1000
    judged = {
        case.name: judge(Compared(ran, case, seeds[case.name]), case, factors[case], resamples)
        for case in cases
    }
    judged[crowded.name] = judge_crowded(
        Compared(ran, crowded, seeds["crowded"]), crowded, crowded_factor, resamples
    )
    rows = [each for case in judged.values() for each in case.rows]
    adapted = Compared(ran, ADAPTED, seeds["adapters"])
    for part in ("", "affinity"):
        name = f"saving without {part}" if part else "saving"
        rows.append(row(ADAPTED.name, name, adapted.of(OURS, factors[NODE][0], part), None))
    rows += [
        {
            **dict.fromkeys(rows[0]),
            "case": case,
            "policy": f"{key}: {b[0]:.4g} [{b[1]:.4g}, {b[2]:.4g}]",
        }
        for case, each in judged.items()
        for key, b in each.intervals.items()
    ]
    stands_in = sources.test is None
    common.write_report(
        "policy",
        seed=0,
        rows=rows,
        ratios={
            "p99_ttft_vs_serverlessllm": judged[crowded.name].intervals[
                "p99_ttft_vs_serverlessllm"
            ][1]
        },
        values=values_of(judged),
        aims={"p99_ttft_vs_serverlessllm": 3.3},
        notes=(__doc__ or "")
        + ("\nNO TRACES WERE GIVEN: synthetic series.\n" if stands_in else ""),
        json_file=args.json,
    )


if __name__ == "__main__":
    main()
