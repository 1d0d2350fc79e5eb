"""How long until a checkpoint's bytes are where a model can compute from them?

A random bf16 Llama checkpoint of 2.47 GB (--quick: 0.49 GB) is made from a seed, once as one file
and once as four shards, on the disk that TMPDIR names, and is removed at the end.

Clock: every load has a process of its own, forked from one that has imported torch and
transformers and run a forward; its other imports, clients and empty modules are made before the
clock starts.
  resident      from the word "go" to every byte resident in memory. Who maps files lazily is made
                to touch every page. All tensors are hashed afterwards, and compared with what the
                generator wrote.
  first token   goes on to the first token after 8, through transformers on all cores.
  served        over HTTP, from the request's sending; reading from disk is capped.
Caches: "disk, cold" means fsync and posix_fadvise(DONTNEED) on every file after the process is
ready, checked with mincore. "S3" is `rclone serve s3` on the same cores over loopback, its files in
the page cache; what a client downloads to disk stays in the page cache. "DRAM" means that a node
has the bytes in its arena and a worker has mapped it. Arena and copy buffers are pre-faulted, as a
node has them, where a row does not say otherwise.
Memory: MB of the loading process, at "go" (idle), at most until all is resident (peak), and then
(PSS). FlashServe's rows include the arena; s5cmd's own process is not in its row. tensorizer and
torch.load read files that were written beforehand.
Every round has all rows once, those from a cold disk twice, in an order of its own: what a row
leaves behind in the disk, and in whatever lies behind that, is to help or harm all others alike. A
peer that does not install, import or work is a row that says why.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pathlib
import random
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import checkpoint
import common
import measured
import objectstore
import pagecache
import served
from checkpoint import Shape
from flashserve.store.store import Store
from flashserve.types import ModelId, ModelSpec, Tier
from measured import LoadFailedError, Nursery, Samples
from served import Overlap
from stores import open_store

SEED = 20261124
COLD, DRAM, S3 = "disk, cold", "DRAM", "S3"
NUM_SHARDS = 4
TIMES_PER_ROUND = {COLD: 2, DRAM: 1, S3: 1}
MEMORY = ("idle_rss", "peak_rss", "pss")


@dataclasses.dataclass(frozen=True, slots=True, eq=False)
class Row:
    """One line of the tables. loader: its name in peers/nursery.py; layout: of the files."""

    name: str
    loader: str
    start: str
    layout: str = "single"
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_peer: bool = True


BOTO3 = Row("boto3 download_file, from_pretrained", "boto3_download", S3)
S5CMD = Row("s5cmd cp, from_pretrained", "s5cmd_copy", S3)
RANGES = Row("4 threads of 16 MiB ranges", "range_parallel", S3)
RAW = Row("raw O_DIRECT, 8 threads of 8 MiB", "raw_o_direct", COLD, is_peer=False)
OUR_DRAM = Row("flashserve: bound", "dram_ready", DRAM, is_peer=False)
OUR_COPIES = tuple(
    Row(f"flashserve: copied, {n} thread{'s'[: n - 1]}", "dram_copy", DRAM, options={"threads": n},
        is_peer=False)
    for n in (1, 2)
)  # fmt: skip
OUR_DISK = Row("flashserve", "from_source", COLD, options={"prefault": True}, is_peer=False)
OUR_FRESH_DISK = Row(
    "flashserve, arena not pre-faulted", "from_source", COLD, options={"prefault": False},
    is_peer=False,
)  # fmt: skip
OUR_S3 = Row("flashserve", "from_source", S3, options={"prefault": True}, is_peer=False)
ROWS = (
    Row("safetensors load_file", "safetensors_load_file", COLD),
    Row("safetensors load_file, clone", "safetensors_clone", COLD),
    Row("transformers from_pretrained", "from_pretrained", COLD),
    Row("transformers from_pretrained", "from_pretrained", COLD, "sharded"),
    Row("torch.load(mmap=True)", "torch_load_mmap", COLD, "torch"),
    Row("runai-model-streamer", "runai_streamer", COLD),
    Row("fastsafetensors (nogds)", "fastsafetensors", COLD),
    Row("tensorizer", "tensorizer", COLD, "tensorizer"),
    RAW,
    OUR_DISK,
    dataclasses.replace(OUR_DISK, layout="sharded"),
    OUR_FRESH_DISK,
    OUR_DRAM,
    *OUR_COPIES,
    Row("flashserve.load_model, from a node", "load_model", DRAM, is_peer=False),
    BOTO3,
    S5CMD,
    Row("runai-model-streamer", "runai_s3", S3),
    RANGES,
    OUR_S3,
)


@dataclasses.dataclass(slots=True)
class Bench:
    """A checkpoint in all its forms, and who serves it.

    prepared: why a form could not be written, by layout.
    """

    root: pathlib.Path
    shape: Shape
    digests: dict[str, str]
    store: Store
    env: dict[str, str]
    prepared: dict[str, str] = dataclasses.field(default_factory=dict)

    def path(self, layout: str) -> pathlib.Path:
        return self.root / "models" / layout

    def job(self, row: Row) -> dict[str, Any]:
        """The fields of peers.job.Job, but for `scratch`."""
        options = dict(row.options)
        path = f"models/{row.layout}" if row.start == S3 else str(self.path(row.layout))
        source = f"s3://{path}" if row.start == S3 else path
        if row.loader == "from_source":
            files = self.path(row.layout).iterdir()
            options |= {"source": source, "image_bytes": sum(file.stat().st_size for file in files)}
        elif row.loader.startswith("dram"):
            lease = self.store.lease(ModelId("bench"))
            options |= {
                "arena_fd": self.store.arena.fd,
                "arena_bytes": self.store.arena.num_bytes,
                "tensors": [dataclasses.astuple(tensor) for tensor in lease.tensors],
            }
            lease.release()  # nothing else is ever allocated there
        elif row.loader == "load_model":
            options |= {"source": source}
        return {
            "loader": row.loader,
            "path": path,
            "config": self.shape.config,
            "digests": self.digests,
            "env": self.env,
            "options": options,
        }

    def set_caches(self, row: Row) -> None:
        os.sync()  # what the row before wrote is not to be written during this one
        if row.start == COLD:
            pagecache.drop(self.path(row.layout))
        elif row.start == S3:
            pagecache.fill(self.path(row.layout))


def make_checkpoints(root: pathlib.Path, shape: Shape) -> dict[str, str]:
    models = root / "models"
    digests = checkpoint.write(models / "single", shape, SEED)
    again = checkpoint.write(models / "sharded", shape, SEED, NUM_SHARDS)
    assert digests == again
    return digests


def stage(store: Store, directory: pathlib.Path) -> None:
    """Brings the checkpoint into DRAM, as a node has done before a DRAM hit."""
    size = sum(file.stat().st_size for file in directory.iterdir())
    store.stage(ModelSpec(ModelId("bench"), str(directory), size), Tier.DRAM)


def prepare_forms(bench: Bench, nursery: Nursery) -> None:
    """Writes the checkpoint as torch.save and as tensorizer keep it."""
    for layout in ("torch", "tensorizer"):
        job = bench.job(Row("", f"save_for_{layout}", COLD))
        job["options"]["target"] = str(bench.path(layout))
        try:
            nursery.measure(job)
        except LoadFailedError as error:
            bench.prepared[layout] = str(error)


def measure_rows(
    bench: Bench, nursery: Nursery, rows: Iterable[Row], repeats: int
) -> dict[Row, Samples]:
    samples = {row: Samples() for row in rows}
    rng = random.Random(SEED)
    for number in range(repeats):
        for row in round_of(samples, rng):
            found = samples[row]
            if found.failures:
                continue  # it would fail again
            try:
                if reason := bench.prepared.get(row.layout):
                    raise LoadFailedError(reason)
                result = nursery.measure(bench.job(row), lambda row=row: bench.set_caches(row))
            except LoadFailedError as error:
                found.failures.append(str(error))
                progress(f"  {row.start}: {row.name}: failed: {error}")
            else:
                found.results.append(result)
                progress(f"  {row.start}: {row.name}: {result['resident_s']:.3f} s")
        progress(f"round {number + 1} of {repeats} done")
    tokens = {result["token"] for found in samples.values() for result in found.results
              if "token" in result}  # fmt: skip
    if len(tokens) > 1:
        raise SystemExit(f"the loaders' first tokens differ: {sorted(tokens)}")
    return samples


def round_of(rows: Iterable[Row], rng: random.Random) -> list[Row]:
    """The rows as often as a round has them, in any order."""
    found = [row for row in rows for _ in range(TIMES_PER_ROUND[row.start])]
    rng.shuffle(found)
    return found


def table(name: str, key: str, samples: Mapping[Row, Samples], num_bytes: int) -> list[dict]:
    """The rows that have this measurement; failed ones stay, with the reason."""
    lines = []
    for row, found in samples.items():
        times = found.of(key)
        if not times and not found.failures:
            continue
        failure = found.failures[0] if found.failures else "ok"
        lines.append(
            {
                **_line(name, row.start, row.name, times),
                "files": NUM_SHARDS if row.layout == "sharded" else 1,
                "gb_per_s": num_bytes / common.median(times) / 1e9 if times else "-",
                **{f"{part}_mb": _megabytes(found, part) for part in MEMORY},
                "status": failure,
            }
        )
    return lines


def overlap_rows(overlaps: Sequence[Overlap]) -> list[dict]:
    """Times to first token of the served model, and the two bounds on it, at each rate."""
    lines = []
    for rate in served.RATES:
        found = [each for each in overlaps if each.rate == rate]
        start = f"disk at {rate / 1e9:.0f} GB/s"
        for name, key in (
            ("execute while loading", "ttft_s"),
            ("load alone", "load_s"),
            ("warm prefill alone", "prefill_s"),
        ):
            times = [getattr(each, key) for each in found]
            if times:
                unknown = dict.fromkeys(("gb_per_s", *(f"{part}_mb" for part in MEMORY)), "-")
                line = _line(f"served, {served.PROMPT_TOKENS} tokens", start, name, times)
                lines.append({**line, "files": 1, **unknown, "status": "ok"})
    return lines


def _line(table_name: str, start: str, name: str, times: Sequence[float]) -> dict:
    spread = common.spread(times) if times else dict.fromkeys(("median", "low", "high"), "-")
    return {
        "table": table_name,
        "from": start,
        "loader": name,
        **{part: spread[part] for part in ("median", "low", "high")},
        "repeats": len(times),
    }


def _megabytes(found: Samples, key: str) -> float | str:
    return round(common.median(found.of(key)) / 1e6) if found.results else "-"


def ratios(samples: Mapping[Row, Samples]) -> dict[str, float]:
    """Those whose rows all worked."""
    seconds = {
        row: common.median(found.of("resident_s"))
        for row, found in samples.items()
        if found.results and not found.failures
    }
    disk_peers = [s for row, s in seconds.items() if row.is_peer and row.start == COLD]
    peer = min(disk_peers, default=None)
    copy = min((seconds[row] for row in OUR_COPIES if row in seconds), default=None)
    found: dict[str, tuple[float | None, float | None]] = {
        "s3_client_over_dram_ready": (seconds.get(BOTO3), seconds.get(OUR_DRAM)),
        "s3_client_over_dram_copy": (seconds.get(BOTO3), copy),
        "range_client_over_dram_ready": (seconds.get(RANGES), seconds.get(OUR_DRAM)),
        "range_client_over_dram_copy": (seconds.get(RANGES), copy),
        "best_disk_peer_over_dram": (peer, seconds.get(OUR_DRAM)),
        "best_disk_peer_over_disk": (peer, seconds.get(OUR_DISK)),
        "s3_client_over_s3": (seconds.get(BOTO3), seconds.get(OUR_S3)),
        "s5cmd_over_s3": (seconds.get(S5CMD), seconds.get(OUR_S3)),
    }
    return {name: theirs / our for name, (theirs, our) in found.items() if theirs and our}


AIMS = {
    "s3_client_over_dram_ready": 100.0,
    "best_disk_peer_over_dram": 10.0,
    "best_disk_peer_over_disk": 1.0,
    "s3_client_over_s3": 3.0,
    "s5cmd_over_s3": 1.0,
}


def values(samples: Mapping[Row, Samples], num_bytes: int) -> dict[str, dict[str, Any]]:
    """What the rows that worked say besides ratios to others."""
    entries: dict[str, dict[str, Any]] = {}
    shares = [
        common.median(memcpy_s / copy_s for memcpy_s, copy_s in zip(*pair, strict=True))
        for row in OUR_COPIES
        if all(pair := (samples[row].of("memcpy_s"), samples[row].of("copy_s")))
    ]
    if shares:
        entries["dram_copy_over_memcpy"] = common.value(
            min(shares), "of the memcpy rate", better="higher", aim=0.85
        )
    raw, disk = (samples[row].of("resident_s") for row in (RAW, OUR_DISK))
    if raw and disk:
        entries["disk_over_raw_odirect"] = common.value(
            common.median(raw) / common.median(disk), "of the raw rate", better="higher", aim=0.85
        )
    if fresh := samples[OUR_FRESH_DISK].results:
        beyond = [each["peak_rss"] - each["idle_rss"] - num_bytes for each in fresh]
        entries["load_memory_beyond_checkpoint"] = common.value(
            max(beyond) / 2**20, "MiB", better="lower", aim=256
        )
    return entries


def served_values(
    overlaps: Sequence[Overlap], replica_bytes: Sequence[int], num_bytes: int
) -> dict[str, dict[str, Any]]:
    """overlap_over_bound is the worst of the rates."""
    by_rate = {rate: [each for each in overlaps if each.rate == rate] for rate in served.RATES}
    over_bound = {
        rate: common.median(each.ttft_s for each in found)
        / max(common.median(each.load_s for each in found),
              common.median(each.prefill_s for each in found))
        for rate, found in by_rate.items() if found
    }  # fmt: skip
    entries = {
        f"overlap_over_bound_{rate / 1e9:.0f}_gb_per_s": common.value(
            found, "of max(load, prefill)", better="lower", aim=1.1
        )
        for rate, found in over_bound.items()
    }
    if over_bound:
        entries["overlap_over_bound"] = common.value(
            max(over_bound.values()), "of max(load, prefill)", better="lower", aim=1.1
        )
    if replica_bytes:
        entries["replica_extra_memory"] = common.value(
            common.median(replica_bytes) / num_bytes, "of the checkpoint", better="lower", aim=0.05
        )
    return entries


def progress(line: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {line}", file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="0.49 GB and 3 rounds, not 5")
    parser.add_argument("--repeats", type=int, help="rounds")
    parser.add_argument("--json", metavar="FILE", help="write the report there")
    args = parser.parse_args()
    shape = checkpoint.QUICK if args.quick else checkpoint.FULL
    repeats = args.repeats or (3 if args.quick else 5)
    with tempfile.TemporaryDirectory(prefix="fs-loader-") as directory:
        root = pathlib.Path(directory)
        pagecache.refuse_tmpfs(root)
        report(run(root, shape, repeats), shape, args.json)


@dataclasses.dataclass(frozen=True, slots=True)
class Findings:
    samples: dict[Row, Samples]
    overlaps: list[Overlap]
    replica_bytes: list[int]


def run(root: pathlib.Path, shape: Shape, repeats: int) -> Findings:
    progress(f"writing {shape.num_bytes / 1e9:.2f} GB twice")
    digests = make_checkpoints(root, shape)
    single = root / "models" / "single"
    arena_bytes = shape.num_bytes + (64 << 20)
    store = open_store(root / "data", arena_bytes, prefault=True)
    try:
        stage(store, single)
        with (
            objectstore.serve(root) as s3_env,
            served.node_with(single, arena_bytes) as node_env,
            measured.nursery(root, [store.arena.fd]) as nursery,
        ):
            bench = Bench(root, shape, digests, store, {**s3_env, **node_env})
            prepare_forms(bench, nursery)
            samples = measure_rows(bench, nursery, ROWS, repeats)
    finally:
        store.close()
    overlaps = served.measure_overlap(single, arena_bytes, repeats, progress)
    replica_bytes = served.measure_replica_memory(single, arena_bytes, min(repeats, 3), progress)
    return Findings(samples, overlaps, replica_bytes)


def report(findings: Findings, shape: Shape, json_file: str | None) -> None:
    samples, size = findings.samples, shape.num_bytes
    rows = table("resident", "resident_s", samples, size)
    rows += table("first token", "first_token_s", samples, size)
    common.write_report(
        "loader",
        seed=SEED,
        rows=rows + overlap_rows(findings.overlaps),
        ratios=ratios(samples),
        values=values(samples, size)
        | served_values(findings.overlaps, findings.replica_bytes, size),
        aims=AIMS,
        notes=f"{__doc__}\ncheckpoint: {size / 1e9:.2f} GB in {len(list(shape.tensors()))} tensors",
        json_file=json_file,
    )


if __name__ == "__main__":
    main()
