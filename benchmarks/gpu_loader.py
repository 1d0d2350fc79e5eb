"""From DRAM to the first token on one accelerator, within ten minutes.

Nothing is read from a file: an 8B Llama-shaped bf16 checkpoint of random values is made in a memfd
arena, as the store keeps it, and a worker's own code (RegisteredArena, Residence, CudaCopier) moves
it. One JSON line is printed for each item as soon as it is known, and a table at the end; an item
that fails or outlasts its deadline does not end the others. The checkpoint is resident in DRAM
throughout, so this is the DRAM tier alone; kernels are warm, and the module was built ahead.

  versions      libraries, driver, clocks, what the device supports
  registration  cudaHostRegister of populated 4 KiB pages: a writable and a read-only mapping
  ceiling       pinned host to device, median of five, over sizes and one or two streams
  load          all of the checkpoint: reserve, map, copy by groups, last byte arrived
  first_token   load and one prefill behind it, layer by layer, beside the prefill alone
  sleep         memory given back; wake to the last byte and to the first token; the self-check
  graph         a captured graph replayed after a sleep gives the same bits
  overlap       host to device while the device multiplies matrices

--dry-run runs the same items on a processor with a tiny model: it tries the script, no speed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import json
import mmap
import os
import pathlib
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

import common
from flashserve.engine.selfcheck import CheckKey, SelfCheck
from flashserve.errors import UnavailableError
from flashserve.node.residents import Residents
from flashserve.store.copier import CpuCopier, CudaCopier, DeviceCopier
from flashserve.store.device import bind
from flashserve.store.dram import attach
from flashserve.store.order import groups
from flashserve.store.regions import RegisteredArena
from flashserve.types import TensorSlice

SEED = 0
GIB, MIB = 1 << 30, 1 << 20
REPEATS = 5
CEILING_SHARE = 0.9
FIRST_TOKEN_SLACK = 1.15
# Where a safetensors header ends is only a multiple of 8; the device must not mind.
_FIRST_OFFSET = 12_008
_MADV_POPULATE_WRITE = 23


@dataclasses.dataclass(frozen=True)
class Scale:
    """What is measured: the model's shape and the amounts that are moved."""

    config: dict[str, Any]
    prompt_tokens: int
    registered_bytes: int
    piece_bytes: int
    copy_sizes: tuple[int, ...]
    copied_bytes: int
    matrix: int


LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
}
TINY = {
    **LLAMA_8B,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
FULL = Scale(
    LLAMA_8B, 512, 8 * GIB, GIB, tuple(size * MIB for size in (1, 4, 16, 64, 256)), GIB, 8192
)
QUICK = dataclasses.replace(
    FULL, config={**LLAMA_8B, "num_hidden_layers": 8}, registered_bytes=2 * GIB
)
DRY = Scale(TINY, 16, 4 * MIB, MIB, (4096, 65536), MIB, 64)


class Memory:
    """A memfd, populated, mapped writable here and read-only as a worker has it."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = -(-num_bytes // (2 * MIB)) * 2 * MIB
        fd = os.memfd_create("gpu-loader", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, self.num_bytes)
            self.writable = mmap.mmap(fd, self.num_bytes)
            self.read_only = attach(fd, self.num_bytes)
        finally:
            os.close(fd)
        self.bytes = np.frombuffer(self.writable, np.uint8)
        try:
            self.writable.madvise(_MADV_POPULATE_WRITE)
        except OSError:  # a sandbox's kernel may not know it
            self.bytes[:: mmap.PAGESIZE] = 0


def address_of(mapping: mmap.mmap) -> int:
    return int(np.frombuffer(mapping, np.uint8).ctypes.data)


class Bench:
    """The device, and what earlier items leave for later ones."""

    def __init__(self, copier: DeviceCopier, scale: Scale) -> None:
        self.copier = copier
        self.device = copier.device
        self.scale = scale
        self.ceiling = 0.0  # bytes per second, once it is measured

    @functools.cached_property
    def config(self) -> transformers.LlamaConfig:
        return transformers.LlamaConfig(**self.scale.config)

    def skeleton(self) -> nn.Module:
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(self.config, dtype=torch.bfloat16)
        return model.eval()

    @functools.cached_property
    def tensors(self) -> tuple[TensorSlice, ...]:
        """As a safetensors file has them: one after another, sorted by name."""
        found, offset = [], _FIRST_OFFSET
        for name, value in sorted(self.skeleton().state_dict().items()):
            found.append(TensorSlice(name, "BF16", tuple(value.shape), offset, 2 * value.numel()))
            offset += 2 * value.numel()
        return tuple(found)

    @property
    def num_bytes(self) -> int:
        return sum(tensor.num_bytes for tensor in self.tensors)

    @functools.cached_property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        return groups(tensor.name for tensor in self.tensors)

    @functools.cached_property
    def memory(self) -> Memory:
        """The checkpoint: norms of one, everything else normal; made on the device."""
        memory = Memory(self.tensors[-1].offset + self.tensors[-1].num_bytes)
        generator = torch.Generator(self.device).manual_seed(SEED)
        for tensor in self.tensors:
            values = torch.ones(tensor.shape, dtype=torch.bfloat16, device=self.device)
            if len(tensor.shape) > 1:
                values.normal_(0, tensor.shape[-1] ** -0.5, generator=generator)
            there = memory.bytes[tensor.offset : tensor.offset + tensor.num_bytes]
            there[:] = values.flatten().view(torch.uint8).cpu().numpy()
        return memory

    @functools.cached_property
    def registered(self) -> tuple[RegisteredArena, mmap.mmap, str]:
        """The arena as a worker has it; where that cannot be registered, the writable mapping."""
        memory, arena = self.memory, None
        for name in ("read_only", "writable"):
            mapping = getattr(memory, name)
            arena = RegisteredArena(
                self.copier,
                address_of(mapping),
                memory.num_bytes,
                piece_bytes=self.scale.piece_bytes,
            )
            if arena.refusal is None:
                return arena, mapping, name
            arena.close()
        assert arena is not None
        raise UnavailableError(f"the arena cannot be registered: {arena.refusal}")

    @functools.cached_property
    def residents(self) -> Residents:
        return Residents(self.copier, self.registered[0])

    def take(self, model: nn.Module | None = None) -> nn.Module:
        """The model on the device with every copy started: loaded, or woken if it slept."""
        resident = self.residents.take(
            "model", self.tensors, self.groups, lambda: self.bound(model or self.skeleton())
        )
        resident.residence.load()
        return resident.model

    def release(self) -> None:
        """Leaves the device empty for the next item, whatever this one did."""
        if "residents" in self.__dict__:
            self.residents.close()

    def bound(self, model: nn.Module) -> nn.Module:
        bind(model, self.tensors, self.registered[1], None)
        return model

    def synchronize(self) -> None:
        self.copier.synchronize()

    @functools.cached_property
    def prompt(self) -> torch.Tensor:
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(
            self.config.vocab_size, (1, self.scale.prompt_tokens), generator=generator
        )
        return ids.to(self.device)

    @torch.inference_mode()
    def prefill(self, model: nn.Module) -> torch.Tensor:
        """The last logits, after the device has computed them."""
        logits = model(self.prompt, use_cache=False, logits_to_keep=1).logits[0, -1]
        logits.argmax().item()
        return logits

    @contextlib.contextmanager
    def gated(self, model: nn.Module) -> Iterator[None]:
        """Each part of the model waits for its own group of weights, and for no later one."""
        resident = self.residents.awake()
        parts = [model.model.embed_tokens, *model.model.layers, model.model.norm]
        hooks = [
            part.register_forward_pre_hook(lambda *_, group=group: resident.residence.wait(group))
            for group, part in enumerate(parts)
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


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
    _compare_bytes(bench, resident.residence.views())
    rate = bench.num_bytes / common.median(seconds)
    return {
        "gb_per_s": rate / 1e9,
        "share_of_ceiling": rate / bench.ceiling if bench.ceiling else None,
        "bytes": bench.num_bytes,
        "mapping": bench.registered[2],
        **_spread("load_s", seconds),
    }


def _compare_bytes(bench: Bench, views: dict[str, torch.Tensor]) -> None:
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
    _compare_bytes(bench, bench.residents.awake().residence.views())
    return {
        **_spread("sleep_s", sleeps),
        **_spread("wake_enqueued_s", maps),
        **_spread("wake_arrived_s", arrivals),
        **_spread("wake_first_token_s", tokens),
        "self_check_s": check_s,
        **_bound(bench, common.median(tokens), warm_s),
    }


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
    (registration, 60),
    (ceiling, 60),
    (load, 150),
    (first_token, 90),
    (sleep, 90),
    (graph, 30),
    (overlap, 30),
)
"""Each with its deadline in seconds; making the checkpoint is within that of `load`."""


_DRY_NOTE = "a dry run: a tiny model on a processor, whose times mean nothing"


@contextlib.contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the main thread; a call that never returns to Python outlasts it."""

    def expire(*_: object) -> None:
        raise TimeoutError(f"took longer than {seconds:.0f} s")

    previous = signal.signal(signal.SIGALRM, expire)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)


def measure(bench: Bench, total_s: float, lines: pathlib.Path | None) -> dict[str, dict[str, Any]]:
    """Runs every item; each one's line is written before the next begins."""
    ends = time.monotonic() + total_s
    found: dict[str, dict[str, Any]] = {}
    for item, limit_s in ITEMS:
        began = time.monotonic()
        line: dict[str, Any] = {"item": item.__name__}
        try:
            with deadline(max(0.001, min(limit_s, ends - began))):
                line |= item(bench)
        except Exception as error:  # whatever it is, the other items are still worth their time
            line["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        line["seconds"] = time.monotonic() - began
        try:
            bench.release()
        except Exception as error:
            line["release_error"] = f"{type(error).__name__}: {error}"
        found[item.__name__] = line
        print(json.dumps(line), flush=True)
        if lines is not None:
            with lines.open("a") as file:
                file.write(json.dumps(line) + "\n")
    return found


def report(found: dict[str, dict[str, Any]], json_file: str | None, *, is_dry: bool) -> None:
    rows = [
        {"item": name, "seconds": line["seconds"], "result": line.get("error", "measured")}
        for name, line in found.items()
    ]
    values: dict[str, dict[str, Any]] = {}

    def add(item: str, key: str, unit: str, better: str, aim: float | None = None) -> None:
        number = found.get(item, {}).get(key)
        if isinstance(number, float):
            wanted = None if is_dry else aim
            values[f"{item}_{key}"] = common.value(number, unit, better=better, aim=wanted)

    add("registration", "writable_s_per_gib", "s/GiB", "lower")
    add("registration", "read_only_s_per_gib", "s/GiB", "lower")
    add("ceiling", "gb_per_s", "GB/s", "higher")
    add("load", "gb_per_s", "GB/s", "higher")
    add("load", "share_of_ceiling", "of the ceiling", "higher", CEILING_SHARE)
    add("first_token", "first_token_s", "s", "lower")
    add("first_token", "warm_prefill_s", "s", "lower")
    add("first_token", "over_bound", "x bytes / ceiling", "lower", FIRST_TOKEN_SLACK)
    add("sleep", "sleep_s", "s", "lower")
    add("sleep", "wake_arrived_s", "s", "lower")
    add("sleep", "wake_first_token_s", "s", "lower")
    add("sleep", "over_bound", "x bytes / ceiling", "lower", FIRST_TOKEN_SLACK)
    add("sleep", "self_check_s", "s", "lower")
    add("overlap", "gb_per_s", "GB/s", "higher")
    add("overlap", "matmul_slowdown", "x alone", "lower")
    common.write_report(
        "gpu_loader",
        seed=SEED,
        rows=rows,
        ratios={},
        values=values,
        notes="a dry run: a tiny model on a processor, whose times mean nothing"
        if is_dry
        else None,
        json_file=json_file,
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--quick", action="store_true", help="8 layers instead of 32")
    parser.add_argument("--dry-run", action="store_true", help="a tiny model on the processor")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    parser.add_argument("--lines", metavar="FILE", type=pathlib.Path, help="append each item there")
    parser.add_argument("--total-s", type=float, default=540.0, help="end after so many seconds")
    arguments = parser.parse_args(argv)
    copier: DeviceCopier
    if arguments.dry_run:
        copier, scale = CpuCopier(), DRY
    else:
        scale = QUICK if arguments.quick else FULL
        try:
            copier = CudaCopier(torch.device("cuda", 0))
        except UnavailableError as error:
            print(f"nothing measured: {error.message} (--dry-run tries the script without one)")
            return 0
    found = measure(Bench(copier, scale), arguments.total_s, arguments.lines)
    report(found, arguments.json, is_dry=arguments.dry_run)
    return 0


if __name__ == "__main__":
    sys.exit(main())
