"""Does a day of ten thousand models on a thousand nodes fit into ten minutes of this machine?

The real controller under FlashServe's policy, with a forecast of every model each simulated minute
(made in a process beside), modelled nodes of 8 H100, models of 14 GB. Models are Azure functions,
drawn in proportion to how many functions each series stands for; busy ones are thinned until five
million requests are left (sim/workload.py says how). Nothing is kept but what the figures need.

simulated_minutes: wall minutes from the drawing of the workload to the results, with the forecasts
and the fitting; the trace is read before. handle_p99_ms: of every call of Controller.handle in that
run, which no other part is in. event_cost_growth: wall time per event of that run, over that of a
hundredth of it (10 nodes, as many models and requests for each) in the same process, which runs
first and last; the cheaper of these counts. peak_memory: largest resident size of this process and
of the one beside, together.
"""

from __future__ import annotations

import argparse
import array
import dataclasses
import pathlib
import resource
import sys
import time
from collections.abc import Iterable
from typing import Any

import numpy as np

import common
from flashserve.config import PolicySettings
from flashserve.control.controller import Controller
from flashserve.forecast import backtest, registry, synthetic
from flashserve.forecast.core import ArrivalModel
from flashserve.forecast.traces import DAY, Trace, read_trace
from flashserve.messages.commands import Command
from flashserve.messages.events import Event
from flashserve.policy.cost import Prices
from flashserve.policy.registry import make_policy
from flashserve.sim.forecasts import forecasts_apart
from flashserve.sim.profiles import H100_NODE
from flashserve.sim.results import Results
from flashserve.sim.run import Cluster, simulate
from flashserve.sim.scenario import FORECASTER
from flashserve.sim.workload import Workload, WorkloadSettings, make_workload
from forecast_traces import folders_of

SEED = 20261128
FILE = "azure2019_functions_1day.parquet"
MODELS_PER_NODE = 10


@dataclasses.dataclass(frozen=True, slots=True)
class Size:
    num_nodes: int
    requests_per_model: int

    @property
    def num_models(self) -> int:
        return self.num_nodes * MODELS_PER_NODE


FULL, FULL_SMALL = Size(1000, 500), Size(10, 500)
QUICK, QUICK_SMALL = Size(100, 50), Size(10, 50)


class Watched(Controller):
    """Takes the time of each call."""

    def __init__(self) -> None:
        policy = make_policy("flashserve", Prices())
        super().__init__(PolicySettings(), H100_NODE.rates, policy, Prices())
        self.seconds = array.array("f")

    def handle(self, event: Event, now: float) -> list[Command]:
        began = time.perf_counter()
        commands = super().handle(event, now)
        self.seconds.append(time.perf_counter() - began)
        return commands


def run(trace: Trace, size: Size, model: ArrivalModel, name: str) -> dict[str, Any]:
    """One day; what it took."""
    began = time.perf_counter()
    settings = WorkloadSettings(
        num_models=size.num_models,
        num_requests=size.num_models * size.requests_per_model,
        seed=SEED,
    )
    workload = make_workload(trace, settings)
    controller = Watched()
    results = _simulated(controller, workload, size, forecasts_apart(model, workload))
    wall_s = time.perf_counter() - began
    handled = np.frombuffer(controller.seconds, np.float32)
    own, beside = (
        resource.getrusage(who).ru_maxrss / 2**20
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    answered = ~np.isnan(results.requests.ttft_s)
    return {
        "run": name,
        "nodes": size.num_nodes,
        "models": size.num_models,
        "requests": workload.num_requests,
        "answered": int(answered.sum()),
        "events": len(handled),
        "wall_s": wall_s,
        "us_per_event": results.wall_s / len(handled) * 1e6,
        "handle_us_mean": float(handled.mean()) * 1e6,
        "handle_ms_p99": float(np.quantile(handled, 0.99)) * 1e3,
        "handle_ms_max": float(handled.max()) * 1e3,
        "peak_gib": own + beside,
    }


def _simulated(
    controller: Watched, workload: Workload, size: Size, forecasts: Iterable[tuple[float, Event]]
) -> Results:
    shown = -1

    def tell(done: float, total: float) -> None:
        nonlocal shown
        if (tenth := int(10 * done / total)) > shown:
            shown = tenth
            print(f"{size.num_nodes} nodes: {done / 3600:.1f} h", file=sys.stderr, flush=True)

    return simulate(
        controller,
        workload,
        Cluster(H100_NODE, size.num_nodes),
        policy="flashserve",
        forecasts=forecasts,
        keep_decisions=0,
        keep_phases=False,
        progress=tell,
    )


def load(folder: pathlib.Path | None) -> Trace:
    if folder is None:
        return synthetic.functions(2000, DAY, SEED).trace
    return read_trace(folder / FILE, SEED)


def fitted(trace: Trace) -> ArrivalModel:
    """On series below one arrival a minute: those above are warm whatever is said."""
    [model] = registry.make_models([FORECASTER], SEED)
    below = backtest.below(trace, 1.0)
    model.fit(below.history, below.weights)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="100 nodes, 1,000 models, few requests"
    )
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    for option in ("--traces", "--fit-traces", "--test-traces"):
        parser.add_argument(option, metavar="DIR", type=pathlib.Path)
    args = parser.parse_args()
    folders = folders_of(args)
    trace = load(folders.future)
    past = trace if folders.past == folders.future else load(folders.past)
    large, small = (QUICK, QUICK_SMALL) if args.quick else (FULL, FULL_SMALL)
    began = time.perf_counter()
    model = fitted(past)
    fit_s = time.perf_counter() - began
    rows = [run(trace, small, model, "small, first")]
    rows.append(run(trace, large, model, "large"))
    rows.append(run(trace, small, model, "small, last"))
    found = rows[1]
    least = min(rows[0]["us_per_event"], rows[2]["us_per_event"])
    value = common.value
    common.write_report(
        "scale",
        seed=SEED,
        rows=rows,
        ratios={},
        values={
            "simulated_minutes": value(
                (found["wall_s"] + fit_s) / 60, "min", better="lower", aim=10.0
            ),
            "handle_p99_ms": value(found["handle_ms_p99"], "ms", better="lower", aim=1.0),
            "event_cost_growth": value(
                found["us_per_event"] / least, "ratio", better="lower", aim=2.0
            ),
            "peak_memory": value(found["peak_gib"], "GiB", better="lower", aim=8e9 / 2**30),
        },
        notes=(__doc__ or "")
        + ("\nNO TRACES WERE GIVEN: synthetic series.\n" if folders.future is None else "")
        + ("\nQUICK: 100 nodes, 1,000 models, 50 requests each.\n" if args.quick else ""),
        json_file=args.json,
    )


if __name__ == "__main__":
    main()
