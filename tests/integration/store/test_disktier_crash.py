"""A fetch that is killed at any moment: the next one goes on, and nothing is left over."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import blake3
import pytest
import xxhash

from flashserve.store.checkpoint import listing
from flashserve.store.checkpoint.listing import Listing, SourceFile
from flashserve.store.disk import checking, chunks, incoming
from flashserve.store.disk.fsck import fsck
from flashserve.store.disk.tier import DiskTier

CHUNK = 16 << 10
BUDGET = 8 << 20
NUM_KILLS = 40
NUM_CHECKPOINTS = 12
SHARED = random.Random(0).randbytes(5 * CHUNK + 17)


def use_small_chunks(patch=setattr) -> None:
    for module in (listing, chunks, incoming, checking):
        patch(module, "CHUNK_BYTES", CHUNK)


def files_of(number: int) -> dict[str, bytes]:
    """One of the checkpoints; some files are the same in all."""
    draw = random.Random(number)
    return {
        "config.json": json.dumps({"number": number}).encode(),
        "model-1.safetensors": draw.randbytes(draw.randrange(1, 20 * CHUNK)),
        "model-2.safetensors": SHARED,
    }


def listing_of(number: int) -> Listing:
    files = tuple(
        SourceFile(name, len(data), f"{number}/{name}") for name, data in files_of(number).items()
    )
    return Listing(f"s3://bucket/{number}", str(number), files)


def fetch(tier: DiskTier, number: int) -> None:
    """Whatever is missing of a checkpoint, in a random order, and its digests."""
    if tier.find(str(number)) is None:
        place = tier.begin(listing_of(number))
        missing = []
        for name, data in files_of(number).items():
            done = place.done(name)
            if name == "config.json":
                place.put(name, data)
            else:
                missing += [(name, i) for i in range(-(-len(data) // CHUNK)) if i not in done]
        random.shuffle(missing)
        for name, index in missing:
            piece = files_of(number)[name][index * CHUNK : (index + 1) * CHUNK]
            place.write_chunk(name, index, memoryview(piece), xxhash.xxh3_64_intdigest(piece))
        place.complete()
    for name, data in files_of(number).items():
        tier.set_digest(str(number), name, blake3.blake3(data).hexdigest())


def fetch_on_and_on(root: Path, seed: int) -> None:
    """The victim: fetches, uses and evicts until it is killed."""
    draw = random.Random(seed)
    tier = DiskTier(root, BUDGET)
    sys.stdout.write(f"{os.getpid()}\n")
    sys.stdout.flush()
    while True:
        number = draw.randrange(NUM_CHECKPOINTS)
        fetch(tier, number)
        tier.remember(f"file {draw.randrange(50)}", tuple(range(number)))
        if draw.random() < 0.3:
            tier.evict(str(draw.randrange(NUM_CHECKPOINTS)))


def start_victims(root: Path) -> None:
    """A process that forks a victim for each seed that it is told, so that imports happen once."""
    use_small_chunks()
    for line in sys.stdin:
        victim = os.fork()
        if not victim:
            fetch_on_and_on(root, int(line))
        _, status = os.waitpid(victim, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


@pytest.fixture
def kill_a_fetch(tmp_path: Path) -> Iterator[Callable[[random.Random], None]]:
    """Starts a victim and kills it after a random time."""
    command = [sys.executable, __file__, str(tmp_path / "store")]
    starter = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    assert starter.stdin is not None
    assert starter.stdout is not None
    told, tell = starter.stdout, starter.stdin
    victims = []

    def kill(draw: random.Random) -> None:
        tell.write(f"{draw.randrange(1 << 30)}\n")
        victims.append(int(told.readline()))
        time.sleep(draw.expovariate(1 / 0.03))
        os.kill(victims.pop(), signal.SIGKILL)
        assert told.readline() == f"{-signal.SIGKILL}\n"

    try:
        yield kill
    finally:
        for victim in victims:
            os.kill(victim, signal.SIGKILL)
        starter.communicate()


def bytes_on_disk(root: Path) -> int:
    """Of the files of checkpoints, each once."""
    inodes = {
        path.stat().st_ino: path.stat().st_size
        for path in root.glob("checkpoints/*/*")
        if not path.name.startswith(".")
    }
    return sum(inodes.values())


def stray_names(root: Path, tier: DiskTier) -> set[str]:
    """Everything below the root that no whole checkpoint accounts for."""
    expected = {str(path) for stored in tier.checkpoints() for path in own_paths(root, stored)}
    found = {str(path) for path in root.rglob("*") if path.is_file()}
    return found - expected - {str(path) for path in root.glob("known/*")} - {str(root / "lock")}


def own_paths(root: Path, stored) -> list[Path]:
    blobs = [root / "blobs" / digest for digest in stored.digests.values()]
    files = [stored.directory / name for name in (".manifest.json", *stored.checksums)]
    return [*files, *blobs]


def test_a_fetch_killed_at_any_moment_goes_on_and_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kill_a_fetch: Callable[[random.Random], None],
) -> None:
    use_small_chunks(monkeypatch.setattr)
    root = tmp_path / "store"
    draw = random.Random(20)
    num_resumed = 0
    for _ in range(NUM_KILLS):
        kill_a_fetch(draw)
        tier = DiskTier(root, BUDGET)
        try:
            assert tier.problems == ()
            num_resumed += any((root / "incoming").iterdir())
            for stored in tier.checkpoints():
                assert_is_whole(stored)
            assert tier.usage().used + tier.usage().free == BUDGET
            report = fsck(tier)
            assert report.problems == ()
        finally:
            tier.close()
    assert num_resumed > NUM_KILLS // 10, "the kills hit no fetch"
    tier = DiskTier(root, BUDGET)
    for number in range(NUM_CHECKPOINTS):
        fetch(tier, number)
        assert_is_whole(tier.find(str(number)))
    assert len(tier.checkpoints()) == NUM_CHECKPOINTS
    assert fsck(tier).is_clean
    assert tier.usage().used == bytes_on_disk(root)
    assert stray_names(root, tier) == set()
    shared = {(each.directory / "model-2.safetensors").stat().st_ino for each in tier.checkpoints()}
    assert len(shared) == 1
    for number in range(NUM_CHECKPOINTS):
        tier.evict(str(number))
    assert tier.usage().used == 0
    assert stray_names(root, tier) == set()
    tier.close()


def assert_is_whole(stored) -> None:
    files = files_of(int(stored.listing.identity))
    assert {name: (stored.directory / name).read_bytes() for name in files} == files


if __name__ == "__main__":
    start_victims(Path(sys.argv[1]))
