"""Whatever is sent, the answer is an error in OpenAI's shape that names the parameter."""

from __future__ import annotations

import json
import socket
from typing import Any

import pytest
from tests.integration.gateway.conftest import Start
from tests.integration.gateway.fakes import MODEL, Running

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": MODEL, "prompt": "hi"}
NOT_NUMBERS: list[Any] = ["1", True, [], {}, "NaN"]
NOT_COUNTS: list[Any] = [*NOT_NUMBERS, 0, -1, 1.5, 2**31, 10**40]

BOTH: list[tuple[str, Any]] = [
    *[("max_tokens", value) for value in NOT_COUNTS],
    *[("n", value) for value in [*NOT_COUNTS, 129]],
    *[("temperature", value) for value in [*NOT_NUMBERS, -0.1, 2.1, 10**400]],
    *[("top_p", value) for value in [*NOT_NUMBERS, 0, -1, 1.01]],
    *[("top_k", value) for value in [*NOT_NUMBERS, -2, 0.5]],
    *[("seed", value) for value in [*NOT_NUMBERS, 1.5, 2**63, -(2**63) - 1]],
    *[("stop", value) for value in [1, True, "", [""], [1], ["a"] * 17, {}]],
    *[("stop_token_ids", value) for value in [1, "a", ["a"], [-1], [True], [2**31]]],
    *[("stream", value) for value in ["yes", 1, [], {}]],
    *[("ignore_eos", value) for value in ["yes", 1]],
    *[("model", value) for value in [None, 1, "", [], {}]],
    *[("flashserve", value) for value in [1, "x", []]],
    ("stream_options", "yes"),
    ("frequency_penalty", 0.5),
    ("frequency_penalty", "0"),
    ("presence_penalty", -1),
    ("presence_penalty", True),
    ("logit_bias", {"5": 1}),
    ("response_format", {"type": "json_object"}),
    ("response_format", {"type": "json_schema", "json_schema": {}}),
    ("guided_json", {"type": "object"}),
    ("min_p", 0.1),
]
CHAT_ONLY: list[tuple[str, Any]] = [
    *[("messages", value) for value in [None, [], {}, "hi", 1]],
    *[("max_completion_tokens", value) for value in NOT_COUNTS],
    *[("logprobs", value) for value in [1, "yes", []]],
    *[("top_logprobs", value) for value in [*NOT_NUMBERS, -1, 21, 1.5]],
    ("tools", [{"type": "function"}]),
    ("functions", [{}]),
    ("tool_choice", "required"),
    ("modalities", ["audio"]),
    ("audio", {"voice": "x"}),
]
TEXT_ONLY: list[tuple[str, Any]] = [
    *[("prompt", value) for value in [None, 1, True, {}, [], [[]], [-1], [1.5], [True], [1, "a"]]],
    *[("prompt", value) for value in [["a", "b"], [[1], [2]], [2**31], [None], [{}], [[["a"]]]]],
    *[("logprobs", value) for value in [*NOT_NUMBERS, -1, 21, 1.5]],
    ("echo", True),
    ("suffix", "x"),
    ("best_of", 2),
]
CASES = [
    *[("/v1/chat/completions", CHAT, *case) for case in [*BOTH, *CHAT_ONLY]],
    *[("/v1/completions", TEXT, *case) for case in [*BOTH, *TEXT_ONLY]],
]


def assert_error(reply: Any, status: int) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    error = reply.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert error["code"]
    return error


def test_wrong_values_are_refused_by_name(server: Running) -> None:
    wrong = []
    with server.client() as http:
        for path, body, name, value in CASES:
            reply = http.post(path, content=json.dumps({**body, name: value}))
            error = reply.json().get("error", {})
            if reply.status_code != 400 or not error["param"].startswith(name):
                wrong.append((path, name, repr(value)[:40], reply.status_code, reply.text[:200]))
    assert wrong == []
    assert server.service.requests == []


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "text", "text": 1}]}], "messages[0].content"),
        ([{"role": "user", "content": ["a"]}], "messages[0].content"),
        ([{"role": "user", "content": "a"}, {"role": "judge", "content": "a"}], "messages[1].role"),
        ([{"role": "tool", "content": "a"}], "messages[0].role"),
        ([{"role": "user", "content": "a", "tool_calls": [{}]}], "messages[0].tool_calls"),
        (["hi"], "messages[0]"),
    ],
)
def test_wrong_messages_are_refused_by_place(server: Running, value: Any, param: str) -> None:
    with server.client() as http:
        reply = http.post("/v1/chat/completions", json={**CHAT, "messages": value})
    assert assert_error(reply, 400)["param"] == param


@pytest.mark.parametrize(
    ("extension", "param"),
    [
        ({"reuse_prefix": 1}, "flashserve.reuse_prefix"),
        ({"deadline_s": 0}, "flashserve.deadline_s"),
        ({"deadline_s": -1}, "flashserve.deadline_s"),
        ({"deadline_s": True}, "flashserve.deadline_s"),
        ({"deadline_s": 1e300}, "flashserve.deadline_s"),
        ({"dead_line_s": 1}, "flashserve.dead_line_s"),
    ],
)
def test_our_own_extension_is_checked_to_the_letter(
    server: Running, extension: dict[str, Any], param: str
) -> None:
    with server.client() as http:
        reply = http.post("/v1/completions", json={**TEXT, "flashserve": extension})
    assert assert_error(reply, 400)["param"] == param


BODIES = {
    "nothing": b"",
    "half an object": b'{"model": "a"',
    "a list": b"[]",
    "a string": b'"hi"',
    "null": b"null",
    "not utf-8": b'{"model": "\xff\xfe"}',
    "a lone surrogate": b'{"model": "team/tiny", "prompt": "\\ud800"}',
    "NaN": b'{"model": "team/tiny", "prompt": "a", "temperature": NaN}',
    "Infinity": b'{"model": "team/tiny", "prompt": "a", "temperature": Infinity}',
    "-Infinity": b'{"model": "team/tiny", "prompt": "a", "temperature": -Infinity}',
    "1e999": b'{"model": "team/tiny", "prompt": "a", "temperature": 1e999}',
    "a long integer": b'{"model": "team/tiny", "prompt": "a", "n": 1' + b"0" * 9000 + b"}",
    "a deep list": b'{"model": ' + b"[" * 200_000,
    "a deep object": b'{"a":' * 200_000,
    "a deep closed list": b'{"model": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "two values": b"{} {}",
    "a form": b"model=team%2Ftiny&prompt=a",
}


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/admin/v1/models"])
@pytest.mark.parametrize("name", BODIES)
def test_broken_bodies_are_bad_requests(server: Running, path: str, name: str) -> None:
    with server.client() as http:
        assert_error(http.post(path, content=BODIES[name]), 400)


def test_unknown_and_harmless_fields_pass(server: Running) -> None:
    harmless = {
        "user": "me",
        "store": False,
        "metadata": {"a": "b"},
        "frequency_penalty": 0,
        "presence_penalty": 0.0,
        "logit_bias": {},
        "response_format": {"type": "text"},
        "n": None,
        "stop": None,
        "temperature": None,
        "seed": None,
        "stream_options": None,
        "flashserve": None,
        "something_new": {"x": [1]},
    }
    with server.client() as http:
        chat = {"tools": [], "tool_choice": "none", "logprobs": False, "top_logprobs": None}
        text = {"echo": False, "best_of": 1, "suffix": None, "logprobs": None}
        replies = [
            http.post("/v1/chat/completions", json={**CHAT, **harmless, **chat}),
            http.post("/v1/completions", json={**TEXT, **harmless, **text}),
        ]
    assert [reply.status_code for reply in replies] == [200, 200]
    assert server.service.requests[0].params.temperature == 1.0
    assert server.service.requests[0].max_tokens_given is False
    assert server.service.requests[1].params.max_tokens == 16


def test_stream_options_need_a_stream(server: Running) -> None:
    body = {**TEXT, "stream_options": {"include_usage": True}}
    with server.client() as http:
        error = assert_error(http.post("/v1/completions", json=body), 400)
    assert "stream_options" in error["message"]


def test_a_large_body_is_refused_before_it_is_read(start: Start) -> None:
    server = start(server={"max_body_bytes": 1000})
    with server.client() as http:
        declared = http.post("/v1/completions", content=b"x" * 1001)
        chunked = http.post("/v1/completions", content=iter([b"x" * 600] * 2))
        fits = http.post("/v1/completions", json=TEXT)
    for reply in (declared, chunked):
        assert assert_error(reply, 413)["code"] == "body_too_large"
        assert reply.headers["connection"] == "close"
    assert fits.status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("GET", "/favicon.ico", 404),
        ("GET", "/docs", 404),
        ("GET", "/v1/chat/completions", 405),
        ("PUT", "/v1/completions", 405),
        ("DELETE", "/v1/models/team/tiny", 405),
        ("POST", "/healthz", 405),
        ("GET", "/v1/models/", 404),
        ("GET", "/v1/models/%00%ff..%2f..", 404),
        ("GET", "/admin/v1/models/nobody", 404),
        ("DELETE", "/admin/v1/models/nobody", 404),
        ("GET", "/admin/v1/decisions?limit=x", 400),
        ("GET", "/admin/v1/decisions?limit=-1", 400),
        ("GET", "/admin/v1/decisions?limit=99999999999999999999999", 400),
        ("OPTIONS", "/v1/models", 405),
    ],
)
def test_wrong_paths_and_methods(server: Running, method: str, path: str, status: int) -> None:
    with server.client() as http:
        assert_error(http.request(method, path), status)


def test_a_client_that_leaves_within_its_body_harms_nobody(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    for _ in range(5):
        with socket.create_connection((host, int(port))) as broken:
            broken.sendall(
                b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{"
            )
    with server.client() as http:
        assert http.post("/v1/completions", json=TEXT).status_code == 200
    assert len(server.service.requests) == 1
