"""What happens when there is not enough: memory, queue, time, workers."""

from __future__ import annotations

import concurrent.futures
import contextlib
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.e2e.checkpoints import WEIGHTS, damaged, zero_weights
from tests.e2e.harness import MODEL, QUESTION, Server, chat_body, eventually, running
from tests.e2e.test_bad_checkpoints import error_line


@pytest.fixture(scope="module")
def tight_server(checkpoint: Path) -> Iterator[Server]:
    """One worker, a queue of two, room for one copy of the model."""
    settings = {
        "NODE__NUM_WORKERS": "1",
        "NODE__DRAM_BYTES": "400MiB",
        "POLICY__QUEUE_LIMIT": "2",
        "POLICY__SLOT_PATIENCE_S": "0",
        "POLICY__KEEP_ALIVE_S": "300",
    }
    with running(checkpoint, **settings) as started:
        yield started
        assert started.stop() == 0, started.log()


@contextlib.contextmanager
def frozen_workers(server: Server) -> Iterator[None]:
    """No start or answer can be finished meanwhile."""
    workers = server.workers()
    assert workers
    for worker in workers:
        worker.suspend()
    try:
        yield
    finally:
        for worker in workers:
            worker.resume()


def test_queue_overflow_is_429_and_a_passed_deadline_503(tight_server: Server) -> None:
    with frozen_workers(tight_server), concurrent.futures.ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(ask, tight_server, deadline_s=5) for _ in range(2)]
        eventually(lambda: tight_server.model()["waiting"] == 2, "two requests wait")
        refused = ask(tight_server)
        assert refused.status_code == 429
        assert refused.json()["error"]["code"] == "queue_full"
        assert int(refused.headers["retry-after"]) >= 1
        for reply in (future.result() for future in waiting):
            assert reply.status_code == 503
            assert reply.json()["error"]["code"] == "deadline_exceeded"
            assert MODEL in reply.json()["error"]["message"]
    assert "Paris" in tight_server.ask(max_tokens=8)


def test_models_take_turns_on_one_worker_and_in_a_small_arena(
    tight_server: Server, checkpoint: Path
) -> None:
    tight_server.deploy("other", checkpoint)
    answers = {tight_server.ask(model=name, max_tokens=8) for name in (MODEL, "other") * 2}
    assert len(answers) == 1
    tight_server.succeed("delete", "other")


def test_a_model_larger_than_the_arena_is_refused_with_both_sizes(checkpoint: Path) -> None:
    with running(NODE__NUM_WORKERS="1", NODE__DRAM_BYTES="128MiB") as server:
        done = server.cli("deploy", MODEL, str(checkpoint))
        error = error_line(done.stderr)
        assert done.returncode == 1
        assert "128" in error or str(128 << 20) in error
        assert "256.6" in error or "269" in error or "257" in error
        assert server.stop() == 0


def test_a_model_that_disappears_fails_its_requests_and_nobody_elses(
    tight_server: Server, checkpoint: Path, tmp_path: Path
) -> None:
    directory = damaged(checkpoint, tmp_path / "vanishing", zero_weights)
    tight_server.deploy("vanishing", directory)
    (directory / WEIGHTS).unlink()
    reply = ask(tight_server, model="vanishing")
    assert reply.status_code in {422, 503}
    assert WEIGHTS in reply.json()["error"]["message"]
    assert "Paris" in tight_server.ask(max_tokens=8)
    tight_server.succeed("delete", "vanishing")


def test_ctrl_c_of_run_aborts_the_generation(tight_server: Server) -> None:
    command = [sys.executable, "-m", "flashserve.cli.main", "run", MODEL, QUESTION]
    # Jobs in the background of a script ignore the signal, and who they start would as well.
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(
        [*command, "--max-tokens", "4000", "--temperature", "1"],
        env=tight_server.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    signal.signal(signal.SIGINT, heard)
    with process:
        assert process.stdout is not None
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate()
    assert process.returncode == 130
    assert "Traceback" not in stderr
    tight_server.await_idle()


def ask(server: Server, *, model: str = MODEL, deadline_s: float | None = None) -> httpx.Response:
    body = chat_body(model=model, max_tokens=4, flashserve={"deadline_s": deadline_s})
    with server.http() as http:
        return http.post("/v1/chat/completions", json=body)
