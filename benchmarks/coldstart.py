"""How long until the first token, from each place where a model's bytes can be?

Clock: from the request's sending to its first token received over HTTP on loopback (time.monotonic
of this process). Prefix reuse is off, the tokenizer is cached, the prompt is token ids. Rows:

  warm                  a replica is ready
  dram                  no replica; bytes in DRAM, a spare worker waits
  disk, page cache      no replica, nothing in DRAM; the files are in the kernel's page cache
  disk, cold            the same, after posix_fadvise(DONTNEED) on every file of the model
  s3                    no replica, nothing in DRAM or the disk tier; `rclone serve s3` on loopback,
                        which shares the cores and has the files in the page cache
  fresh process         python imports transformers, from_pretrained, one token; its clock starts
                        before the process does; files in the page cache (which favours it)
  fresh process, s3     the same, after boto3's download_file of every file from that server

The rows are interleaved, so that a slow minute of the machine hits all of them. Beside each stand
the medians of what the receipts say: phases of the time to the first token, and its prediction.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import common
import objectstore
import server as bench_server
from server import Server, deploy, stream_completion, wait_for_state

SEED = 20261123
TIERS = {"warm": "device", "dram": "dram", "disk, page cache": "disk", "disk, cold": "disk"}
TIERS["s3"] = "remote"
ROWS = (*TIERS, "fresh process", "fresh process, s3")
PHASES = ("queue_s", "place_s", "fetch_s", "dram_s", "device_s", "init_s", "prefill_s")
BUCKET = "models"
FRESH_PROCESS = """
import sys, torch
from transformers import AutoModelForCausalLM
directory = sys.argv[1]
if len(sys.argv) > 3:
    import boto3
    client = boto3.client("s3")
    bucket, prefix = sys.argv[3].removeprefix("s3://").split("/", 1)
    for entry in client.list_objects_v2(Bucket=bucket, Prefix=prefix + "/")["Contents"]:
        client.download_file(bucket, entry["Key"], directory + "/" + entry["Key"].split("/")[-1])
model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
ids = torch.tensor([[int(token) for token in sys.argv[2].split(",")]])
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
print("token", flush=True)
sys.stdin.read()
"""


@dataclasses.dataclass(frozen=True, slots=True)
class Sample:
    """receipt: as the server gave it; None of a process that is none of ours."""

    ttft_s: float
    receipt: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Bench:
    """A server that has the same model from several places; s3_env finds the object store."""

    server: Server
    model_dir: pathlib.Path
    s3_uri: str
    s3_env: Mapping[str, str]


def fresh_process(bench: Bench, prompt_ids: list[int], *, from_s3: bool) -> Sample:
    """From the start of a Python process to its first token."""
    with tempfile.TemporaryDirectory(prefix="fs-bench-") as empty:
        directory, more = (empty, [bench.s3_uri]) if from_s3 else (str(bench.model_dir), [])
        arguments = [directory, ",".join(map(str, prompt_ids)), *more]
        started_at = time.monotonic()
        process = subprocess.Popen(
            [sys.executable, "-c", FRESH_PROCESS, *arguments],
            env={**os.environ, **bench.s3_env},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert process.stdout is not None
        line = process.stdout.readline()
        elapsed_s = time.monotonic() - started_at
        process.communicate()
    if line.strip() != "token":
        raise SystemExit("the fresh process failed")
    return Sample(elapsed_s)


def drop_page_cache(model_dir: pathlib.Path) -> None:
    for path in model_dir.iterdir():
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def fill_page_cache(model_dir: pathlib.Path) -> None:
    for path in model_dir.iterdir():
        path.read_bytes()


def flip_a_bit(model_dir: pathlib.Path, bit: int) -> None:
    """Changes the last weight of each file by next to nothing: a low bit of its bf16 mantissa."""
    for path in model_dir.glob("*.safetensors"):
        with path.open("r+b") as file:
            file.seek(-2, os.SEEK_END)
            (value,) = file.read(1)
            file.seek(-2, os.SEEK_END)
            file.write(bytes([value ^ 1 << bit]))


def measure(bench: Bench, row: str, prompt_ids: list[int]) -> Sample:
    """Time to first token with the model brought to the row's tier beforehand."""
    if row not in TIERS:
        return fresh_process(bench, prompt_ids, from_s3=row.endswith("s3"))
    name = {"warm": "warm", "s3": "remote"}.get(row, "cold")
    if row != "warm":
        bring(bench, name, TIERS[row])
    if row == "disk, cold":
        drop_page_cache(bench.model_dir)
    elif row == "disk, page cache":
        fill_page_cache(bench.model_dir)
    time.sleep(0.2)  # the clean-up of the round before is not part of this one
    before = read_bytes(bench)
    ttft_s, receipt = stream_completion(bench.server, name, prompt_ids, max_tokens=2)
    if receipt["tier"] != TIERS[row]:
        raise SystemExit(f"row {row}: the receipt says {receipt['tier']}, not {TIERS[row]}")
    check_reads(row, before, read_bytes(bench))
    return Sample(ttft_s, receipt)


def read_bytes(bench: Bench) -> dict[str, int]:
    """Bytes that the server ever read from each tier, as it counts them."""
    (node,) = bench.server.admin.get("/admin/v1/tiers").raise_for_status().json()["data"]
    return node["read_bytes"]


def check_reads(row: str, before: Mapping[str, int], after: Mapping[str, int]) -> None:
    """Ends the run unless the bytes came from the row's tier, and from no other."""
    came_from = [tier for tier in after if after[tier] > before[tier]]
    expected = [TIERS[row]] if TIERS[row] in after else []
    if came_from != expected:
        raise SystemExit(f"row {row}: bytes came from {came_from}, not from {expected}")


def bring(bench: Bench, name: str, tier: str) -> None:
    """Stages a model to DRAM, or takes it out of every tier above the one that it shall be in."""
    orders = {"dram": ("stage", "dram"), "disk": ("evict", "dram"), "remote": ("evict", "disk")}
    verb, named = orders[tier]
    path = f"/admin/v1/models/{name}/{verb}"
    bench.server.admin.post(path, json={"tier": named}).raise_for_status()
    wait_for_state(bench.server, name, "cold", tier)


@contextlib.contextmanager
def running(model_dir: pathlib.Path) -> Iterator[Bench]:
    """`cold`, and models that differ from it and from each other in one bit of each file: of equal
    files the store would keep one, and a start would find bytes that were evicted."""
    with tempfile.TemporaryDirectory(prefix="fs-bench-") as temporary:
        root = pathlib.Path(temporary)
        warm_copy, remote_copy = root / "warm", root / "s3" / BUCKET / "small"
        for bit, copy in enumerate((warm_copy, remote_copy)):
            shutil.copytree(model_dir, copy)
            flip_a_bit(copy, bit)
        uri = f"s3://{BUCKET}/small"
        with (
            objectstore.serve(root / "s3") as s3_env,
            bench_server.running_server(
                s3_env, NODE__NUM_WORKERS="2", NODE__DRAM_BYTES="2GiB"
            ) as server,
        ):
            deploy(server, "warm", warm_copy, keep_alive_s=3600)
            deploy(server, "cold", model_dir, keep_alive_s=0)
            deploy(server, "remote", uri, keep_alive_s=0)
            stream_completion(server, "warm", [1000] * 32, max_tokens=2)
            yield Bench(server, model_dir, uri, s3_env)


def run(bench: Bench, repeats: int) -> dict[int, dict[str, list[Sample]]]:
    """Samples by prompt length and row."""
    rng = random.Random(SEED)
    samples: dict[int, dict[str, list[Sample]]] = {32: {}, 512: {}}
    for tokens in samples:  # first use of everything, not counted
        prompt_ids = [rng.randrange(1000, 20000) for _ in range(tokens)]
        for row in ("warm", "dram", "disk, page cache", "s3"):
            measure(bench, row, prompt_ids)
    for round_number in range(repeats):
        for tokens, rows in samples.items():
            for row in ROWS:
                prompt_ids = [rng.randrange(1000, 20000) for _ in range(tokens)]
                rows.setdefault(row, []).append(measure(bench, row, prompt_ids))
        print(f"round {round_number + 1} of {repeats} done", file=sys.stderr)
    return samples


def report_row(tokens: int, row: str, samples: Sequence[Sample]) -> dict[str, Any]:
    """Seconds: the spread of the clock here, and the medians of the receipts' phases."""
    receipts = [sample.receipt for sample in samples if sample.receipt is not None]
    predicted: list[float] = [sum(receipt["predicted"].values()) for receipt in receipts]
    return {
        "prompt_tokens": tokens,
        "row": row,
        **common.spread([sample.ttft_s for sample in samples]),
        "tier": TIERS.get(row),
        "predicted_s": common.median(predicted) if predicted else None,
        **{
            phase: common.median(receipt["actual"][phase] for receipt in receipts)
            if receipts
            else None
            for phase in PHASES
        },
    }


def ratios(samples: Mapping[int, Mapping[str, Sequence[Sample]]]) -> dict[str, float]:
    """Of the medians; above 1 where FlashServe is better, or warm is faster than cold."""
    short, long = (
        {
            row: common.median(one.ttft_s for one in of_row)
            for row, of_row in samples[tokens].items()
        }
        for tokens in (32, 512)
    )
    return {
        "fresh_process_over_dram_hit": short["fresh process"] / short["dram"],
        "fresh_process_over_disk": short["fresh process"] / short["disk, cold"],
        "s3_fresh_process_over_dram_hit": short["fresh process, s3"] / short["dram"],
        "s3_fresh_process_over_s3": short["fresh process, s3"] / short["s3"],
        "warm_over_dram_hit": short["warm"] / short["dram"],
        "warm_over_dram_hit_512": long["warm"] / long["dram"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 11")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    args = parser.parse_args()
    with common.demo_model() as model_dir, running(model_dir) as bench:
        samples = run(bench, repeats=3 if args.quick else 11)
    common.write_report(
        "coldstart",
        seed=SEED,
        rows=[
            report_row(tokens, row, of_row)
            for tokens, rows in samples.items()
            for row, of_row in rows.items()
        ],
        ratios=ratios(samples),
        values={},
        aims={
            "fresh_process_over_dram_hit": 15.0,
            "s3_fresh_process_over_dram_hit": 49.0,
            "s3_fresh_process_over_s3": 3.0,
            "warm_over_dram_hit": 1 / 1.5,
            "warm_over_dram_hit_512": 1 / 1.15,
        },
        notes=__doc__,
        json_file=args.json,
    )


if __name__ == "__main__":
    main()
