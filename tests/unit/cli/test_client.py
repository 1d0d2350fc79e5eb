from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from flashserve.cli.client import Client, connect
from flashserve.errors import (
    ChatTemplateError,
    DeadlineError,
    InputError,
    ModelNotFoundError,
    UnavailableError,
)


def client_of(answer: Callable[[httpx.Request], httpx.Response]) -> Client:
    http = httpx.Client(transport=httpx.MockTransport(answer), base_url="http://server")
    return Client(http, "http://server")


def error_body(code: str, message: str) -> dict[str, object]:
    return {"error": {"message": message, "type": "x", "param": None, "code": code}}


def test_deploy_sends_name_source_and_options() -> None:
    requests: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200, json={"name": "m"})

    assert client_of(answer).deploy("m", "/models/m", {"keep_alive_s": 5}) == {"name": "m"}
    assert requests[0].url.path == "/admin/v1/models"
    assert json.loads(requests[0].content) == {
        "name": "m",
        "source": "/models/m",
        "keep_alive_s": 5,
    }


def test_a_name_with_slashes_stays_one_path_and_odd_ones_are_escaped() -> None:
    paths: list[bytes] = []

    def answer(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.raw_path)
        return httpx.Response(200, json={})

    client_of(answer).stage("team/m", "dram")
    client_of(answer).delete("a b?c")
    assert paths == [b"/admin/v1/models/team/m/stage", b"/admin/v1/models/a%20b%3Fc"]


def test_an_error_of_the_server_is_raised_as_what_it_is() -> None:
    client = client_of(
        lambda _: httpx.Response(404, json=error_body("model_not_found", "no model m"))
    )
    with pytest.raises(ModelNotFoundError, match="no model m"):
        client.delete("m")


def test_an_error_that_is_not_ours_names_its_status() -> None:
    client = client_of(lambda _: httpx.Response(502, text="<html>bad gateway</html>"))
    with pytest.raises(UnavailableError, match="502"):
        client.models()


def test_an_answer_that_is_not_json_is_reported() -> None:
    with pytest.raises(UnavailableError, match="did not answer as FlashServe"):
        client_of(lambda _: httpx.Response(200, text="hello")).models()


def test_a_stream_skips_comments_and_ends_at_done() -> None:
    text = ': waiting\n\ndata: {"a": 1}\n\ndata: {"a": 2}\n\ndata: [DONE]\n\n'
    client = client_of(lambda _: httpx.Response(200, text=text))
    assert list(client.stream("/v1/completions", {})) == [{"a": 1}, {"a": 2}]


def test_an_error_within_a_stream_is_raised_after_what_came_before() -> None:
    late = json.dumps(error_body("deadline_exceeded", "waited too long"))
    text = f'data: {{"a": 1}}\n\nevent: error\ndata: {late}\n\ndata: [DONE]\n\n'
    stream = client_of(lambda _: httpx.Response(200, text=text)).stream("/v1/completions", {})
    assert next(stream) == {"a": 1}
    with pytest.raises(DeadlineError, match="waited too long"):
        next(stream)


def test_a_refused_stream_raises_its_error() -> None:
    client = client_of(
        lambda _: httpx.Response(400, json=error_body("no_chat_template", "m has no template"))
    )
    with pytest.raises(ChatTemplateError, match="m has no template"):
        list(client.stream("/v1/chat/completions", {}))


def test_keys_of_the_environment_are_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        sent.append(request.headers["authorization"])
        return httpx.Response(200, json={"data": []}, text=None)

    monkeypatch.setenv("FLASHSERVE_ADMIN_KEY", "admin")
    client = client_of(answer)
    client.models()
    monkeypatch.setenv("FLASHSERVE_API_KEY", "user")
    list(client.stream("/v1/completions", {}))
    assert sent == ["Bearer admin", "Bearer user"]


def test_without_a_server_the_error_names_the_socket_and_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHSERVE_DATA_DIR", str(tmp_path))
    with pytest.raises(UnavailableError, match=r"flashserve\.sock.*flashserve serve.*--url"):
        connect()


def test_a_socket_that_nobody_listens_on_is_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind("run/flashserve.sock")
    monkeypatch.setenv("FLASHSERVE_DATA_DIR", ".")
    with pytest.raises(UnavailableError, match="no server is running"):
        connect()


def test_a_url_without_a_scheme_is_refused() -> None:
    with pytest.raises(InputError, match="localhost:8080 is not a server's URL"):
        connect("localhost:8080")
