"""kill -9 of a worker in the middle of a stream: the client must not be able to tell."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tests.e2e.harness import MODEL, Server, events, eventually, running

PROMPT = "Once upon a time, in a small village by the sea,"
NUM_TOKENS = 20
BUSY_S = 0.05
"""Computing a handful of tokens takes a worker longer than this; waiting takes it less."""


@dataclasses.dataclass
class Streamed:
    text: str = ""
    tokens: list[str] = dataclasses.field(default_factory=list)
    offsets: list[int] = dataclasses.field(default_factory=list)
    finish_reasons: list[str] = dataclasses.field(default_factory=list)
    usages: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    receipt: dict[str, Any] = dataclasses.field(default_factory=dict)

    def add(self, chunk: dict[str, Any]) -> None:
        assert "error" not in chunk, chunk
        for choice in chunk["choices"]:
            self.text += choice["text"]
            if choice["finish_reason"]:
                self.finish_reasons.append(choice["finish_reason"])
            if choice["logprobs"]:
                self.tokens += choice["logprobs"]["tokens"]
                self.offsets += choice["logprobs"]["text_offset"]
        if chunk.get("usage"):
            self.usages.append(chunk["usage"])
        self.receipt = chunk.get("flashserve") or self.receipt


@pytest.fixture(
    scope="module",
    params=[{"ENGINE__DTYPE": "float32"}, {"ENGINE__BATCH_INVARIANT": "true"}],
    ids=["float32", "bf16-batch-invariant"],
)
def exact_server(request: pytest.FixtureRequest, checkpoint: Path) -> Iterator[Server]:
    """A server whose greedy answers do not depend on where a stream was cut."""
    with running(checkpoint, **request.param) as started:
        yield started
        assert started.stop() == 0, started.log()


@pytest.fixture(scope="module")
def whole(exact_server: Server) -> Streamed:
    """What it streams when nobody disturbs it."""
    return stream(exact_server)


def test_a_stream_goes_on_when_its_worker_is_killed(exact_server: Server, whole: Streamed) -> None:

    def kill_the_busy_one(advance: Callable[[int], None]) -> None:
        before = {worker.pid: cpu_s(worker) for worker in exact_server.workers()}
        advance(6)
        spent = {worker: cpu_s(worker) - before[worker.pid] for worker in exact_server.workers()}
        busy = max(spent, key=lambda worker: spent[worker])
        assert spent[busy] > BUSY_S
        busy.kill()

    check_continued(stream(exact_server, kill_the_busy_one), whole)


def test_a_stream_goes_on_when_every_worker_is_killed(
    exact_server: Server, whole: Streamed
) -> None:

    def kill_all(_advance: Callable[[int], None]) -> None:
        for worker in exact_server.workers():
            worker.kill()

    check_continued(stream(exact_server, kill_all), whole)
    eventually(lambda: len(exact_server.workers()) == 2, "both workers are there again")


def test_sequences_that_run_together_all_go_on(exact_server: Server) -> None:
    whole = stream(exact_server, num_choices=3)

    def kill_all(_advance: Callable[[int], None]) -> None:
        for worker in exact_server.workers():
            worker.send_signal(signal.SIGKILL)

    broken = stream(exact_server, kill_all, num_choices=3)
    assert sorted(broken.tokens) == sorted(whole.tokens)
    assert broken.usages == whole.usages
    assert len(broken.finish_reasons) == 3


def test_without_an_exact_mode_nothing_sent_changes_and_nothing_is_missing(
    server: Server,
) -> None:
    whole = stream(server)
    num_before = 0

    def kill_all(advance: Callable[[int], None]) -> None:
        nonlocal num_before
        num_before = 4 + 6
        advance(6)
        for worker in server.workers():
            worker.kill()

    broken = stream(server, kill_all)
    assert broken.receipt["resumed"] >= 1
    assert broken.tokens[:num_before] == whole.tokens[:num_before]
    assert "".join(broken.tokens) == broken.text
    assert broken.offsets == sorted(set(broken.offsets))
    assert len(broken.tokens) == NUM_TOKENS
    assert broken.usages == whole.usages


def stream(
    server: Server,
    interrupt: Callable[[Callable[[int], None]], None] | None = None,
    *,
    num_choices: int = 1,
) -> Streamed:
    """One greedy completion; `interrupt` is called after some tokens and may read more of them."""
    seen = Streamed()
    body = {
        "model": MODEL,
        "prompt": PROMPT,
        "temperature": 0,
        "max_tokens": NUM_TOKENS,
        "ignore_eos": True,
        "logprobs": 0,
        "n": num_choices,
        "stream": True,
        "stream_options": {"include_usage": True},
        "flashserve": {"reuse_prefix": False},
    }
    with (
        server.http() as http,
        contextlib.closing(http) as client,
        client.stream("POST", "/v1/completions", json=body) as reply,
    ):
        assert reply.status_code == 200, reply.read()
        chunks = events(reply.iter_lines())

        def advance(num_tokens: int) -> None:
            target = len(seen.tokens) + num_tokens
            while len(seen.tokens) < target:
                seen.add(next(chunks))

        if interrupt is not None:
            advance(4)
            interrupt(advance)
        for chunk in chunks:
            seen.add(chunk)
    return seen


def check_continued(broken: Streamed, whole: Streamed) -> None:
    assert broken.receipt["resumed"] >= 1
    assert whole.receipt["resumed"] == 0
    assert broken.text == whole.text
    assert broken.tokens == whole.tokens
    assert len(broken.tokens) == NUM_TOKENS
    assert broken.offsets == whole.offsets == sorted(set(broken.offsets))
    assert broken.finish_reasons == ["length"]
    assert len(broken.usages) == 1
    assert broken.usages[0]["completion_tokens"] == NUM_TOKENS
    assert broken.usages[0]["prompt_tokens"] == whole.usages[0]["prompt_tokens"]


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system
