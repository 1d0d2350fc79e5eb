"""What a running server shows about loads: first tokens while bytes still come, and its memory."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import random
import re
import time
from collections.abc import Callable, Iterator

import checkpoint
import pagecache
from server import Server, deploy, running_server, stream_completion, wait_for_state

SEED = 20261124
RATES = (1_000_000_000, 4_000_000_000)
PROMPT_TOKENS = 128
_POLL_S = 0.01
_KEEP_ALIVE_S = 1.0
_SETTLE_S = 1.5
_LEAST_SHARE = 0.8
"""Of the time that the cap prescribes: the limit lets a little through at once."""
_SMALL_KV = "16MiB"


@dataclasses.dataclass(frozen=True, slots=True)
class Overlap:
    """Seconds over HTTP with reading from disk capped at `rate` bytes per second.

    ttft_s: to the first token of a request to a model on disk; load_s: to bring the model to DRAM
    alone; prefill_s: to the first token of such a request to a ready replica.
    """

    rate: int
    ttft_s: float
    load_s: float
    prefill_s: float


@contextlib.contextmanager
def node_with(directory: pathlib.Path, arena_bytes: int) -> Iterator[dict[str, str]]:
    """A node that has the checkpoint in DRAM; yields the environment in which it is found."""
    with running_server(
        NODE__NUM_WORKERS="1",
        NODE__DRAM_BYTES=str(arena_bytes),
        NODE__ADAPTER_BYTES="0",
        STORE__SCRUB_BYTES_PER_S="0",
    ) as server:
        deploy(server, "bench", directory, keep_alive_s=0)
        _order(server, "stage", "dram")
        wait_for_state(server, "bench", "cold", "dram")
        yield {"FLASHSERVE_DATA_DIR": server.data_dir}


def measure_overlap(
    directory: pathlib.Path, arena_bytes: int, repeats: int, progress: Callable[[str], None]
) -> list[Overlap]:
    """The files are in the page cache, so that the cap is what limits reading."""
    rng = random.Random(SEED)
    num_bytes = sum(file.stat().st_size for file in directory.iterdir())
    found = []
    for rate in RATES:
        with running_server(
            NODE__DRAM_BYTES=str(arena_bytes),
            NODE__ADAPTER_BYTES="0",
            STORE__DISK_BYTES_PER_S=str(rate),
            STORE__SCRUB_BYTES_PER_S="0",
        ) as server:
            deploy(server, "bench", directory, keep_alive_s=_KEEP_ALIVE_S)
            pagecache.fill(directory)
            for number in range(repeats + 1):  # the first is not counted
                overlap = _measure_once(server, rate, rng)
                if overlap.load_s < _LEAST_SHARE * num_bytes / rate:
                    raise SystemExit(f"reading was not capped at {rate} bytes/s: {overlap}")
                if number:
                    found.append(overlap)
                    progress(f"  {overlap}")
    return found


def _measure_once(server: Server, rate: int, rng: random.Random) -> Overlap:
    _evict(server)
    began = time.monotonic()
    _order(server, "stage", "dram")
    wait_for_state(server, "bench", "cold", "dram", _POLL_S)
    load_s = time.monotonic() - began
    _evict(server)
    ttft_s, receipt = stream_completion(server, "bench", _prompt(rng), max_tokens=2)
    if receipt["tier"] != "disk":
        raise SystemExit(f"the receipt says {receipt['tier']}, not disk")
    prefill_s, _ = stream_completion(server, "bench", _prompt(rng), max_tokens=2)
    wait_for_state(server, "bench", "cold", "dram")
    return Overlap(rate, ttft_s, load_s, prefill_s)


def measure_replica_memory(
    directory: pathlib.Path, arena_bytes: int, repeats: int, progress: Callable[[str], None]
) -> list[int]:
    """What a second replica of the same checkpoint adds to the PSS of the node's processes.

    A spare worker becomes that replica, so this is its PSS above an idle one, with KV as small as
    it may be. Both replicas have computed. Each repeat has a server of its own, because a worker
    that had a replica once does not give all of its heap back.
    """
    rng = random.Random(SEED)
    found = []
    for _ in range(repeats):
        with running_server(
            NODE__NUM_WORKERS="3",
            NODE__DRAM_BYTES=str(arena_bytes),
            NODE__ADAPTER_BYTES="0",
            STORE__SCRUB_BYTES_PER_S="0",
            ENGINE__KV_BYTES=_SMALL_KV,
        ) as server:
            before = 0
            for name in ("bench", "again"):
                deploy(server, name, directory, keep_alive_s=3600)
                time.sleep(_SETTLE_S)
                before = node_pss(server.pid)
                stream_completion(server, name, _prompt(rng)[:8], max_tokens=2)
                time.sleep(_SETTLE_S)  # spare workers walk through what has come
            found.append(node_pss(server.pid) - before)
            progress(f"  a second replica takes {found[-1] / 1e6:.1f} MB")
    return found


def node_pss(pid: int) -> int:
    """Bytes of the process and its children; what they share counts once."""
    total = 0
    for process in (pid, *_children(pid)):
        rollup = pathlib.Path(f"/proc/{process}/smaps_rollup").read_text()
        match = re.search(r"^Pss:\s+(\d+) kB", rollup, re.MULTILINE)
        assert match is not None
        total += int(match[1]) << 10
    return total


def _children(pid: int) -> list[int]:
    tasks = pathlib.Path(f"/proc/{pid}/task").iterdir()
    return [int(child) for task in tasks for child in (task / "children").read_text().split()]


def _order(server: Server, action: str, tier: str) -> None:
    body = {"tier": tier}
    server.admin.post(f"/admin/v1/models/bench/{action}", json=body).raise_for_status()


def _evict(server: Server) -> None:
    _order(server, "evict", "dram")
    wait_for_state(server, "bench", "cold", "disk")


def _prompt(rng: random.Random) -> list[int]:
    return [rng.randrange(2, checkpoint.VOCAB_TOKENS) for _ in range(PROMPT_TOKENS)]
