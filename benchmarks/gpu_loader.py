"""From DRAM to the first token on one accelerator, within ten minutes.

Nothing is read from a file: an 8B Llama-shaped bf16 checkpoint of random values is made in a memfd
arena, as the store keeps it, and a worker's own code (RegisteredArena, Residence, CudaCopier) moves
it. One JSON line is printed for each item as soon as it is known, and a table at the end; an item
that fails or outlasts its deadline does not end the others. The checkpoint is resident in DRAM
throughout, so this is the DRAM tier alone; kernels are warm, and the module was built ahead.

  versions      libraries, driver, clocks, what the device supports
  starting      import, context, first kernel and first product of a fresh process
  registration  cudaHostRegister of populated 4 KiB pages: a writable and a read-only mapping
  ceiling       pinned host to device, median of five, over sizes and one or two streams
  mapping       device memory taken and given back at fixed addresses
  load          all of the checkpoint: reserve, map, copy by groups, last byte arrived
  first_token   load and one prefill behind it, layer by layer, beside the prefill alone
  sleep         memory given back; wake to the last byte and to the first token; the self-check
  worker        the same through a worker's host and engine: load, sleep, wake, self-check
  graph         a captured graph replayed after a sleep gives the same bits
  overlap       host to device while the device multiplies matrices

--dry-run runs the same items on a processor with a tiny model: it tries the script, no speed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import common
from flashserve.errors import UnavailableError
from flashserve.store.device.copier import CpuCopier, CudaCopier, DeviceCopier
from gpu_checkpoint import DRY, FULL, QUICK, SEED, Bench
from gpu_items import ITEMS

CEILING_SHARE = 0.9
FIRST_TOKEN_SLACK = 1.15
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
    add("starting", "import_s", "s", "lower")
    add("starting", "context_s", "s", "lower")
    add("worker", "load_first_token_s", "s", "lower")
    add("worker", "wake_first_token_s", "s", "lower")
    add("worker", "over_bound", "x bytes / ceiling", "lower", FIRST_TOKEN_SLACK)
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
