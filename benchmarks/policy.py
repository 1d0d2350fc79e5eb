"""Does the predictive policy pay, against what platforms do and against knowing the future?

Azure functions as models of 7 billion parameters (14 GB, in a directory of every node), drawn in
proportion to how many functions each series stands for; token lengths are those of Azure's LLM
traces. Each run is a whole day from cold. The forecaster is fitted on one half of the functions and
on two thirds of the day; the models that are reported are functions of the other half. With
--fit-traces and --test-traces: fitted on one folder's functions, reported on the other's.

Cases: `node` (one simulated node of 8 H100, whose DRAM holds all models) and `cluster` (64 of
them); `scarce` (one node whose DRAM holds 100 of its 280 models, and whose disk is as fast as a
PCIe 4.0 drive; the first hour, in which everything is read for the first time, is not reported);
`busy` (an hour of 24-fold traffic on one node: models compete for workers all the time); `adapters`
(an hour of 24-fold traffic of 60 models on four nodes, where the busiest have up to four replicas;
200 adapters per model, of which an engine's memory holds 64).

idle_saving_vs_keepalive: GPU-seconds held without a request (idle or loading), to those of the best
fixed keep-alive with equal or fewer cold starts and a TTFT p95 that is at most 5 % longer. Keep-
alives are those of KEEP_ALIVES and any mixture of two of them, on the reported day, which favours
them. The policy's price of waiting (a factor on the default) is what saved most on the fit half.
ttft_under_1s: of all requests. cost_over_oracle: workers, DRAM and disk, over the policy that knows
every arrival. Savings and costs are the worse of node and cluster, ttft_under_1s the worst of these
and scarce.

p99_ttft_vs_serverlessllm: of `scarce`, whose machine, models and load were fixed on the fit half,
at equal cost. ServerlessLLM's is that of whichever of SCARCE_SERVERLESSLLM has the best p99,
cheaper or dearer, among those that give up no larger share of the requests than ours; longer
keep-alives hold workers that others wait for. Ours is told that a worker costs as much as the least
of SCARCE_WORKER_PRICES (factors) with which, on the fit half, it costs no more than that, or 5 %
more, or the largest if there is none; costs are reckoned with the true price. The interval named
cost_vs_serverlessllm says what it costs against it where it is reported. ttft_under_1s is that of
the policy as configured. The rows have costs, shares given up, and shares whose start had to read
from disk; the intervals have the ratio of node and cluster too, where all models are in DRAM.

Ablations repeat a run with one part taken away: without forecast (keep-alives decide, DRAM keeps
what was used last), without tiers (every start comes from disk), in `busy` without admission
grouping (no patience before a slot changes hands), and in `adapters` without adapter affinity (the
controller is not told which adapter a request asks for; adapter_copies counts those that an engine
did not hold).

Values are the unfavourable bounds of bootstrap 95 % intervals over the models of all seeds. No time
of this machine is in them. `--live` is a measure of its own: see policylive.py.
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
from forecast_traces import folders_of
from policyruns import (
    SMALL_NODE,
    Case,
    Outcome,
    Sources,
    Task,
    interval,
    pooled,
    run,
    run_with_copies,
)

NODE = Case("node", 1, 32, 9_600)
CLUSTER = Case("cluster", 64, 40, 6_000)
SCARCE = Case("scarce", 1, 280, 100_000, profile=SMALL_NODE, warm_up_s=3600.0)
BUSY = Case("busy", 1, 32, 30_000, adapters_per_model=100, compression=24.0, max_replicas=2)
ADAPTERS = Case(
    "adapters", 4, 60, 300_000, adapters_per_model=200, compression=24.0, max_replicas=4
)
SEEDS = {"node": (0, 1, 2, 3), "cluster": (0, 1), "scarce": (0, 1), "busy": (0, 1)}
KEEP_ALIVES = (1, 10, 30, 60, 120, 300, 600, 1800, 7200)
SERVERLESSLLM = (1, 10)
SCARCE_SERVERLESSLLM = (1, 3, 10)
FACTORS = (0.3, 1.0, 3.0, 10.0, 30.0)
SCARCE_WORKER_PRICES = (1.0, 3.0, 10.0, 30.0)
"""Factors: the dearer a worker, the fewer idle; what DRAM is worth stays as it is."""
OTHERS = ("histogram", "reactive", "oracle")
OURS = "flashserve"
FORECASTER = "auto"
"""As on a server; on the fit half it is idle less than `hazard`, at equal shares of cold starts."""
ABLATIONS = ("forecast", "tiers")
"""Of node and cluster."""
AIMS = {
    "idle_saving_vs_keepalive": ("fraction", "higher", 0.50),
    "idle_saving_at_equal_cold": ("fraction", "higher", 0.50),
    "ttft_under_1s": ("fraction", "higher", 0.99),
    "cost_over_oracle": ("ratio", "lower", None),
}
_TOLERANCE = 1.05

Ran = Mapping[Task, Outcome]


def run_all(sources: Sources, tasks: Iterable[Task], processes: int) -> dict[Task, Outcome]:
    """Those of one case and seed lie together, so that processes share the making."""
    ordered = sorted(
        set(tasks), key=lambda task: (-task.case.num_nodes, task.case.name, task.seed, task.on_fit)
    )
    ran = {}
    with concurrent.futures.ProcessPoolExecutor(processes) as pool:
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

    def of(
        self, policy: str, price: float = 1.0, ablation: str = "", worker_price: float = 1.0
    ) -> Outcome:
        tasks = [
            Task(self._case, seed, policy, price, ablation, self._on_fit, worker_price)
            for seed in self._seeds
        ]
        return pooled([self._ran[task] for task in tasks])

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
        """ServerlessLLM's p99 over ours, with the keep-alive that has the best, whatever it costs.

        Of those that give up no larger share of the requests; without any, of all.
        """
        best = self.best_serverless(ours, weights)
        return best.percentile(99, weights) / ours.percentile(99, weights)

    def best_serverless(self, ours: Outcome, weights: Floats) -> Outcome:
        given_up = _given_up(ours)
        found = [each for each in self.serverless if _given_up(each) <= given_up]
        return min(found or self.serverless, key=lambda each: each.percentile(99, weights))

    def cost_ratio(self, ours: Outcome, weights: Floats) -> float:
        """Ours over what the policy of `p99_ratio` costs."""
        best = self.best_serverless(ours, weights)
        return float(ours.cost @ weights) / max(float(best.cost @ weights), 1e-9)


def _given_up(outcome: Outcome) -> float:
    return outcome.share("rejected", np.ones(len(outcome.requests)))


def _idle_at(measure: Floats, idle: Floats, at: float) -> float:
    """Idle seconds of keep-alives whose measure is `at`; the least that any needs who is better."""
    return decisions.idle_at(measure, idle, max(at, float(measure.min())))


def tasks_on_fit(case: Case) -> list[Task]:
    names = [f"keep-alive-{s}s" for s in KEEP_ALIVES]
    return [
        *(Task(case, 0, name, on_fit=True) for name in names),
        *(Task(case, 0, OURS, factor, on_fit=True) for factor in FACTORS),
    ]


def chosen_factor(compared: Compared) -> float:
    """With which most is saved on the fit half, among those that are quick there."""
    found = {factor: compared.of(OURS, factor) for factor in FACTORS}
    ones = np.ones(len(found[1.0].requests))
    quick = [f for f in FACTORS if found[f].share_under_1s(ones) >= 0.99] or list(FACTORS)
    return max(quick, key=lambda factor: compared.saving(found[factor], ones))


def tasks_of(case: Case, seeds: Sequence[int], factor: float) -> list[Task]:
    names = [f"keep-alive-{s}s" for s in KEEP_ALIVES]
    names += [f"serverlessllm-{s}s" for s in SERVERLESSLLM]
    found = []
    for seed in seeds:
        found += [Task(case, seed, name) for name in (*names, *OTHERS)]
        found += [Task(case, seed, OURS, f) for f in {factor, 1.0}]
        found += [Task(case, seed, OURS, factor, part) for part in ABLATIONS]
    return found


def tasks_of_scarce(seeds: Sequence[int], *, on_fit: bool = False) -> list[Task]:
    found = []
    for seed in seeds:
        names = [f"serverlessllm-{s}s" for s in SCARCE_SERVERLESSLLM]
        found += [Task(SCARCE, seed, name, on_fit=on_fit) for name in names]
        found += [
            Task(SCARCE, seed, OURS, on_fit=on_fit, worker_price=factor)
            for factor in SCARCE_WORKER_PRICES
        ]
        if not on_fit:
            found.append(Task(SCARCE, seed, OURS, 1.0, "forecast"))
    return found


def worker_price_at_equal_cost(compared: Compared) -> float:
    """The least with which ours costs at most what ServerlessLLM's best p99 does, or 5 % more."""
    found = {factor: compared.of(OURS, worker_price=factor) for factor in SCARCE_WORKER_PRICES}
    ones = np.ones(len(found[1.0].requests))
    affordable = [f for f in found if compared.cost_ratio(found[f], ones) <= _TOLERANCE]
    return min(affordable, default=max(SCARCE_WORKER_PRICES))


def tasks_of_busy(seeds: Sequence[int]) -> list[Task]:
    return [Task(BUSY, seed, OURS, 1.0, part) for seed in seeds for part in ("", "grouping")]


@dataclasses.dataclass(frozen=True, slots=True)
class Judged:
    """Intervals of one case: by name, the figure with its bounds."""

    rows: list[dict[str, Any]]
    intervals: dict[str, tuple[float, ...]]


def judge(compared: Compared, case: Case, factor: float, resamples: int) -> Judged:
    saving, oracle = compared.of(OURS, factor), compared.of("oracle")
    num = len(saving.requests)

    def bounds(figure: Callable[[Floats], float]) -> tuple[float, ...]:
        return interval(figure, num, resamples)

    intervals = {
        "idle_saving_vs_keepalive": bounds(lambda w: compared.saving(saving, w)),
        "idle_saving_at_equal_cold": bounds(lambda w: compared.saving(saving, w, at_p95=False)),
        "ttft_under_1s": bounds(saving.share_under_1s),
        "p99_ttft_vs_serverlessllm": bounds(lambda w: compared.p99_ratio(saving, w)),
        "cost_over_oracle": bounds(
            lambda w: float(saving.cost @ w) / max(float(oracle.cost @ w), 1e-9)
        ),
    }
    return Judged(list(_rows(compared, case, factor)), intervals)


def _rows(compared: Compared, case: Case, factor: float) -> Iterable[dict[str, Any]]:
    shown = {name: compared.of(name) for name in OTHERS}
    for seconds in KEEP_ALIVES[1::2]:
        shown[f"keep-alive-{seconds}s"] = compared.of(f"keep-alive-{seconds}s")
    for seconds in SERVERLESSLLM:
        shown[f"serverlessllm-{seconds}s"] = compared.of(f"serverlessllm-{seconds}s")
    shown["flashserve as configured"] = compared.of(OURS)
    shown[f"flashserve (x{factor:g})"] = compared.of(OURS, factor)
    for part in ABLATIONS:
        shown[f"flashserve without {part}"] = compared.of(OURS, factor, part)
    for name, outcome in shown.items():
        yield row(case.name, name, outcome, compared)


def judge_scarce(compared: Compared, worker_price: float, resamples: int) -> Judged:
    """Only against ServerlessLLM: what is read from disk is what differs here."""
    ours, configured = compared.of(OURS, worker_price=worker_price), compared.of(OURS)
    num = len(ours.requests)
    shown = {
        f"serverlessllm-{s}s": compared.of(f"serverlessllm-{s}s") for s in SCARCE_SERVERLESSLLM
    }
    for factor in SCARCE_WORKER_PRICES:
        shown[f"flashserve (worker x{factor:g})"] = compared.of(OURS, worker_price=factor)
    shown["flashserve without forecast"] = compared.of(OURS, 1.0, "forecast")
    rows = [row(SCARCE.name, name, outcome, None) for name, outcome in shown.items()]
    return Judged(
        rows,
        {
            "p99_ttft_vs_serverlessllm": interval(
                lambda w: compared.p99_ratio(ours, w), num, resamples
            ),
            "cost_vs_serverlessllm": interval(
                lambda w: compared.cost_ratio(ours, w), num, resamples
            ),
            "ttft_under_1s": interval(configured.share_under_1s, num, resamples),
        },
    )


def rows_of_busy(compared: Compared) -> list[dict[str, Any]]:
    shown = {
        "flashserve": compared.of(OURS),
        "flashserve without grouping": compared.of(OURS, 1.0, "grouping"),
    }
    return [row(BUSY.name, name, outcome, None) for name, outcome in shown.items()]


def rows_of_adapters(sources: Sources) -> Iterable[dict[str, Any]]:
    for part, name in (("", "flashserve"), ("affinity", "flashserve without affinity")):
        outcome, copies = run_with_copies(sources, Task(ADAPTERS, 0, OURS, 1.0, part))
        yield {**row(ADAPTERS.name, name, outcome, None), "adapter_copies": copies}


def row(case: str, name: str, outcome: Outcome, compared: Compared | None) -> dict[str, Any]:
    ones = np.ones(len(outcome.requests))
    return {
        "case": case,
        "policy": name,
        "requests": int(outcome.requests.sum()),
        "cold_share": outcome.cold_share(ones),
        "missed_dram": outcome.share("missed", ones),
        "given_up": outcome.share("rejected", ones),
        **{f"ttft_p{p}_s": outcome.percentile(p, ones) for p in (50, 95, 99)},
        "under_1s": outcome.share_under_1s(ones),
        "busy_h": float(outcome.busy_s.sum()) / 3600,
        "idle_h": float(outcome.idle_s.sum()) / 3600,
        "cost": float(outcome.cost.sum()),
        "saving": compared.saving(outcome, ones) if compared else None,
        "adapter_copies": None,
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
    parser.add_argument("--quick", action="store_true", help="one seed")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    parser.add_argument("--live", action="store_true", help="compare with the real server instead")
    parser.add_argument("--forecaster", default=FORECASTER, help="any that backtest knows")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), metavar="N")
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
    cases = (NODE, CLUSTER)
    on_fit = [t for case in cases for t in tasks_on_fit(case)]
    on_fit += tasks_of_scarce((0,), on_fit=True)
    ran = run_all(sources, on_fit, args.processes)
    factors = {case: chosen_factor(Compared(ran, case, (0,), on_fit=True)) for case in cases}
    worker_price = worker_price_at_equal_cost(Compared(ran, SCARCE, (0,), on_fit=True))
    tasks = [t for case in cases for t in tasks_of(case, seeds[case.name], factors[case])]
    tasks += tasks_of_scarce(seeds["scarce"]) + tasks_of_busy(seeds["busy"])
    ran = run_all(sources, tasks, args.processes)
    resamples = 200 if args.quick else 1000
    judged = {
        case.name: judge(Compared(ran, case, seeds[case.name]), case, factors[case], resamples)
        for case in cases
    }
    judged["scarce"] = judge_scarce(Compared(ran, SCARCE, seeds["scarce"]), worker_price, resamples)
    rows = [each for case in judged.values() for each in case.rows]
    rows += rows_of_busy(Compared(ran, BUSY, seeds["busy"]))
    rows += rows_of_adapters(sources)
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
            "p99_ttft_vs_serverlessllm": judged["scarce"].intervals["p99_ttft_vs_serverlessllm"][1]
        },
        values=values_of(judged),
        aims={"p99_ttft_vs_serverlessllm": 3.3},
        notes=(__doc__ or "")
        + f"\nOf equal cost in scarce, by the fit half: worker x{worker_price:g}.\n"
        + ("\nNO TRACES WERE GIVEN: synthetic series.\n" if stands_in else ""),
        json_file=args.json,
    )


if __name__ == "__main__":
    main()
