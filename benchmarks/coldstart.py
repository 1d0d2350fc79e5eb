"""How long until the first token, from each place where a model's bytes can be?

Clock: from the request's sending to its first token received over HTTP on loopback (time.monotonic
of this process). Prefix reuse is off, the tokenizer is cached, the prompt is token ids. Rows:

  warm                  a replica is ready
  dram                  no replica; bytes in DRAM, a spare worker waits
  disk, page cache      no replica, nothing in DRAM; the files are in the kernel's page cache
  disk, cold            the same, after posix_fadvise(DONTNEED) on every file of the model
  fresh process         python imports transformers, from_pretrained, one token; its clock starts
                        before the process does; files in the page cache (which favours it)

The rows are interleaved, so that a slow minute of the machine hits all of them.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import random
import subprocess
import sys
import time

import common
import server as bench_server
from server import Server, deploy, stream_completion, wait_for_state

SEED = 20261123
ROWS = ("warm", "dram", "disk, page cache", "disk, cold", "fresh process")
FRESH_PROCESS = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
ids = torch.tensor([[int(token) for token in sys.argv[2].split(",")]])
model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=1, do_sample=False)
print("token", flush=True)
sys.stdin.read()
"""


def fresh_process_s(model_dir: pathlib.Path, prompt_ids: list[int]) -> float:
    """Seconds from the start of a Python process to its first token."""
    started_at = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-c", FRESH_PROCESS, str(model_dir), ",".join(map(str, prompt_ids))],
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
    return elapsed_s


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


def measure(server: Server, row: str, model_dir: pathlib.Path, prompt_ids: list[int]) -> float:
    """Seconds to first token with the model brought to the row's tier beforehand."""
    if row == "fresh process":
        return fresh_process_s(model_dir, prompt_ids)
    if row == "warm":
        return stream_completion(server, "warm", prompt_ids, max_tokens=2)[0]
    if row == "dram":
        server.admin.post("/admin/v1/models/cold/stage", json={"tier": "dram"}).raise_for_status()
        wait_for_state(server, "cold", "cold", "dram")
    else:
        server.admin.post("/admin/v1/models/cold/evict", json={"tier": "dram"}).raise_for_status()
        wait_for_state(server, "cold", "cold", "disk")
        drop_page_cache(model_dir) if row == "disk, cold" else fill_page_cache(model_dir)
    time.sleep(0.2)  # the clean-up of the round before is not part of this one
    ttft_s, receipt = stream_completion(server, "cold", prompt_ids, max_tokens=2)
    expected = "dram" if row == "dram" else "disk"
    if receipt["tier"] != expected:
        raise SystemExit(f"row {row}: the receipt says {receipt['tier']}, not {expected}")
    return ttft_s


def run(
    model_dir: pathlib.Path, warm_copy: pathlib.Path, repeats: int
) -> dict[int, dict[str, list[float]]]:
    """Seconds by prompt length and row. `warm_copy` has the same files under another identity,
    so that evicting the cold model's bytes cannot touch the warm one's."""
    rng = random.Random(SEED)
    samples: dict[int, dict[str, list[float]]] = {32: {}, 512: {}}
    with bench_server.running_server(NODE__NUM_WORKERS="2", NODE__DRAM_BYTES="2GiB") as server:
        deploy(server, "warm", warm_copy, keep_alive_s=3600)
        deploy(server, "cold", model_dir, keep_alive_s=0)
        for tokens in samples:  # first use of everything, not counted
            prompt_ids = [rng.randrange(1000, 20000) for _ in range(tokens)]
            for row in ROWS[:3]:
                measure(server, row, model_dir, prompt_ids)
        for round_number in range(repeats):
            for tokens, rows in samples.items():
                for row in ROWS:
                    prompt_ids = [rng.randrange(1000, 20000) for _ in range(tokens)]
                    rows.setdefault(row, []).append(measure(server, row, model_dir, prompt_ids))
            print(f"round {round_number + 1} of {repeats} done", file=sys.stderr)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 11")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    args = parser.parse_args()
    with common.demo_model() as model_dir, common.copy_of(model_dir) as warm_copy:
        samples = run(model_dir, warm_copy, repeats=3 if args.quick else 11)
    medians = {
        tokens: {row: common.median(times) for row, times in rows.items()}
        for tokens, rows in samples.items()
    }
    short, long = medians[32], medians[512]
    common.write_report(
        "coldstart",
        seed=SEED,
        rows=[
            {"prompt_tokens": tokens, "row": row, **common.spread(times)}
            for tokens, rows in samples.items()
            for row, times in rows.items()
        ],
        ratios={
            "fresh_process_over_dram_hit": short["fresh process"] / short["dram"],
            "fresh_process_over_disk": short["fresh process"] / short["disk, cold"],
            "warm_over_dram_hit": short["warm"] / short["dram"],
            "warm_over_dram_hit_512": long["warm"] / long["dram"],
        },
        values={},
        aims={
            "fresh_process_over_dram_hit": 15.0,
            "warm_over_dram_hit": 1 / 1.5,
            "warm_over_dram_hit_512": 1 / 1.15,
        },
        notes=__doc__,
        json_file=args.json,
    )


if __name__ == "__main__":
    main()
