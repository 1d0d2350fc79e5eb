"""The official client, sync and async, against the real HTTP server over a scripted service."""

from __future__ import annotations

import asyncio

import openai
import pytest
from tests.integration.gateway.fakes import MODEL, Running, chunk, failing

from flashserve.errors import (
    ChatTemplateError,
    ContextLengthError,
    DeadlineError,
    DrainingError,
    QueueFullError,
    ReplicaError,
)

ASK = [{"role": "user", "content": "Say hello."}]


def test_chat_answers_whole(client: openai.OpenAI, server: Running) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=ASK, max_tokens=5, seed=3)
    assert answer.choices[0].message.content == "Hello world!"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.object == "chat.completion"
    assert answer.model == MODEL
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens, usage.total_tokens) == (7, 3, 10)
    assert usage.prompt_tokens_details.cached_tokens == 2
    (request,) = server.service.requests
    assert request.messages == ({"role": "user", "content": "Say hello."},)
    assert (request.params.max_tokens, request.params.seed) == (5, 3)
    assert server.service.generations[0].is_closed.wait(10)


def test_a_receipt_comes_with_the_body(client: openai.OpenAI) -> None:
    receipt = client.chat.completions.create(model=MODEL, messages=ASK).model_extra["flashserve"]
    assert receipt["tier"] == "dram"
    assert receipt["cold"] is True
    assert receipt["predicted"]["dram_s"] == 40.0
    assert receipt["actual"]["queue_s"] == 0.25
    assert 0 < receipt["ttft_s"] <= receipt["total_s"]
    assert receipt["gateway_out_s"] >= 0


def test_headers_name_the_request_and_its_times(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(model=MODEL, messages=ASK)
    assert raw.headers["x-request-id"] == "r-1"
    assert raw.headers["server-timing"] == "queue;dur=250.0, dram;dur=500.0, prefill;dur=125.0"
    assert raw.parse().id == "chatcmpl-r-1"


def test_chat_streams_role_text_end(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=MODEL, messages=ASK, stream=True))
    deltas = [piece.choices[0].delta for piece in chunks]
    assert deltas[0].role == "assistant"
    assert "".join(delta.content or "" for delta in deltas) == "Hello world!"
    assert [piece.choices[0].finish_reason for piece in chunks] == [None] * 4 + ["stop"]
    assert {piece.object for piece in chunks} == {"chat.completion.chunk"}
    assert all(piece.usage is None for piece in chunks)
    assert len({piece.id for piece in chunks}) == 1


def test_the_last_chunk_carries_the_receipt(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(model=MODEL, messages=ASK, stream=True))
    assert [("flashserve" in piece.model_extra) for piece in chunks] == [False] * 4 + [True]
    receipt = chunks[-1].model_extra["flashserve"]
    assert 0 < receipt["ttft_s"] <= receipt["total_s"]


def test_usage_comes_in_a_last_chunk_without_choices(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=ASK, stream=True, stream_options={"include_usage": True}
    )
    *pieces, last = list(stream)
    assert all(piece.usage is None and piece.choices for piece in pieces)
    assert last.choices == []
    assert last.usage.total_tokens == 10
    assert last.model_extra["flashserve"]["request_id"] == "r-1"


@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_told_apart(client: openai.OpenAI, stream: bool) -> None:
    answer = client.completions.create(model=MODEL, prompt="Hi", n=3, stream=stream)
    texts = {0: "", 1: "", 2: ""}
    ends = []
    for piece in answer if stream else [answer]:
        for choice in piece.choices:
            texts[choice.index] += choice.text
            ends += [choice.finish_reason] if choice.finish_reason else []
    assert texts == dict.fromkeys(range(3), "Hello world!")
    assert ends == ["stop"] * 3


def test_completions_pass_their_parameters_on(client: openai.OpenAI, server: Running) -> None:
    client.completions.create(
        model=MODEL,
        prompt=[5, 6],
        max_tokens=9,
        temperature=0.5,
        top_p=0.9,
        stop=["END", "\n"],
        extra_body={
            "top_k": 4,
            "ignore_eos": True,
            "stop_token_ids": [2],
            "flashserve": {"reuse_prefix": False, "deadline_s": 2.5},
        },
    )
    (request,) = server.service.requests
    assert (request.prompt, request.prompt_ids, request.messages) == (None, (5, 6), None)
    assert request.stop == ("END", "\n")
    assert (request.reuse_prefix, request.deadline_s) == (False, 2.5)
    params = request.params
    assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.9, 4)
    assert (params.max_tokens, params.ignore_eos, params.stop_token_ids) == (9, True, (2,))


def test_completion_logprobs_have_openais_shape(client: openai.OpenAI) -> None:
    logprobs = client.completions.create(model=MODEL, prompt="a", logprobs=1).choices[0].logprobs
    assert logprobs.tokens == ["Hello", " world", "!"]
    assert logprobs.text_offset == [0, 5, 11]
    assert logprobs.token_logprobs == [-0.5] * 3
    assert logprobs.top_logprobs[0] == {"Hello0": -1.0}


def test_streamed_completion_logprobs_count_offsets_on(client: openai.OpenAI) -> None:
    stream = client.completions.create(model=MODEL, prompt="a", logprobs=0, stream=True)
    blocks = [piece.choices[0].logprobs for piece in stream]
    assert [block.text_offset for block in blocks if block] == [[0], [5], [11]]


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs_have_openais_shape(client: openai.OpenAI, stream: bool) -> None:
    answer = client.chat.completions.create(
        model=MODEL, messages=ASK, logprobs=True, top_logprobs=2, stream=stream
    )
    pieces = answer if stream else [answer]
    tokens = [
        token
        for piece in pieces
        if piece.choices[0].logprobs
        for token in piece.choices[0].logprobs.content
    ]
    assert [token.token for token in tokens] == ["Hello", " world", "!"]
    assert bytes(tokens[0].bytes) == b"Hello"
    assert [top.logprob for top in tokens[0].top_logprobs] == [-1.0, -2.0]


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == (MODEL, "model", "flashserve")
    assert model.created == 1_700_000_000
    one = client.models.retrieve(MODEL)
    assert one.id == MODEL
    assert one.model_extra["state"] == "cold"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("team/other")


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_not_found(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="nobody", messages=ASK, stream=stream)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert MODEL in caught.value.message


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (QueueFullError("full", retry_after_s=3.2), openai.RateLimitError, "queue_full"),
        (ContextLengthError("too long"), openai.BadRequestError, "context_length_exceeded"),
        (ChatTemplateError("none"), openai.BadRequestError, "no_chat_template"),
        (DrainingError("bye"), openai.InternalServerError, "draining"),
        (ValueError("a bug"), openai.InternalServerError, "internal_error"),
    ],
)
def test_refusals_become_the_clients_exceptions(
    client: openai.OpenAI,
    server: Running,
    error: Exception,
    kind: type[openai.APIStatusError],
    code: str,
    stream: bool,
) -> None:
    server.service.refusal = error
    with pytest.raises(kind) as caught:
        client.chat.completions.create(model=MODEL, messages=ASK, stream=stream)
    assert caught.value.code == code
    assert "a bug" not in caught.value.message
    waits = {429: "4", 503: "1"}
    assert caught.value.response.headers.get("retry-after") == waits.get(caught.value.status_code)
    assert caught.value.response.headers["x-request-id"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_error_before_the_first_token_has_its_status(
    client: openai.OpenAI, server: Running, stream: bool
) -> None:
    server.service.plan = failing(DeadlineError("waited 120 s"))
    with pytest.raises(openai.InternalServerError, match="waited 120 s") as caught:
        client.chat.completions.create(model=MODEL, messages=ASK, stream=stream)
    assert caught.value.status_code == 503


def test_an_error_after_the_first_token_breaks_the_stream(
    client: openai.OpenAI, server: Running
) -> None:
    server.service.plan = failing(ReplicaError("three replicas died"), after=("Hel", "lo"))
    stream = client.chat.completions.create(model=MODEL, messages=ASK, stream=True)
    texts = [next(stream).choices[0].delta.content for _ in range(3)]
    assert texts == ["", "Hel", "lo"]
    with pytest.raises(openai.APIError, match="three replicas died"):
        next(stream)


def test_an_error_after_the_first_token_still_has_its_status_in_a_whole_answer(
    client: openai.OpenAI, server: Running
) -> None:
    server.service.plan = failing(ReplicaError("three replicas died"), after=("Hel", "lo"))
    with pytest.raises(openai.InternalServerError, match="three replicas died"):
        client.chat.completions.create(model=MODEL, messages=ASK)


def test_the_async_client_streams_many_at_once(server: Running) -> None:
    async def ask(client: openai.AsyncOpenAI) -> str:
        stream = await client.chat.completions.create(model=MODEL, messages=ASK, stream=True)
        return "".join([piece.choices[0].delta.content or "" async for piece in stream])

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            return await asyncio.gather(*(ask(client) for _ in range(8)))

    assert asyncio.run(ask_all()) == ["Hello world!"] * 8


def test_the_async_client_gets_whole_answers_and_errors(server: Running) -> None:
    async def ask() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="any") as client:
            with pytest.raises(openai.NotFoundError):
                await client.completions.create(model="nobody", prompt="a")
            return (await client.completions.create(model=MODEL, prompt="a")).choices[0].text

    assert asyncio.run(ask()) == "Hello world!"


def test_text_that_is_held_back_is_not_sent(client: openai.OpenAI, server: Running) -> None:
    async def plan(request: object):
        yield chunk("")
        yield chunk("a")
        yield chunk("", finish="length")

    server.service.plan = plan
    chunks = list(client.completions.create(model=MODEL, prompt="x", stream=True))
    assert [piece.choices[0].text for piece in chunks] == ["a", ""]
    assert chunks[-1].choices[0].finish_reason == "length"
