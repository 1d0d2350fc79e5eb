"""The items of the accelerator's benchmark: each returns what it measured, or raises."""

from __future__ import annotations

import contextlib
import json
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import transformers

import common
from flashserve.config import EngineSettings
from flashserve.engine.selfcheck import CheckKey, SelfCheck
from flashserve.errors import UnavailableError
from flashserve.messages.work import GenerateJob, LoadModel, Prepare
from flashserve.node.homes import DeviceHome
from flashserve.node.hosting import ModelHost
from flashserve.store.device.copier import CudaCopier
from flashserve.store.device.regions import RegisteredArena, address_of
from flashserve.types import ModelId, SamplingParams
from gpu_checkpoint import GIB, MIB, Bench, Memory

REPEATS = 5


def versions(bench: Bench) -> dict[str, Any]:
    found: dict[str, Any] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "shmem_huge_pages": _first_line("/sys/kernel/mm/transparent_hugepage/shmem_enabled"),
    }
    if isinstance(bench.copier, CudaCopier):
        found["registers_read_only"] = bench.copier.registers_read_only
        found["keeps_addresses"] = bench.copier.address_refusal or "yes"
        query = "name,driver_version,clocks.sm,clocks.mem,pcie.link.gen.current"
        query += ",pcie.link.width.current"
        shown = subprocess.run(
            ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=False,
            timeout=30,
        )
        found["device"] = shown.stdout.strip() or torch.cuda.get_device_name(bench.device)
    return found


def _first_line(path: str) -> str:
    try:
        return pathlib.Path(path).read_text().split("\n", maxsplit=1)[0]
    except OSError:
        return "unknown"


def starting(bench: Bench) -> dict[str, Any]:
    """What a fresh process pays before its first kernel and its first product."""
    samples = []
    for _ in range(3 if bench.device.type == "cuda" else 1):
        shown = subprocess.run(
            [sys.executable, "-c", _START, bench.device.type],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        samples.append(json.loads(shown.stdout))
    return {name: common.median([sample[name] for sample in samples]) for name in samples[0]}


_START = """
import json, sys, time
marks = [time.perf_counter()]
def mark(): marks.append(time.perf_counter())
import torch
mark()
wait = torch.cuda.synchronize if sys.argv[1] == "cuda" else lambda: None
one = torch.zeros(64, 64, device=sys.argv[1]); wait(); mark()
one + one; wait(); mark()
one @ one; wait(); mark()
names = ("import_s", "context_s", "first_kernel_s", "first_product_s")
print(json.dumps(dict(zip(names, [b - a for a, b in zip(marks, marks[1:])]))))
"""


def mapping(bench: Bench) -> dict[str, Any]:
    """Device memory taken and given back at fixed addresses, for each size that a region has."""
    found: dict[str, Any] = {}
    for size in bench.scale.region_sizes:
        region = bench.copier.reserve(size)
        try:
            maps, unmaps = [], []
            for _ in range(REPEATS):
                maps.append(_timed(region.map))
                unmaps.append(_timed(region.unmap))
        finally:
            region.free()
        found[f"map_{size // MIB}MiB_s"] = common.median(maps)
        found[f"unmap_{size // MIB}MiB_s"] = common.median(unmaps)
    return found


def registration(bench: Bench) -> dict[str, Any]:
    memory, found = Memory(bench.scale.registered_bytes), {}
    gibibytes = memory.num_bytes / GIB
    for name in ("writable", "read_only"):
        mapping = getattr(memory, name)
        began = time.perf_counter()
        arena = RegisteredArena(
            bench.copier,
            address_of(mapping),
            memory.num_bytes,
            piece_bytes=bench.scale.piece_bytes,
        )
        done = time.perf_counter()
        if arena.refusal:
            found[f"{name}_refusal"] = arena.refusal
        else:
            found[f"{name}_s_per_gib"] = (done - began) / gibibytes
        done = time.perf_counter()
        arena.close()
        found[f"{name}_unregister_s_per_gib"] = (time.perf_counter() - done) / gibibytes
    return found


def ceiling(bench: Bench) -> dict[str, Any]:
    """GB/s by size in KiB and number of streams."""
    is_cuda = bench.device.type == "cuda"
    total = bench.scale.copied_bytes
    source = torch.zeros(total, dtype=torch.uint8, pin_memory=is_cuda)
    target = torch.zeros(total, dtype=torch.uint8, device=bench.device)
    rates: dict[str, float] = {}
    for size in bench.scale.copy_sizes:
        for num_streams in (1, 2) if is_cuda else (1,):
            streams = [torch.cuda.Stream() for _ in range(num_streams)] if is_cuda else [None]
            samples = [_copy_s(bench, source, target, size, streams) for _ in range(REPEATS)]
            rates[f"{size // 1024}KiB_x{num_streams}"] = total / common.median(samples) / 1e9
    bench.ceiling = max(rates.values()) * 1e9
    return {"gb_per_s": max(rates.values()), **rates}


def _copy_s(
    bench: Bench,
    source: torch.Tensor,
    target: torch.Tensor,
    size: int,
    streams: Sequence[torch.cuda.Stream | None],
) -> float:
    bench.synchronize()
    began = time.perf_counter()
    for index, begin in enumerate(range(0, len(source), size)):
        stream = streams[index % len(streams)]
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            target[begin : begin + size].copy_(source[begin : begin + size], non_blocking=True)
    bench.synchronize()
    return time.perf_counter() - began


def load(bench: Bench) -> dict[str, Any]:
    """Each repeat is a fresh load of a module bound before; the bytes are compared at the end."""
    seconds = []
    for _ in range(REPEATS):
        bench.residents.close()
        model = bench.bound(bench.skeleton())
        bench.synchronize()
        began = time.perf_counter()
        resident = bench.residents.take("model", bench.tensors, bench.groups, lambda m=model: m)
        resident.residence.load()
        resident.residence.finish()
        seconds.append(time.perf_counter() - began)
    compare_bytes(bench, resident.residence.views())
    rate = bench.num_bytes / common.median(seconds)
    return {
        "gb_per_s": rate / 1e9,
        "share_of_ceiling": rate / bench.ceiling if bench.ceiling else None,
        "bytes": bench.num_bytes,
        "mapping": bench.registered[2],
        **_spread("load_s", seconds),
    }


def compare_bytes(bench: Bench, views: dict[str, torch.Tensor]) -> None:
    for tensor in bench.tensors:
        stored = bench.memory.bytes[tensor.offset : tensor.offset + tensor.num_bytes]
        found = views[tensor.name].flatten().view(torch.uint8).cpu()
        if not torch.equal(found, torch.from_numpy(stored)):
            raise AssertionError(f"tensor {tensor.name} arrived damaged")


def first_token(bench: Bench) -> dict[str, Any]:
    """Every load finds kernels warm and its module built, not bound."""
    model = bench.take()
    warm = [_timed(lambda: bench.prefill(model)) for _ in range(REPEATS + 2)][2:]
    expected = bench.prefill(model)
    seconds = []
    for _ in range(REPEATS):
        bench.residents.close()
        fresh = bench.skeleton()
        bench.synchronize()
        began = time.perf_counter()
        model = bench.take(fresh)
        with bench.gated(model):
            logits = bench.prefill(model)
        seconds.append(time.perf_counter() - began)
        torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.02)
    return {
        **_spread("first_token_s", seconds),
        **_spread("warm_prefill_s", warm),
        **_bound(bench, common.median(seconds), common.median(warm)),
    }


def _bound(bench: Bench, seconds: float, warm_s: float) -> dict[str, Any]:
    """How a first token compares with moving the bytes at the ceiling and then prefilling."""
    if not bench.ceiling:
        return {"over_bound": None}
    return {"over_bound": (seconds - warm_s) / (bench.num_bytes / bench.ceiling)}


def sleep(bench: Bench) -> dict[str, Any]:
    model = bench.take()
    warm_s = common.median([_timed(lambda: bench.prefill(model)) for _ in range(3)])
    expected = bench.prefill(model)
    sleeps, maps, arrivals, tokens = [], [], [], []
    with tempfile.TemporaryDirectory() as directory:
        key = CheckKey.of("synthetic", bench.device, torch.bfloat16)
        check = SelfCheck(pathlib.Path(directory), key)
        bench.residents.verify(check, bench.prefill)
        for index in range(2 * REPEATS):
            sleeps.append(_timed(bench.residents.sleep))
            began = time.perf_counter()
            model = bench.take()
            maps.append(time.perf_counter() - began)
            if index % 2:
                with bench.gated(model):
                    logits = bench.prefill(model)
                tokens.append(time.perf_counter() - began)
                torch.testing.assert_close(logits, expected, rtol=0.02, atol=0.02)
            else:
                bench.synchronize()
                arrivals.append(time.perf_counter() - began)
        check_s = _timed(lambda: bench.residents.verify(check, bench.prefill))
    compare_bytes(bench, bench.residents.awake().residence.views())
    return {
        **_spread("sleep_s", sleeps),
        **_spread("wake_enqueued_s", maps),
        **_spread("wake_arrived_s", arrivals),
        **_spread("wake_first_token_s", tokens),
        "self_check_s": check_s,
        **_bound(bench, common.median(tokens), warm_s),
    }


def worker(bench: Bench) -> dict[str, Any]:
    """A worker's whole way: load and wake, each to the first token of its own engine."""
    bench.release()
    arena, mapping, _ = bench.registered
    config = bench.config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    num_groups = len(bench.groups)
    order = LoadModel(
        ModelId("synthetic"), config, {}, bench.tensors, num_groups, num_groups, "synthetic"
    )
    prompt = tuple(bench.prompt[0].tolist())
    job = GenerateJob("s", prompt, SamplingParams(temperature=0.0, max_tokens=1, ignore_eos=True))
    with tempfile.TemporaryDirectory() as directory:
        home = DeviceHome(bench.copier, mapping, arena, pathlib.Path(directory))
        settings = EngineSettings(kv_bytes=bench.scale.kv_bytes, max_batch_tokens=len(prompt))
        host = ModelHost(mapping, settings, home)
        try:
            return _work(bench, host, order, job)
        finally:
            host.unload()
            home.close()


def _work(bench: Bench, host: ModelHost, order: LoadModel, job: GenerateJob) -> dict[str, Any]:
    loads, wakes, sleeps, checks, tokens = [], [], [], [], set()
    for index in range(1 + REPEATS):
        host.prepare(Prepare((), order.config, order.tensors, order.identity))
        while host.work_ahead():
            pass
        bench.synchronize()
        began = time.perf_counter()
        was_asleep = host.load(order).was_asleep
        assert host.engine is not None
        host.engine.add(job)
        ((_, output),) = host.engine.step()
        (wakes if was_asleep else loads).append(time.perf_counter() - began)
        tokens.add(output.token_id)
        checks.append(_timed(host.check))
        if index == REPEATS:
            warm = [_timed(lambda: _again(host, job)) for _ in range(REPEATS)]
        sleeps.append(_timed(host.unload))
    if len(tokens) != 1 or len(wakes) != REPEATS:
        raise AssertionError(f"{len(wakes)} wakes gave the tokens {tokens}")
    warm_s = common.median(warm)
    return {
        "load_first_token_s": loads[0],
        **_spread("wake_first_token_s", wakes),
        **_spread("sleep_s", sleeps),
        **_spread("self_check_s", checks),
        **_spread("warm_prefill_s", warm),
        **_bound(bench, common.median(wakes), warm_s),
    }


def _again(host: ModelHost, job: GenerateJob) -> None:
    assert host.engine is not None
    host.engine.drop_cached()
    host.engine.add(job)
    host.engine.step()


def graph(bench: Bench) -> dict[str, Any]:
    _require_cuda(bench)
    resident_model = bench.take()
    residence = bench.residents.awake().residence
    if not residence.keeps_addresses:
        raise UnavailableError("regions keep no addresses here")
    weight = resident_model.model.layers[0].mlp.up_proj.weight
    hidden = torch.randn(8, weight.shape[1], dtype=torch.bfloat16, device=bench.device)
    with torch.inference_mode():
        torch.mm(hidden, weight.t())
        bench.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            output = torch.mm(hidden, weight.t())
        captured.replay()
        before = output.clone()
        bench.residents.sleep()
        bench.take()
        bench.synchronize()
        captured.replay()
        is_equal = torch.equal(output, before)
    if not is_equal:
        raise AssertionError("the graph computes something else after a sleep")
    return {"bit_equal_after_wake": is_equal}


def overlap(bench: Bench) -> dict[str, Any]:
    _require_cuda(bench)
    total, size = bench.scale.copied_bytes, bench.scale.matrix
    source = torch.zeros(total, dtype=torch.uint8, pin_memory=True)
    target = torch.zeros(total, dtype=torch.uint8, device=bench.device)
    a = torch.randn(size, size, dtype=torch.bfloat16, device=bench.device)
    stream = torch.cuda.Stream()
    alone = _matmul_s(bench, a)
    num_products = max(1, int(4 * total / bench.ceiling / alone)) if bench.ceiling else 50
    bench.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(4)]
    events[0].record()
    for _ in range(num_products):
        a @ a
    events[1].record()
    with torch.cuda.stream(stream):
        events[2].record(stream)
        for begin in range(0, total, 64 * MIB):
            target[begin : begin + 64 * MIB].copy_(
                source[begin : begin + 64 * MIB], non_blocking=True
            )
        events[3].record(stream)
    bench.synchronize()
    return {
        "gb_per_s": total / (events[2].elapsed_time(events[3]) / 1e3) / 1e9,
        "matmul_slowdown": events[0].elapsed_time(events[1]) / 1e3 / num_products / alone,
        "matmul_s": alone,
    }


def _matmul_s(bench: Bench, a: torch.Tensor) -> float:
    a @ a
    bench.synchronize()
    began = time.perf_counter()
    for _ in range(10):
        a @ a
    bench.synchronize()
    return (time.perf_counter() - began) / 10


def _require_cuda(bench: Bench) -> None:
    if bench.device.type != "cuda":
        raise UnavailableError("needs a CUDA device")


def _timed(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _spread(name: str, seconds: Sequence[float]) -> dict[str, float]:
    return {
        name: statistics.median(seconds),
        f"{name}_low": min(seconds),
        f"{name}_high": max(seconds),
    }


ITEMS: tuple[tuple[Callable[[Bench], dict[str, Any]], float], ...] = (
    (versions, 60),
    (starting, 60),
    (registration, 60),
    (ceiling, 60),
    (mapping, 30),
    (load, 150),
    (first_token, 90),
    (sleep, 90),
    (worker, 90),
    (graph, 30),
    (overlap, 30),
)
"""Each with its deadline in seconds; making the checkpoint is within that of `load`."""
