"""Starting, stopping and killing the server: what stays, and that nothing else does."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path

import httpx
import psutil
import pytest
from tests.e2e.harness import (
    MODEL,
    PATIENCE_S,
    Server,
    chat_body,
    events,
    eventually,
    scratch_dir,
)


@pytest.fixture(scope="module")
def deployed(checkpoint: Path) -> Iterator[Server]:
    """A server, running or not, that remembers the model."""
    with scratch_dir() as data_dir:
        server = Server(data_dir)
        try:
            server.start()
            server.deploy(MODEL, checkpoint)
            yield server
        finally:
            server.kill()


@pytest.fixture
def own_server(deployed: Server) -> Server:
    """A running server that the test may stop as it likes, with the model deployed."""
    return deployed if deployed.is_alive() else deployed.start()


def test_nothing_survives_a_killed_server_and_a_restart_brings_the_models_back(
    own_server: Server,
) -> None:
    answer = own_server.ask(max_tokens=8)
    processes = [psutil.Process(own_server.pid), *own_server.workers()]
    arena = arena_of(own_server.pid)
    assert len(processes) == 3
    own_server.signal(signal.SIGKILL)
    own_server.wait()
    eventually(lambda: not any(map(is_running, processes)), "the processes are gone", within_s=2)
    eventually(lambda: arena not in open_files(), "the arena is gone", within_s=2)
    socket_path = own_server.data_dir / "run" / "flashserve.sock"
    assert socket_path.exists(), "a killed server cannot remove its socket"

    own_server.start()
    model = own_server.model()
    assert (model["state"], model["tier"], model["replicas"]) == ("cold", "disk", 0)
    assert own_server.ask(max_tokens=8) == answer
    assert own_server.stop() == 0


def test_a_stopped_server_leaves_nothing_and_remembers_its_models(own_server: Server) -> None:
    before = set(Path("/dev/shm").iterdir())
    own_server.ask(max_tokens=4)
    processes = [psutil.Process(own_server.pid), *own_server.workers()]
    arena = arena_of(own_server.pid)
    assert own_server.stop() == 0, own_server.log()
    eventually(lambda: not any(map(is_running, processes)), "the processes are gone", within_s=2)
    assert arena not in open_files()
    assert not (own_server.data_dir / "run" / "flashserve.sock").exists()
    assert set(Path("/dev/shm").iterdir()) <= before
    done = own_server.cli("ps")
    assert done.returncode == 1
    assert "flashserve serve" in done.stderr
    own_server.start()
    assert own_server.model()["state"] == "cold"


def test_a_running_stream_finishes_and_new_work_is_refused(own_server: Server) -> None:
    with open_stream(own_server, max_tokens=48) as chunks:
        tokens = [next(chunks)]
        own_server.signal(signal.SIGTERM)
        eventually(lambda: refusal(own_server) == (503, "draining"), "new work is refused")
        with own_server.http() as http:
            assert http.get("/readyz").status_code == 503
        tokens += list(chunks)
    assert sum(bool(chunk["choices"]) for chunk in tokens) > 8
    assert any(
        choice["finish_reason"] == "length" for chunk in tokens for choice in chunk["choices"]
    )
    assert own_server.wait() == 0, own_server.log()


def test_a_second_signal_stops_at_once(own_server: Server) -> None:
    processes = [psutil.Process(own_server.pid), *own_server.workers()]
    with (
        contextlib.suppress(httpx.HTTPError, AssertionError),
        open_stream(own_server, max_tokens=4000) as chunks,
    ):
        next(chunks)
        own_server.signal(signal.SIGINT)  # Ctrl-C
        eventually(lambda: refusal(own_server) == (503, "draining"), "new work is refused")
        own_server.signal(signal.SIGINT)
        list(chunks)
    assert own_server.wait() != 0
    eventually(lambda: not any(map(is_running, processes)), "the processes are gone", within_s=5)


def test_a_model_stops_when_its_keep_alive_is_over_and_wakes_again(
    own_server: Server, checkpoint: Path
) -> None:
    own_server.succeed("deploy", "nap", str(checkpoint), "--keep-alive", "0.5")
    first = own_server.ask(model="nap", max_tokens=8)
    asleep = eventually(
        lambda: (model := own_server.model("nap"))["state"] == "cold" and model, "nap is cold"
    )
    assert asleep["tier"] == "dram"
    assert asleep["replicas"] == 0
    assert own_server.ask(model="nap", max_tokens=8) == first
    own_server.succeed("delete", "nap")


@contextlib.contextmanager
def open_stream(server: Server, max_tokens: int) -> Iterator[Iterator[dict]]:
    """The chunks of a stream that goes on to max_tokens."""
    body = chat_body("Tell me a story.", max_tokens=max_tokens, ignore_eos=True, stream=True)
    with (
        httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http,
        http.stream("POST", "/v1/chat/completions", json=body) as reply,
    ):
        assert reply.status_code == 200, reply.read()
        yield events(reply.iter_lines())


def refusal(server: Server) -> tuple[int, str | None]:
    """Status and code of one more request."""
    with httpx.Client(base_url=server.url, timeout=PATIENCE_S) as http:
        reply = http.post("/v1/chat/completions", json=chat_body(max_tokens=1))
    return reply.status_code, reply.json().get("error", {}).get("code")


def arena_of(pid: int) -> tuple[int, int]:
    """Device and inode of the server's only memory file."""
    found = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(entry.readlink()).startswith("/memfd:"):
                found.add((entry.stat().st_dev, entry.stat().st_ino))
    assert len(found) == 1, found
    return found.pop()


def open_files() -> set[tuple[int, int]]:
    """Device and inode of every file that any process holds open."""
    found = set()
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with contextlib.suppress(OSError):
                for entry in (process / "fd").iterdir():
                    with contextlib.suppress(OSError):
                        found.add((entry.stat().st_dev, entry.stat().st_ino))
    return found


def is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
