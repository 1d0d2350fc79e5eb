"""kill -9 at any moment of a fetch, and disks without room: the next start works."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest
from tests.e2e import remote
from tests.e2e.harness import Server, eventually, scratch_dir
from tests.integration.store.transit import Reply, Transit

from flashserve.store.checkpoint.listing import CHUNK_BYTES
from flashserve.store.disk.fsck import FsckReport, fsck
from flashserve.store.disk.tier import DiskTier

MODEL = "remote"
NUM_KILLS = 3
PATIENT = {"STORE__REMOTE_TIMEOUT_S": "30"}  # nobody asks twice while a gate is shut


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Transit, Path]]:
    root = tmp_path_factory.mktemp("store")
    weights = remote.write_bucket(root / "buckets")
    with remote.passing(root / "buckets", root / "log") as transit:
        yield transit, weights


class Gate:
    """Lets so many bytes of weights pass, and then none until it is opened."""

    def __init__(self, num_bytes: int) -> None:
        self.reached = threading.Event()
        self._left = num_bytes
        self._open = threading.Event()
        self._lock = threading.Lock()

    def __call__(self, reply: Reply) -> None:
        reply.pause = self._pass

    def await_reached(self, fetch: Future[None]) -> None:
        """Returns when no more may pass, or what asks for bytes has ended without so many."""
        eventually(lambda: self.reached.is_set() or fetch.done(), "bytes come")

    def open(self) -> None:
        self._open.set()

    def _pass(self) -> None:
        with self._lock:
            self._left -= 64 << 10
            is_shut = self._left < 0
        if is_shut:
            self.reached.set()
            self._open.wait(60)


@contextlib.contextmanager
def gated(transit: Transit, num_bytes: int) -> Iterator[Gate]:
    gate = Gate(num_bytes)
    with transit.harming(weights=gate):
        try:
            yield gate
        finally:
            gate.open()


def stage(server: Server) -> None:
    with contextlib.suppress(httpx.HTTPError):  # the server is killed meanwhile
        remote.move(server, MODEL, "stage", "dram")


def check_disk(data_dir: Path) -> FsckReport:
    """As the command does, which takes longer to start."""
    tier = DiskTier(data_dir / "store", 1 << 30)
    try:
        return fsck(tier)
    finally:
        tier.close()


def in_shared_memory() -> set[Path]:
    return set(Path("/dev/shm").iterdir())


def is_gone(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def kill(server: Server) -> None:
    """At once, and all that it started ends with it."""
    processes = psutil.Process(server.pid).children(recursive=True)
    server.signal(signal.SIGKILL)
    server.wait()
    eventually(lambda: all(map(is_gone, processes)), "its processes are gone")


def test_a_server_that_is_killed_while_it_fetches_goes_on_with_what_it_has(
    stored: tuple[Transit, Path],
) -> None:
    transit, weights = stored
    size, draw, shared = weights.stat().st_size, random.Random(1), in_shared_memory()
    with scratch_dir() as data_dir, ThreadPoolExecutor(1) as pool:
        server = Server(data_dir, **{**remote.SETTINGS, **PATIENT})
        try:
            server.start()
            server.deploy(MODEL, remote.SOURCE)
            for number in range(NUM_KILLS):
                # At first so late that a chunk is whole, then anywhere.
                num_bytes = size - CHUNK_BYTES // 2 if number == 0 else draw.randrange(size // 4)
                with gated(transit, num_bytes) as gate:
                    staging = pool.submit(stage, server)
                    gate.await_reached(staging)
                    if number == 0:
                        eventually(lambda: journals(data_dir), "a chunk has come to disk")
                    kill(server)
                    staging.result()
                report = check_disk(data_dir)
                assert report.is_clean, report
                assert report.num_resumable + report.num_checkpoints == 1
                server.start()
            sent = transit.num_sent
            answer = remote.answer(server, MODEL)
            assert transit.num_sent - sent <= size - CHUNK_BYTES
            assert remote.await_disk(server, MODEL).read_bytes() == weights.read_bytes()
            server.deploy("local", weights.parent)
            assert remote.answer(server, "local") == answer
            assert server.stop() == 0, server.log()
            report = remote.fsck(server)
            assert (report["is_clean"], report["num_resumable"]) == (True, 0)
        finally:
            if server.is_alive():
                server.signal(signal.SIGKILL)
                server.wait()
    assert in_shared_memory() <= shared


def journals(data_dir: Path) -> list[Path]:
    """Those of fetches under way that name a chunk."""
    found = (data_dir / "store" / "incoming").glob("*/.*.journal")
    return [path for path in found if path.stat().st_size]


def test_a_worker_that_is_killed_while_its_model_arrives_loses_no_request(
    stored: tuple[Transit, Path],
) -> None:
    transit, weights = stored
    with remote.serving(**PATIENT) as server, ThreadPoolExecutor(1) as pool:
        server.deploy(MODEL, remote.SOURCE)
        sent = transit.num_sent
        with gated(transit, weights.stat().st_size // 2) as gate:
            asked = pool.submit(remote.answer, server, MODEL)
            assert gate.reached.wait(60)
            (worker,) = server.workers()
            worker.kill()
            eventually(lambda: is_gone(worker), "the worker is gone")
        answer = asked.result()
        assert transit.num_sent - sent == weights.stat().st_size, "it was fetched once"
        server.deploy("local", weights.parent)
        assert remote.answer(server, "local") == answer
        assert server.stop() == 0, server.log()
        assert remote.fsck(server)["is_clean"]


def test_a_model_that_the_disk_tier_cannot_hold_is_served_from_memory(
    stored: tuple[Transit, Path],
) -> None:
    _, weights = stored
    with remote.serving(STORE__DISK_BYTES="20MiB") as server:
        server.deploy(MODEL, remote.SOURCE)
        remote.move(server, MODEL, "stage", "dram").raise_for_status()
        found = remote.ps(server, MODEL)
        assert (found["tier"], found["disk_bytes"]) == ("dram", 0)
        answer = remote.answer(server, MODEL)
        (line,) = (each for each in server.log().splitlines() if "not kept on disk" in each)
        assert remote.SOURCE in line
        assert "store.disk_bytes" in line
        error = remote.refused(remote.move(server, MODEL, "stage", "disk"))
        assert "store.disk_bytes" in error["message"]
        remote.make_cold(server, MODEL)
        assert remote.answer(server, MODEL) == answer
        assert server.stop() == 0, server.log()
        assert remote.fsck(server)["is_clean"]
    assert weights.exists()
