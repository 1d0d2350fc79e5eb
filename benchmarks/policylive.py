"""Does the simulator say what the real server does? (`python benchmarks/policy.py --live`)

Twenty copies of the real small model, whose bytes differ in a bit so that they share none, under a
fixed keep-alive on a real `flashserve serve` with two workers and memory for seven of them; a day
of twenty Azure functions in five minutes, a few hundred requests of 16 to 64 tokens that want 8.
The same arrivals are then simulated, with a profile that was measured on the same server just
before and just after, of which the means count: bytes, build and wake of a start from disk and from
DRAM, stops, prefill and decode, what a load from disk takes of the cores, and how much both workers
get done at once, which share them. What HTTP and tokens on their way take beside that, measured on
a warm replica, is added to each simulated time. With --quick the day takes two minutes, and a part
of its requests.

Clock: from a request's sending to its first token over HTTP on loopback, in this process. All files
are in the page cache. A start is cold where its receipt (the simulator's record) says so. Values:
difference between the shares of cold starts; medians and p95 of the times to the first token, the
larger over the smaller; live_profile_drift, how far the two measurements of the profile are apart:
where the machine's own speed changed by more than is asked of the simulator, a run says little.
The columns after them are the means of where that time went.
"""

from __future__ import annotations

import argparse
import asyncio
import concurrent.futures
import contextlib
import dataclasses
import pathlib
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx
import msgspec
import numpy as np
import psutil

import common
import server as bench_server
from flashserve.config import PolicySettings
from flashserve.control.controller import Controller
from flashserve.forecast import synthetic
from flashserve.forecast.traces import DAY, Trace, read_trace
from flashserve.policy.baselines import FixedKeepAlive
from flashserve.sim.lengths import Lengths
from flashserve.sim.profiles import THIS, Profile, Speeds, StepCosts
from flashserve.sim.results import PHASES, Results
from flashserve.sim.run import Cluster, simulate
from flashserve.sim.workload import Workload, WorkloadSettings, make_workload
from forecast_traces import folders_of
from server import Server, completion_body, deploy, stream_completion, wait_for_state

SEED = 20261128
NUM_MODELS = 20
REQUESTS_PER_S = 260 / 300
REPLAY_S, QUICK_REPLAY_S = 300.0, 110.0
KEEP_ALIVE_S = 3.0
NUM_WORKERS = 2
DRAM_BYTES = 2 << 30
OUTPUT_TOKENS = 8
PROBED, QUICK_PROBED = 6, 3
PROMPTS = (16, 64, 256)
FILE = "azure2019_functions_1day.parquet"


@dataclasses.dataclass(frozen=True, slots=True)
class Seen:
    """One request as its client saw it. phases: of its receipt, by PHASES."""

    at: float
    ttft_s: float
    is_cold: bool
    phases: tuple[float, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Probe:
    """Medians in seconds, over HTTP: first tokens by how the model was found, and tokens after it.

    warm_s: by prompt tokens; the others are of the shortest prompt. token_s: between tokens.
    at_once: how many replicas' worth of tokens all workers make at once. load_cpu_s: of all
    processes of the node, for the bytes of one model from the page cache. stop_s: what a start
    waits for a worker whose idle model stops first.
    """

    fresh_s: float
    wake_s: float
    disk_s: float
    warm_s: dict[int, float]
    token_s: float
    at_once: float
    load_cpu_s: float
    stop_s: float


def copies(model_dir: pathlib.Path, root: pathlib.Path) -> list[pathlib.Path]:
    """Checkpoints that differ in the last weight's low bits."""
    made = []
    for number in range(NUM_MODELS):
        made.append(root / f"model-{number:02}")
        shutil.copytree(model_dir, made[-1])
        for path in made[-1].glob("*.safetensors"):
            with path.open("r+b") as file:
                file.seek(-2, 2)
                (low,) = file.read(1)
                file.seek(-2, 2)
                file.write(bytes([low ^ number]))
    return made


@contextlib.contextmanager
def running(model_dir: pathlib.Path) -> Iterator[Server]:
    with tempfile.TemporaryDirectory(prefix="fs-bench-") as temporary:
        directories = copies(model_dir, pathlib.Path(temporary))
        with bench_server.running_server(
            NODE__NUM_WORKERS=str(NUM_WORKERS),
            NODE__DRAM_BYTES=str(DRAM_BYTES),
            NODE__ADAPTER_BYTES="0",
            STORE__SCRUB_BYTES_PER_S="0",
            POLICY__NAME="keep-alive",  # as in the simulation
        ) as server:
            for number, directory in enumerate(directories):
                deploy(server, name_of(number), directory, keep_alive_s=KEEP_ALIVE_S)
            yield server


def name_of(number: int) -> str:
    return f"m{number:05d}"


def probe(server: Server, probed: int) -> Probe:
    """What starts and steps take on this server now, by starts of so many models."""
    rng = random.Random(SEED)
    fresh, wake, disk, loads = [], [], [], []
    for number in range(probed + 1):
        name = name_of(number)
        loads.append(_load_cpu_s(server, name))
        for into in (fresh, wake):
            wait_for_state(server, name, "cold", "dram")
            into.append(_ask(server, name, rng))
        wait_for_state(server, name, "cold", "dram")
        _order(server, name, "evict", "dram")
        wait_for_state(server, name, "cold", "disk")
        disk.append(_ask(server, name, rng))
    warm, tokens = {}, []
    for prompt in PROMPTS:
        times = []
        for _ in range(12):
            began = time.monotonic()
            times.append(_ask(server, name_of(probed), rng, prompt, OUTPUT_TOKENS))
            tokens.append((time.monotonic() - began - times[-1]) / (OUTPUT_TOKENS - 1))
        warm[prompt] = common.median(times[2:])
    # The first model's starts are the first of everything: not counted.
    starts = (common.median(times[1:]) for times in (fresh, wake, disk))
    at_once = _at_once(server, rng)
    stop_s = _stop_s(server, probed)
    return Probe(*starts, warm, common.median(tokens), at_once, common.median(loads[1:]), stop_s)


def emptied(server: Server) -> None:
    """Let nothing be in DRAM any more."""
    for number in range(NUM_MODELS):
        _order(server, name_of(number), "evict", "dram")
        wait_for_state(server, name_of(number), "cold", "disk")


def mean_of(before: Probe, after: Probe) -> Probe:
    warm_s = {tokens: (before.warm_s[tokens] + after.warm_s[tokens]) / 2 for tokens in PROMPTS}
    means = {
        field.name: (getattr(before, field.name) + getattr(after, field.name)) / 2
        for field in dataclasses.fields(Probe)
        if field.name != "warm_s"
    }
    return Probe(**means, warm_s=warm_s)


def drift(before: Probe, after: Probe) -> float:
    """The larger over the smaller of a first token's time: of the way that changed most."""
    pairs = zip(_first_tokens(before), _first_tokens(after), strict=True)
    return max(max(one / other, other / one) for one, other in pairs)


def _first_tokens(found: Probe) -> tuple[float, ...]:
    return found.fresh_s, found.wake_s, found.disk_s, found.warm_s[PROMPTS[0]]


def _stop_s(server: Server, probed: int) -> float:
    """Every worker has one of the first models; each start from DRAM has to stop one."""
    waited = []
    for number in [*range(NUM_WORKERS, probed + 1), *range(NUM_WORKERS)]:
        _, receipt = stream_completion(server, name_of(number), [1000] * PROMPTS[0], 2)
        assert receipt["cold"], f"{name_of(number)} had a worker already"
        waited.append(receipt["actual"]["place_s"])
    return common.median(waited)


def _load_cpu_s(server: Server, name: str) -> float:
    """Stages a model; what follows behind (digests, workers' walks over the pages) is counted."""
    node = psutil.Process(server.pid)
    processes = [node, *node.children(recursive=True)]

    def cpu_s() -> float:
        times = [process.cpu_times() for process in processes]
        return sum(each.user + each.system for each in times)

    began = cpu_s()
    _order(server, name, "stage", "dram")
    wait_for_state(server, name, "cold", "dram")
    time.sleep(0.5)
    return cpu_s() - began


def _at_once(server: Server, rng: random.Random) -> float:
    """Each worker answers one request after the other, alone and beside the others, by turns."""

    def answer(number: int) -> float:
        began = time.monotonic()
        for _ in range(3):
            _ask(server, name_of(number), rng, PROMPTS[1], OUTPUT_TOKENS)
        return time.monotonic() - began

    numbers = range(NUM_WORKERS)
    with concurrent.futures.ThreadPoolExecutor(NUM_WORKERS) as pool:
        list(pool.map(answer, numbers))  # all are ready after that
        found = []
        for _ in range(3):
            alone = [answer(number) for number in numbers]
            together = list(pool.map(answer, numbers))
            found.append(NUM_WORKERS * sum(alone) / sum(together))
    return min(max(common.median(found), 1.0), float(NUM_WORKERS))


def _order(server: Server, name: str, verb: str, tier: str) -> None:
    path = f"/admin/v1/models/{name}/{verb}"
    server.admin.post(path, json={"tier": tier}).raise_for_status()


def _ask(
    server: Server, name: str, rng: random.Random, prompt: int = PROMPTS[0], max_tokens: int = 2
) -> float:
    ids = [rng.randrange(1000, 20000) for _ in range(prompt)]
    return stream_completion(server, name, ids, max_tokens)[0]


def profile_of(found: Probe, size_bytes: int) -> tuple[Profile, float]:
    """The node as probed, and what HTTP adds to each first token."""
    low, high = PROMPTS[0], PROMPTS[-1]
    token_s = max((found.warm_s[high] - found.warm_s[low]) / (high - low), 1e-6)
    step_s = max(found.token_s - THIS.costs.decode_s, 1e-3)
    beside_s = max(found.warm_s[low] - step_s - low * token_s, 0.0)
    wake_s = max(found.wake_s - found.warm_s[low], 1e-4)
    fresh_s = max(found.fresh_s - found.warm_s[low], wake_s)
    disk_s = max(found.disk_s - found.wake_s, 1e-3)
    # Binding to bytes in shared memory moves none: all of a start from DRAM is build or wake.
    speeds = Speeds(
        disk_bytes_per_s=size_bytes / disk_s,
        dram_bytes_per_s=size_bytes / 1e-4,
        init_s=fresh_s,
        wake_s=wake_s,
        stop_s=found.stop_s,
        worker_start_s=THIS.speeds.worker_start_s,
        executes_while_loading=False,
        compute_at_once=found.at_once,
        load_compute_s_per_byte=found.load_cpu_s / size_bytes,
    )
    costs = StepCosts(size_bytes, 0.0, step_s, token_s, THIS.costs.decode_s)
    made = dataclasses.replace(
        THIS,
        name="measured",
        num_workers=NUM_WORKERS,
        dram_bytes=DRAM_BYTES,
        speeds=speeds,
        costs=costs,
    )
    return made, beside_s


def workload_of(trace: Trace, size_bytes: int, replay_s: float) -> Workload:
    rng = np.random.default_rng(SEED)
    prompts = rng.integers(PROMPTS[0], PROMPTS[1] + 1, 1000)
    lengths = Lengths("short", prompts, np.full(1000, OUTPUT_TOKENS))
    minutes = trace.history.counts.shape[1]
    settings = WorkloadSettings(
        num_models=NUM_MODELS,
        num_requests=round(REQUESTS_PER_S * replay_s),
        model_bytes=(size_bytes,),
        compression=minutes * 60 / replay_s,
        seed=SEED,
    )
    made = make_workload(trace, settings, [lengths])
    models = tuple(dataclasses.replace(model, keep_alive_s=KEEP_ALIVE_S) for model in made.models)
    return dataclasses.replace(made, models=models)


async def replay(base_url: str, workload: Workload) -> list[Seen]:
    """Sends each request at its time, whatever became of those before it."""
    rng = random.Random(SEED)
    async with httpx.AsyncClient(
        base_url=base_url, timeout=300, limits=httpx.Limits(max_connections=None)
    ) as client:
        began = time.monotonic()
        tasks = []
        for at, event, job in workload.arrivals():
            ids = [rng.randrange(1000, 20000) for _ in range(job.prompt_tokens)]
            await asyncio.sleep(max(began + at - time.monotonic(), 0.0))
            tasks.append(asyncio.create_task(_send(client, at, str(event.model_id), ids)))
        return await asyncio.gather(*tasks)


async def _send(client: httpx.AsyncClient, at: float, model: str, ids: list[int]) -> Seen:
    body = completion_body(model, ids, OUTPUT_TOKENS)
    sent_at = time.monotonic()
    ttft_s = None
    receipt: dict[str, Any] = {}
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if response.status_code != 200:
            raise SystemExit(f"{response.status_code}: {(await response.aread()).decode()}")
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                ttft_s = ttft_s or time.monotonic() - sent_at
                receipt = msgspec.json.decode(line[6:]).get("flashserve") or receipt
    assert ttft_s is not None, "no token came"
    phases = tuple(receipt["actual"][name] for name in PHASES)
    return Seen(at, ttft_s, bool(receipt["cold"]), phases)


def simulated(workload: Workload, profile: Profile) -> Results:
    controller = Controller(PolicySettings(), profile.rates, FixedKeepAlive())
    cluster = Cluster(profile)
    return simulate(controller, workload, cluster, policy="keep-alive", after_s=60.0)


def row(
    name: str, cold: Sequence[bool], ttft_s: Sequence[float], phases: np.ndarray
) -> dict[str, Any]:
    """phases: [requests, PHASES], seconds."""
    return {
        "run": name,
        "requests": len(ttft_s),
        "cold_share": sum(cold) / len(cold),
        **{f"ttft_p{p}_s": common.percentile(ttft_s, p) for p in (50, 95, 99)},
        "mean_s": sum(ttft_s) / len(ttft_s),
        **dict(zip(PHASES, phases.mean(axis=0).tolist(), strict=True)),
    }


def main(args: argparse.Namespace) -> None:
    folder = folders_of(args).future
    trace = (
        synthetic.functions(600, DAY, SEED).trace
        if folder is None
        else read_trace(folder / FILE, SEED)
    )
    with common.demo_model() as model_dir, running(model_dir) as server:
        size_bytes = sum(path.stat().st_size for path in model_dir.glob("*.safetensors"))
        workload = workload_of(trace, size_bytes, QUICK_REPLAY_S if args.quick else REPLAY_S)
        print("probing the server", file=sys.stderr, flush=True)
        probed = QUICK_PROBED if args.quick else PROBED
        before = probe(server, probed)
        emptied(server)  # as the simulation begins
        print(f"{before}\nreplaying {workload.num_requests} requests", file=sys.stderr, flush=True)
        seen = asyncio.run(replay(str(server.http.base_url), workload))
        emptied(server)
        print("probing the server again", file=sys.stderr, flush=True)
        after = probe(server, probed)
    profile, beside_s = profile_of(mean_of(before, after), size_bytes)
    results = simulated(workload, profile)
    requests = results.requests
    live = row(
        "live",
        [each.is_cold for each in seen],
        [each.ttft_s for each in seen],
        np.array([each.phases for each in seen]),
    )
    answered = ~np.isnan(requests.ttft_s)
    times = (requests.ttft_s[answered] + beside_s).tolist()
    assert requests.phases is not None
    model = row("simulated", requests.is_cold.tolist(), times, requests.phases[answered])

    def apart(key: str) -> float:
        return max(live[key] / model[key], model[key] / live[key])

    difference = abs(live["cold_share"] - model["cold_share"])
    notes = (
        f"{__doc__}\nmeasured before: {before}; after: {after}; "
        f"beside the engine {beside_s * 1000:.1f} ms; {profile.speeds}; {profile.costs}"
    )
    common.write_report(
        "policy-live",
        seed=SEED,
        rows=[live, model],
        ratios={},
        values={
            "live_cold_share_difference": common.value(
                difference, "fraction", better="lower", aim=0.02
            ),
            "live_ttft_median_ratio": common.value(
                apart("ttft_p50_s"), "ratio", better="lower", aim=1.2
            ),
            "live_ttft_p95_ratio": common.value(
                apart("ttft_p95_s"), "ratio", better="lower", aim=1.2
            ),
            "live_profile_drift": common.value(drift(before, after), "ratio", better="lower"),
        },
        notes=notes,
        json_file=args.json,
    )
