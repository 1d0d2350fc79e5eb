from __future__ import annotations

from typing import Any

import pytest

from flashserve.errors import InputError, ModelNotFoundError
from flashserve.gateway.body import validate
from flashserve.gateway.parameters import refuse_unserved
from flashserve.gateway.schema import ChatRequest, CompletionRequest
from flashserve.live.requests import GenerationRequest
from flashserve.types import SamplingParams


def completion(**fields: Any) -> GenerationRequest:
    body = {"model": "m", "prompt": "p", **fields}
    return validate(CompletionRequest, body).to_generation(1.5)


def chat(**fields: Any) -> GenerationRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], **fields}
    return validate(ChatRequest, body).to_generation(1.5)


def test_defaults_of_a_completion() -> None:
    assert completion() == GenerationRequest(
        model_id="m", params=SamplingParams(), prompt="p", received_at=1.5
    )


def test_defaults_of_a_chat() -> None:
    assert chat() == GenerationRequest(
        model_id="m",
        params=SamplingParams(),
        messages=({"role": "user", "content": "hi"},),
        max_tokens_given=False,
        received_at=1.5,
    )


@pytest.mark.parametrize(
    ("prompt", "text", "ids"),
    [
        ("", "", None),
        (["one"], "one", None),
        ([1, 2], None, (1, 2)),
        ([[1, 2]], None, (1, 2)),
        ([0], None, (0,)),
    ],
)
def test_a_prompt_has_four_forms(
    prompt: object, text: str | None, ids: tuple[int, ...] | None
) -> None:
    request = completion(prompt=prompt)
    assert (request.prompt, request.prompt_ids) == (text, ids)


def test_several_prompts_are_refused_in_words_that_help() -> None:
    with pytest.raises(InputError, match="one request each") as caught:
        completion(prompt=["a", "b"])
    assert caught.value.param == "prompt"


def test_the_newer_name_of_max_tokens_wins() -> None:
    assert chat(max_tokens=5).params.max_tokens == 5
    assert chat(max_tokens=5, max_completion_tokens=7).params.max_tokens == 7
    assert chat(max_tokens=5).max_tokens_given


def test_temperature_zero_stays_zero() -> None:
    assert chat(temperature=0).params.temperature == 0.0


def test_top_k_minus_one_is_off() -> None:
    assert completion(top_k=-1).params.top_k == 0


@pytest.mark.parametrize("seed", [0, 1, 2**62 - 1])
def test_usual_seeds_pass_as_they_are(seed: int) -> None:
    assert completion(seed=seed).params.seed == seed


@pytest.mark.parametrize("seed", [-1, -(2**63), 2**63 - 1])
def test_far_seeds_are_folded_into_what_every_generator_takes(seed: int) -> None:
    folded = completion(seed=seed).params.seed
    assert folded is not None
    assert 0 <= folded < 2**62


def test_logprobs_mean_the_number_of_alternatives() -> None:
    assert completion(logprobs=3).params.logprobs == 3
    assert completion(logprobs=0).params.logprobs == 0
    assert chat(logprobs=True).params.logprobs == 0
    assert chat(logprobs=True, top_logprobs=4).params.logprobs == 4
    assert chat(logprobs=False).params.logprobs is None


def test_text_parts_become_lines() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = chat(messages=[{"role": "developer", "content": parts, "name": "x"}])
    assert request.messages == ({"role": "system", "content": "a\nb", "name": "x"},)


def test_one_stop_or_many() -> None:
    assert completion(stop="a").stop == ("a",)
    assert completion(stop=["a"] * 16).stop == ("a",) * 16
    assert completion(stop=[]).stop == ()


def test_a_name_that_no_model_can_have_is_not_found() -> None:
    with pytest.raises(ModelNotFoundError):
        completion(model="a b")


def test_unserved_parameters_pass_where_they_change_nothing() -> None:
    refuse_unserved({"tools": [], "logit_bias": {}, "echo": None, "min_p": 0.0}, chat=True)
    refuse_unserved({"tools": [{}]}, chat=False)  # no parameter of completions at all


@pytest.mark.parametrize(
    ("name", "value"),
    [("tools", [{}]), ("presence_penalty", False), ("echo", 0), ("logit_bias", {"1": 0})],
)
def test_unserved_parameters_are_named(name: str, value: object) -> None:
    with pytest.raises(InputError, match=name) as caught:
        refuse_unserved({name: value}, chat=True)
    assert caught.value.param == name
