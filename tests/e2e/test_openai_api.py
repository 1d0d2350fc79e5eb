"""The HTTP API with the official client, and with what no client would send."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import openai
import pytest
from tests.e2e.harness import MODEL, QUESTION, Server, chat_body

MESSAGES: Any = [{"role": "user", "content": QUESTION}]


def make_client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_openai_chat(server: Server) -> None:
    with make_client(server) as client:
        answer = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, temperature=0, max_tokens=8
        )
    assert "Paris" in (answer.choices[0].message.content or "")
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_openai_stream_equals_the_whole_answer(server: Server) -> None:
    with make_client(server) as client:
        whole = client.chat.completions.create(
            model=MODEL, messages=MESSAGES, temperature=0, max_tokens=16
        )
        stream = client.chat.completions.create(
            model=MODEL,
            messages=MESSAGES,
            temperature=0,
            max_tokens=16,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert [chunk.usage for chunk in chunks if chunk.usage] == [whole.usage] or (
        chunks[-1].usage is not None
        and whole.usage is not None
        and chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    )


def test_openai_async_requests_run_together(server: Server) -> None:
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:

            async def ask(number: int) -> str:
                stream = await client.completions.create(
                    model=MODEL,
                    prompt=f"{number}, {number + 1}, {number + 2},",
                    temperature=0,
                    max_tokens=6,
                    stream=True,
                )
                return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])

            return await asyncio.gather(*(ask(number) for number in range(3, 9)))

    texts = asyncio.run(ask_all())
    assert all(texts)
    assert f" {3 + 3}" in texts[0]


def test_openai_choices_stop_seed_and_logprobs(server: Server) -> None:
    parameters: Any = {
        "model": MODEL,
        "messages": MESSAGES,
        "temperature": 1.0,
        "seed": 7,
        "n": 2,
        "max_tokens": 12,
        "stop": ["."],
        "logprobs": True,
        "top_logprobs": 2,
    }
    with make_client(server) as client:
        first = client.chat.completions.create(**parameters)
        second = client.chat.completions.create(**parameters)
    assert len(first.choices) == 2
    for choice, again in zip(first.choices, second.choices, strict=True):
        assert "." not in (choice.message.content or "")
        assert choice.message.content == again.message.content
        assert choice.logprobs is not None
        assert choice.logprobs.content
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)


def test_models_are_listed_as_openai_does(server: Server) -> None:
    with make_client(server) as client:
        assert MODEL in [model.id for model in client.models.list()]
        assert client.models.retrieve(MODEL).id == MODEL


def test_an_unknown_model_is_404_and_names_the_deployed_ones(server: Server) -> None:
    with make_client(server) as client, pytest.raises(openai.NotFoundError) as refused:
        client.chat.completions.create(model="nobody", messages=MESSAGES)
    assert refused.value.code == "model_not_found"
    assert MODEL in refused.value.message


def test_a_prompt_longer_than_the_context_is_400(server: Server) -> None:
    with make_client(server) as client, pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt="word " * 9000)
    assert refused.value.code == "context_length_exceeded"


@pytest.mark.parametrize(
    "body",
    [
        b"{not json",
        b"",
        b"[]",
        b'"text"',
        b"\xff\xfe",
        b"{" * 100_000,
        b'{"model": "smollm2", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    ],
    ids=["malformed", "empty", "list", "string", "not-utf8", "deep", "nan"],
)
def test_a_body_that_is_no_request_is_400(server: Server, body: bytes) -> None:
    with server.http() as http:
        reply = http.post(
            "/v1/chat/completions", content=body, headers={"content-type": "application/json"}
        )
    assert_refused(reply)


@pytest.mark.parametrize(
    "change",
    [
        {"messages": []},
        {"messages": "hello"},
        {"messages": [{"role": "wizard", "content": "x"}]},
        {"messages": [{"role": "user", "content": 5}]},
        {"messages": None},
        {"model": 5},
        {"model": ""},
        {"max_tokens": -1},
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"max_tokens": "many"},
        {"max_tokens": 10**30},
        {"temperature": -0.1},
        {"temperature": 1e300},
        {"temperature": True},
        {"top_p": 0},
        {"top_p": -1},
        {"top_p": 2},
        {"top_k": -5},
        {"n": 0},
        {"n": -3},
        {"n": 10**9},
        {"seed": "x"},
        {"seed": 10**40},
        {"stop": [""]},
        {"stop": [1]},
        {"stop": ["x"] * 1000},
        {"logprobs": True, "top_logprobs": -1},
        {"logprobs": True, "top_logprobs": 1000},
        {"stream": "yes"},
        {"stream_options": {"include_usage": True}},
        {"logit_bias": {"1": 5}},
        {"tools": [{"type": "function"}]},
        {"frequency_penalty": 1.0},
        {"flashserve": {"deadline": 5}},
        {"flashserve": {"deadline_s": -5}},
    ],
    ids=str,
)
def test_a_bad_parameter_is_refused_by_name(server: Server, change: dict[str, Any]) -> None:
    with server.http() as http:
        reply = http.post("/v1/chat/completions", json={**chat_body(), **change})
    assert_refused(reply)


def test_unknown_paths_and_methods_have_openai_shape(server: Server) -> None:
    with server.http() as http:
        assert http.get("/v1/nothing").json()["error"]["message"]
        assert http.get("/v1/nothing").status_code == 404
        assert http.get("/v1/chat/completions").status_code == 405


def test_a_foreign_web_page_is_refused(server: Server) -> None:
    with server.http() as http:
        foreign = {"origin": "https://evil.example"}
        assert http.post("/v1/completions", json={}, headers=foreign).status_code == 403
        rebound = {"host": "evil.example"}
        assert http.get("/admin/v1/models", headers=rebound).status_code == 403


def test_a_deploy_over_tcp_is_bound_to_the_configured_roots(server: Server) -> None:
    body = {"name": "sneaky", "source": "/etc"}
    with server.http() as http:
        reply = http.post("/admin/v1/models", json=body)
    assert reply.status_code == 403
    assert "roots" in reply.json()["error"]["message"]


def test_health_and_metrics(server: Server) -> None:
    with server.http() as http:
        assert http.get("/healthz").status_code == 200
        assert http.get("/readyz").status_code == 200
        metrics = http.get("/metrics").text
    assert f'flashserve_ttft_seconds_count{{model="{MODEL}"' in metrics


def assert_refused(reply: httpx.Response) -> None:
    assert reply.status_code in {400, 404, 422}, reply.text
    error = reply.json()["error"]
    assert error["message"]
    assert "\n" not in error["message"]
    assert {"type", "param", "code"} <= set(error)
