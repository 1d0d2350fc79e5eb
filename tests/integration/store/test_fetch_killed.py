"""A process that fetches from an object store and is killed at any moment, again and again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from tests.integration.store import objectstore
from tests.integration.store.transit import Transit

from flashserve.config import StoreSettings
from flashserve.store.checkpoint.listing import CHUNK_BYTES
from flashserve.store.disk.fsck import fsck
from flashserve.store.disk.tier import DiskTier
from flashserve.store.sources.source import open_source
from flashserve.store.store import Store
from flashserve.types import ModelId, ModelSpec, Tier

pytestmark = pytest.mark.integration

MIB = 1 << 20
URI = "s3://models/m"
SPEC = ModelSpec(ModelId("m"), URI, 0, Tier.REMOTE)
SHARDS = {f"model-0000{n}-of-00002.safetensors": f"w{n}" for n in (1, 2)}
SETTINGS = StoreSettings(
    scrub_bytes_per_s=0, remote_bytes_per_s=150 * MIB, remote_connections=2, disk_bytes=1 << 30
)
NUM_KILLS_BY_TIME = 4
NUM_KILLS_BY_CALL = 8
CALLS = ("pwrite", "write", "fsync", "rename", "ftruncate", "unlink")
HEADER_BYTES = MIB
"""What finding out the layout may ask for, besides whole chunks."""


@pytest.fixture
def transit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Transit]:
    """What lies before the store that has URI; clients in this environment reach it."""
    directory = tmp_path / "buckets" / "models" / "m"
    directory.mkdir(parents=True)
    draw = np.random.default_rng(0)
    for file, tensor in SHARDS.items():
        data = draw.integers(0, 256, 2 * CHUNK_BYTES + 4321, np.uint8)
        safetensors.numpy.save_file({tensor: data}, directory / file)
    placed = ", ".join(f'"{tensor}": "{file}"' for file, tensor in SHARDS.items())
    (directory / "model.safetensors.index.json").write_text(f'{{"weight_map": {{{placed}}}}}')
    (directory / "config.json").write_text('{"model_type": "llama"}')
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", objectstore.KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", objectstore.SECRET)
    with objectstore.serving(tmp_path / "buckets", tmp_path / "log", "1m") as endpoint:
        between = Transit(endpoint)
        monkeypatch.setenv("AWS_ENDPOINT_URL", between.url)
        with between.running():
            yield between


@pytest.fixture
def kill_a_fetch(tmp_path: Path, transit: Transit) -> Iterator[Callable[[str, float], None]]:
    """Has a process stage URI until it is killed: `("", seconds)` after that time, or at the n-th
    time that it comes to a call of `os`: `(name, n)`. One that is done by then is killed, too.
    """
    starter = subprocess.Popen(
        [sys.executable, "-m", __name__, str(tmp_path / "data")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        cwd=Path(__file__).parents[3],
    )
    assert starter.stdin is not None
    assert starter.stdout is not None
    told, tell = starter.stdout, starter.stdin

    def kill(call: str, when: float) -> None:
        tell.write(f"{call or '-'} {when}\n")
        assert told.readline() == f"{-signal.SIGKILL}\n"

    try:
        yield kill
    finally:
        starter.communicate()


def start_victims(data_dir: Path) -> None:
    """A process that forks a victim for each line that it is told, so that imports happen once."""
    open_source(URI, Path(), SETTINGS).listing()
    for line in sys.stdin:
        call, when = line.split()
        victim = os.fork()
        if not victim:
            fetch_until_killed(data_dir, call, float(when))
        if call == "-":
            time.sleep(float(when))
            os.kill(victim, signal.SIGKILL)
        _, status = os.waitpid(victim, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


def fetch_until_killed(data_dir: Path, call: str, when: float) -> None:
    store = Store(data_dir, 64 * MIB, False, SETTINGS)
    if call != "-":
        die_at(call, int(when))
    store.stage(SPEC, Tier.DRAM)
    store.evict(SPEC.model_id, Tier.DRAM)  # waits for the disk
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(name: str, count: int) -> None:
    """Before or after the call of `os` that comes `count` times, but not in it."""
    function, left = getattr(os, name), [count]

    def counted(*args, **options):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **options)
        if left[0] == 1 and count % 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(os, name, counted)


def verified_bytes(root: Path) -> int:
    """How much of the weights an interrupted fetch left, or all that is on disk."""
    tier = DiskTier(root, 1 << 30)
    try:
        listing = open_source(URI, Path(), SETTINGS).listing()
        files = [file for file in listing.files if file.name in SHARDS]
        if tier.find(listing.identity):
            return sum(file.num_bytes for file in files)
        place = tier.begin(listing)
        return sum(file.chunk_bytes(n) for file in files for n in place.done(file.name))
    finally:
        tier.close()


def assert_clean(root: Path) -> None:
    tier = DiskTier(root, 1 << 30)
    try:
        assert tier.problems == ()
        report = fsck(tier)
        assert report.problems == report.set_aside == ()
        for name in ("incoming", "trash", "quarantine"):
            assert len(list((root / name).iterdir())) == (
                report.num_resumable if name == "incoming" else 0
            )
    finally:
        tier.close()


def test_a_fetch_killed_at_any_moment_goes_on_from_what_is_verified(
    tmp_path: Path, transit: Transit, kill_a_fetch: Callable[[str, float], None]
) -> None:
    root, draw = tmp_path / "data" / "store", random.Random(7)
    kills = [("", draw.uniform(0.02, 0.4)) for _ in range(NUM_KILLS_BY_TIME)]
    kills += [(draw.choice(CALLS), draw.randrange(1, 12)) for _ in range(NUM_KILLS_BY_CALL)]
    draw.shuffle(kills)
    total = sum((tmp_path / "buckets/models/m" / name).stat().st_size for name in SHARDS)
    num_partial = num_bytes = 0
    last = ("pwrite", 6)  # the first is the owner's note, then come chunks
    for call, when in [*kills, last]:
        if num_bytes == total or (call, when) == last:
            evict(root)
        kill_a_fetch(call, when)
        if root.exists():
            assert_clean(root)
            num_bytes = verified_bytes(root)
            num_partial += 0 < num_bytes < total
    assert num_partial >= 3, "the kills hit no fetch"
    assert 0 < num_bytes < total
    transit.num_sent = 0
    store = Store(tmp_path / "data", 64 * MIB, False, SETTINGS)
    try:
        store.stage(SPEC, Tier.DRAM)
        assert transit.num_sent <= total - num_bytes + HEADER_BYTES
        store.evict(SPEC.model_id, Tier.DRAM)
        assert store.tier(SPEC) is Tier.DISK
        directory = store._origins.on_disk(URI).directory
        for name in SHARDS:
            expected = (tmp_path / "buckets/models/m" / name).read_bytes()
            assert (directory / name).read_bytes() == expected
    finally:
        store.close()
    assert_clean(root)
    assert list((tmp_path / "data" / "snapshots").glob(".*")) == []


def evict(root: Path) -> None:
    tier = DiskTier(root, 1 << 30)
    tier.evict(open_source(URI, Path(), SETTINGS).listing().identity)
    tier.close()


if __name__ == "__main__":
    start_victims(Path(sys.argv[1]))
