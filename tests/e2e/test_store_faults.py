"""Bytes that are damaged, and stores and disks that fail, seen by who asks the whole server."""

from __future__ import annotations

import dataclasses
import json
import mmap
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.e2e import remote
from tests.e2e.harness import Server, eventually
from tests.integration.store.transit import (
    Fault,
    Reply,
    Transit,
    busy,
    cut,
    flip,
    once_each,
    without_md5,
)

from flashserve.store.checkpoint.listing import CHUNK_BYTES

MODEL = "remote"


@dataclasses.dataclass(frozen=True, slots=True)
class Bench:
    """A server with the model deployed and cold, its store, and what it answers when all is well.

    MODEL is where that store says it is; nothing of it is in DRAM or on disk.
    """

    server: Server
    transit: Transit
    weights: Path
    answer: remote.Answer

    def new_log(self, since: str) -> str:
        return self.server.log().removeprefix(since)


@pytest.fixture(scope="module")
def transit(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Transit, Path]]:
    root = tmp_path_factory.mktemp("store")
    weights = remote.write_bucket(root / "buckets")
    with remote.passing(root / "buckets", root / "log") as transit:
        yield transit, weights


@pytest.fixture(scope="module")
def whole_bench(transit: tuple[Transit, Path]) -> Iterator[Bench]:
    proxy, weights = transit
    with remote.serving() as server:
        server.deploy("local", weights.parent)
        answer = remote.answer(server, "local")
        server.succeed("delete", "local")
        server.deploy(MODEL, remote.SOURCE)
        yield Bench(server, proxy, weights, answer)
        remote.make_cold(server, MODEL)
        assert server.stop() == 0, server.log()
        assert "Traceback" not in server.log()
        assert remote.fsck(server)["is_clean"]


@pytest.fixture
def bench(whole_bench: Bench) -> Bench:
    remote.make_cold(whole_bench.server, MODEL)
    return whole_bench


def damage(path: Path, *positions: int) -> None:
    """Flips a bit at each position; size and times stay what they were."""
    with path.open("r+b") as file:
        for position in positions:
            file.seek(position)
            byte = file.read(1)[0]
            file.seek(position)
            file.write(bytes([byte ^ 0x40]))


def test_bits_that_flipped_on_disk_are_fetched_again_and_named(bench: Bench) -> None:
    server, size = bench.server, bench.weights.stat().st_size
    assert remote.answer(server, MODEL) == bench.answer
    stored = remote.await_disk(server, MODEL)
    remote.make_cold(server, MODEL, "dram")
    assert stored.read_bytes() == bench.weights.read_bytes()
    damage(stored, 1_000_001, 2 * CHUNK_BYTES + 5, size - 1)
    before, num_asked = server.log(), len(bench.transit.positions)
    assert remote.ps(server, MODEL)["tier"] == "disk"
    assert remote.answer(server, MODEL) == bench.answer
    damaged = [(0, CHUNK_BYTES), (2 * CHUNK_BYTES, 3 * CHUNK_BYTES), (4 * CHUNK_BYTES, size)]
    for begin, end in damaged:
        line = f"{stored} is damaged between its bytes {begin} and {end}; they are fetched again"
        assert line in bench.new_log(before)
    asked = {position // CHUNK_BYTES for position in bench.transit.positions[num_asked:]}
    assert asked == {0, 2, 4}
    eventually(lambda: stored.read_bytes() == bench.weights.read_bytes(), "it is mended on disk")


def test_bits_that_flip_in_transit_are_never_served(bench: Bench) -> None:
    before = bench.server.log()
    with bench.transit.harming(weights=once_each(*[flip(500_001, 3 * CHUNK_BYTES - 1)] * 5)):
        assert remote.answer(bench.server, MODEL) == bench.answer
    assert "model.safetensors was damaged on its way here: its md5" in bench.new_log(before)
    assert remote.await_disk(bench.server, MODEL).read_bytes() == bench.weights.read_bytes()


def test_a_transfer_that_always_harms_is_refused_until_it_does_not(bench: Bench) -> None:
    with bench.transit.harming(weights=flip(CHUNK_BYTES)):
        error = remote.refused(remote.complete(bench.server, MODEL))
    assert "model.safetensors is damaged on its way here, twice" in error["message"]
    assert remote.answer(bench.server, MODEL) == bench.answer


def test_without_a_promise_damage_on_disk_and_in_transit_is_an_error(bench: Bench) -> None:
    """The store promises nothing, so that the checksums of the first read are all there is."""
    with bench.transit.harming(weights=without_md5, questions=without_md5):
        assert remote.answer(bench.server, MODEL) == bench.answer
        stored = remote.await_disk(bench.server, MODEL)
        remote.make_cold(bench.server, MODEL, "dram")
        damage(stored, CHUNK_BYTES + 1)

    def both(reply: Reply) -> None:
        without_md5(reply)
        flip(CHUNK_BYTES + 9)(reply)

    with bench.transit.harming(weights=both, questions=without_md5):
        error = remote.refused(remote.complete(bench.server, MODEL))
        assert f"between its bytes {CHUNK_BYTES} and {2 * CHUNK_BYTES}" in error["message"]
        assert "and so are those that were fetched again" in error["message"]
    with bench.transit.harming(weights=without_md5, questions=without_md5):
        assert remote.answer(bench.server, MODEL) == bench.answer


def test_a_store_that_fails_for_a_while_is_asked_again(bench: Bench) -> None:
    faults = cut("stall"), cut("reset"), cut("close"), busy(500), busy(503)
    with bench.transit.harming(weights=once_each(*faults), questions=once_each(busy(503))):
        assert remote.answer(bench.server, MODEL) == bench.answer
    assert remote.await_disk(bench.server, MODEL).read_bytes() == bench.weights.read_bytes()


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (cut("stall"), "cannot be read, tried 3 times: timed out"),
        (busy(503), "answers 503 SlowDown"),
    ],
    ids=["stalls", "503"],
)
def test_a_store_that_fails_for_good_is_named_and_asked_by_the_next_request(
    bench: Bench, fault: Fault, reason: str
) -> None:
    with bench.transit.harming(weights=fault):
        error = remote.refused(remote.complete(bench.server, MODEL))
    assert f"{remote.SOURCE}/model.safetensors" in error["message"]
    assert reason in error["message"]
    checkpoints = bench.server.data_dir / "store" / "checkpoints"
    assert list(checkpoints.iterdir()) == []
    assert remote.answer(bench.server, MODEL) == bench.answer


def test_a_store_that_lists_nothing_is_one_line(bench: Bench) -> None:
    with bench.transit.harming(questions=cut("stall")):
        error = remote.refused(remote.complete(bench.server, MODEL))
    assert "s3://models does not answer" in error["message"]
    assert error["code"] == "source_unavailable"
    assert remote.answer(bench.server, MODEL) == bench.answer


def test_an_object_that_changes_between_its_ranges_is_never_mixed(bench: Bench) -> None:
    def changed(reply: Reply) -> None:
        if reply.first:
            flip(*range(reply.first, reply.first + 1000))(reply)
            reply.headers["Etag"] = '"0123456789abcdef0123456789abcdef"'

    with bench.transit.harming(weights=changed):
        error = remote.refused(remote.complete(bench.server, MODEL))
    assert "model.safetensors changed while it was read" in error["message"]
    assert remote.answer(bench.server, MODEL) == bench.answer


# What may not be deployed


def hostile(checkpoint: Path, directory: Path, weight_map: object) -> Path:
    """The model with an index in place of its weights."""
    directory.mkdir()
    for name in ("config.json", "tokenizer.json"):
        shutil.copy(checkpoint / name, directory / name)
    text = weight_map if isinstance(weight_map, str) else json.dumps({"weight_map": weight_map})
    (directory / "model.safetensors.index.json").write_text(text)
    return directory


TWICE = '{"weight_map": {"a": "one.safetensors", "a": "../two.safetensors"}}'


@pytest.mark.parametrize(
    ("weight_map", "reason"),
    [
        ({"w": "../model.safetensors"}, "../model.safetensors"),
        ({"w": "/etc/passwd"}, "/etc/passwd"),
        ({"w": "link.safetensors"}, "link.safetensors"),
        ({"w": "missing.safetensors"}, "missing.safetensors"),
        ({"w": "a" * 5000}, "index.json"),
        ({}, "index.json"),
        ("{not json", "index.json"),
        (TWICE, "index.json"),
        ("[" * 100_000, "index.json"),
    ],
    ids=["climbs", "absolute", "link", "missing", "long", "empty", "no-json", "twice", "deep"],
)
def test_a_hostile_index_is_refused_by_the_api(
    bench: Bench, tmp_path: Path, weight_map: object, reason: str
) -> None:
    directory = hostile(bench.weights.parent, tmp_path / "bad", weight_map)
    (directory / "link.safetensors").symlink_to(bench.weights)
    with bench.server.admin() as admin:
        reply = admin.post("/admin/v1/models", json={"name": "bad", "source": str(directory)})
    error = remote.refused(reply)
    assert reply.status_code == 422
    assert reason in error["message"]
    assert len(error["message"]) < 1000
    assert "bad" not in bench.server.models()


def header(**changes: object) -> bytes:
    described = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}
    encoded = json.dumps({"w": described}).encode()
    return struct.pack("<Q", len(encoded)) + encoded + bytes(8)


@pytest.mark.parametrize(
    "data",
    [
        struct.pack("<Q", 1 << 63) + b"{}",
        header(dtype="F33"),
        header(data_offsets=[-8, 0]),
        header(data_offsets=[0, 1 << 63]),
        header(shape=[-2]),
        header(shape=[1 << 40, 1 << 40]),
    ],
    ids=["endless", "dtype", "negative", "far", "negative-shape", "huge-shape"],
)
def test_a_hostile_header_is_refused_by_the_api(bench: Bench, tmp_path: Path, data: bytes) -> None:
    directory = hostile(bench.weights.parent, tmp_path / "bad", {"w": "x.safetensors"})
    (directory / "model.safetensors").write_bytes(data)
    with bench.server.admin() as admin:
        reply = admin.post("/admin/v1/models", json={"name": "bad", "source": str(directory)})
    assert reply.status_code == 422
    assert "model.safetensors" in remote.refused(reply)["message"]
    assert "bad" not in bench.server.models()


def test_a_key_that_climbs_is_refused_by_the_command(bench: Bench) -> None:
    def climb(reply: Reply) -> None:
        reply.body[:] = reply.body.replace(b"tiny/config.json", b"tiny/../config.json")
        reply.length = str(len(reply.body))

    with bench.transit.harming(questions=climb):
        done = bench.server.cli("deploy", "bad", remote.SOURCE)
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert error.startswith("flashserve: error: ")
    assert "which leads out of it" in error
    assert "bad" not in bench.server.models()


def test_a_model_larger_than_the_arena_is_refused_with_the_sizes(
    bench: Bench, tmp_path: Path
) -> None:
    """Its weights are a hole in a file: nothing of it may be read."""
    directory = hostile(bench.weights.parent, tmp_path / "large", {"w": "unused.safetensors"})
    num_bytes = 1 << 30
    encoded = json.dumps(
        {"w": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}
    ).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(encoded)) + encoded)
        file.truncate(file.tell() + num_bytes)
    done = bench.server.cli("deploy", "large", str(directory))
    assert done.returncode == 1
    error = done.stderr.splitlines()[-1]
    assert f"holds {(directory / 'model.safetensors').stat().st_size} bytes" in error
    assert str(96 * remote.MIB) in error
    assert "node.dram_bytes" in error


# Other users of the machine

INTRUDER = """
import ctypes, json, os, socket, sys

data_dir, *pids = sys.argv[1:]
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
assert ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0
found = {"data_dir": os.listdir(data_dir) != []}
for name in ("store.sock", "flashserve.sock"):
    try:
        socket.socket(socket.AF_UNIX).connect(f"{data_dir}/run/{name}")
        found[name] = True
    except PermissionError:
        found[name] = False
for pid in pids:
    try:
        found[pid] = os.listdir(f"/proc/{pid}/fd") != []
    except PermissionError:
        found[pid] = False
print(json.dumps(found))
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_another_user_reaches_neither_the_sockets_nor_the_memory(bench: Bench) -> None:
    """The data directory is made open to all here, so that what protects is what is in it."""
    data_dir = bench.server.data_dir
    assert remote.answer(bench.server, MODEL) == bench.answer
    pids = [str(bench.server.pid), *(str(worker.pid) for worker in bench.server.workers())]
    data_dir.chmod(0o755)
    try:
        done = subprocess.run(
            [sys.executable, "-c", INTRUDER, str(data_dir), *pids],
            capture_output=True,
            text=True,
            check=True,
        )
    finally:
        data_dir.chmod(0o700)
    found = json.loads(done.stdout)
    assert found.pop("data_dir"), "it could not even look into the directory"
    assert len(found) == 4
    assert not any(found.values()), found


def test_nobody_writes_the_arena_through_a_worker_s_descriptor(bench: Bench) -> None:
    assert remote.answer(bench.server, MODEL) == bench.answer
    (worker,) = bench.server.workers()
    (arena,) = (
        entry
        for entry in Path(f"/proc/{worker.pid}/fd").iterdir()
        if str(entry.readlink()).startswith("/memfd:")
    )
    opened = os.open(arena, os.O_RDWR)
    try:
        with pytest.raises(PermissionError):
            os.pwrite(opened, b"harm", 0)
        with pytest.raises(PermissionError):
            mmap.mmap(opened, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_WRITE)
        with pytest.raises(PermissionError):
            os.ftruncate(opened, 0)
        mmap.mmap(opened, mmap.PAGESIZE, mmap.MAP_SHARED, mmap.PROT_READ).close()
    finally:
        os.close(opened)
