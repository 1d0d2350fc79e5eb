"""What goes over the wire, and when: held headers, comments, late errors, clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator

import pytest
from tests.integration.gateway.conftest import Start
from tests.integration.gateway.fakes import MODEL, Running, chunk

from flashserve.errors import ReplicaError
from flashserve.live.requests import GenerationRequest, TextChunk

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}], "stream": True}
TEXT = {"model": MODEL, "prompt": "hi", "stream": True}


class Gate:
    """A plan that waits for the test before it goes on; it may then fail."""

    def __init__(self, error: Exception | None = None) -> None:
        self.opened: asyncio.Event
        self.was_left = threading.Event()
        self._error = error

    async def plan(self, request: GenerationRequest) -> AsyncIterator[TextChunk]:
        self.opened = asyncio.Event()
        try:
            await self.opened.wait()
            if self._error is not None:
                raise self._error
            yield chunk("Hello")
            yield chunk("", finish="stop", num_tokens=0)
        finally:
            self.was_left.set()


def objects(lines: Iterator[str]) -> list[object]:
    data = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    return [json.loads(item) if item != "[DONE]" else item for item in data]


def test_a_stream_ends_with_done(server: Running) -> None:
    with server.client() as http:
        reply = http.post("/v1/completions", json=TEXT)
    assert reply.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["cache-control"] == "no-store"
    events = reply.text.split("\n\n")
    assert events[-1] == ""
    assert events[-2] == "data: [DONE]"
    assert all(event.startswith("data: {") for event in events[:-2])
    assert all("usage" not in item for item in objects(reply.iter_lines())[:-1])


def test_server_timing_comes_when_the_first_token_is_early(server: Running) -> None:
    with server.client() as http:
        reply = http.post("/v1/completions", json=TEXT)
    assert reply.headers["server-timing"].startswith("queue;dur=250.0, dram;dur=500.0")
    assert reply.headers["x-request-id"] == "r-1"


def test_headers_leave_without_a_token_when_the_hold_is_over(start: Start) -> None:
    server = start(server={"hold_headers_s": 0, "comment_interval_s": 0.01})
    gate = Gate()
    server.service.plan = gate.plan
    with server.client() as http, http.stream("POST", "/v1/completions", json=TEXT) as reply:
        assert reply.status_code == 200
        assert "server-timing" not in reply.headers
        lines = reply.iter_lines()
        comments = [next(lines) for _ in range(4)]
        assert comments == [": waiting, about 40 s", ""] * 2
        server.call(gate.opened.set)
        items = objects(lines)
    assert items[0]["choices"][0]["text"] == "Hello"
    assert items[-2]["flashserve"]["ttft_s"] > 0
    assert items[-1] == "[DONE]"


def test_a_comment_gives_no_estimate_that_has_passed(start: Start) -> None:
    server = start(server={"hold_headers_s": 0, "comment_interval_s": 0.01})
    server.service.predicted = type(server.service.predicted)()
    gate = Gate()
    server.service.plan = gate.plan
    with server.client() as http, http.stream("POST", "/v1/completions", json=TEXT) as reply:
        assert next(reply.iter_lines()) == ": waiting"


def test_an_error_after_the_headers_is_an_event(start: Start) -> None:
    server = start(server={"hold_headers_s": 0})
    gate = Gate(ReplicaError("three replicas died"))
    server.service.plan = gate.plan
    with server.client() as http, http.stream("POST", "/v1/chat/completions", json=CHAT) as reply:
        lines = reply.iter_lines()
        assert next(lines).startswith(": waiting")
        server.call(gate.opened.set)
        rest = [line for line in lines if line]
    assert rest[0] == "event: error"
    error = json.loads(rest[1].removeprefix("data: "))["error"]
    assert (error["code"], error["type"]) == ("replica_failed", "server_error")
    assert rest[2] == "data: [DONE]"


def test_an_unknown_model_has_its_status_even_without_a_hold(start: Start) -> None:
    server = start(server={"hold_headers_s": 0})
    with server.client() as http:
        assert http.post("/v1/completions", json={**TEXT, "model": "x"}).status_code == 404


def test_waiting_tokens_share_one_write(server: Running) -> None:
    async def plan(request: GenerationRequest) -> AsyncIterator[TextChunk]:
        for i in range(50):
            yield chunk(f"{i} ")
        yield chunk("", finish="length")

    server.service.plan = plan
    with server.client() as http, http.stream("POST", "/v1/completions", json=TEXT) as reply:
        pieces = list(reply.iter_raw())
    assert len(objects(iter(b"".join(pieces).decode().splitlines()))) == 52
    assert len(pieces) < 10


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_while_it_waits_aborts_its_generation(
    start: Start, is_stream: bool
) -> None:
    server = start(server={"hold_headers_s": 60})
    gate = Gate()
    server.service.plan = gate.plan
    with connected(server, {**TEXT, "stream": is_stream}):
        assert server.service.was_submitted.wait(10)
    assert gate.was_left.wait(10)
    assert server.service.generations[0].is_closed.wait(10)


def test_a_client_that_leaves_within_its_stream_aborts_its_generation(server: Running) -> None:
    was_left = threading.Event()

    async def plan(request: GenerationRequest) -> AsyncIterator[TextChunk]:
        try:
            yield chunk("Hello")
            await asyncio.Event().wait()
        finally:
            was_left.set()

    server.service.plan = plan
    with connected(server, TEXT) as connection:
        received = b""
        while b"Hello" not in received:
            received += connection.recv(4096)
    assert was_left.wait(10)
    assert server.service.generations[0].is_closed.wait(10)


def test_a_client_that_leaves_before_admission_cancels_it(start: Start) -> None:
    server = start()
    began, was_left = threading.Event(), threading.Event()

    async def submit(request: GenerationRequest) -> object:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            was_left.set()

    server.service.submit = submit
    with connected(server, TEXT):
        assert began.wait(10)
    assert was_left.wait(10)


@contextlib.contextmanager
def connected(server: Running, body: dict[str, object]) -> Iterator[socket.socket]:
    """A connection that has asked for a completion, and breaks off at the end."""
    host, port = server.url.removeprefix("http://").split(":")
    content = json.dumps(body).encode()
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        connection.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(content), content)
        )
        yield connection


def test_a_slow_client_slows_its_generation_down(server: Running) -> None:
    """What nobody reads is not asked for: memory stays bounded."""
    num_made = 0

    async def plan(request: GenerationRequest) -> AsyncIterator[TextChunk]:
        nonlocal num_made
        while num_made < 5000:
            num_made += 1
            yield chunk("x" * 10_000)
        yield chunk("", finish="length")

    server.service.plan = plan
    with server.client() as http, http.stream("POST", "/v1/completions", json=TEXT) as reply:
        lines = reply.iter_lines()
        next(lines)
        assert server.service.generations[0].receipt.ttft_s is not None
        assert num_made < 5000
        texts = [item["choices"][0]["text"] for item in objects(lines)[:-1]]
    assert sum(map(len, texts)) == 4999 * 10_000  # one was read before
