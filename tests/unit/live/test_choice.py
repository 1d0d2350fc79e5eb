"""One completion: text, stops, logprobs and counts, over any number of replicas."""

from __future__ import annotations

import dataclasses

import pytest
from tests.unit.live.tiny import END, byte_text

from flashserve.errors import InternalError
from flashserve.live.choice import Choice
from flashserve.live.requests import TextChunk
from flashserve.types import AdapterId, RequestId, SamplingParams, TokenOutput

TEXT = byte_text()


def choice(index: int = 0, stop: tuple[str, ...] = (), **params: object) -> Choice:
    return Choice(
        index,
        RequestId("r"),
        (1, 2),
        SamplingParams(**params),  # type: ignore[arg-type]
        stop=stop,
        text=TEXT,
        reuse_prefix=False,
    )


def tokens(written: str, start: int = 0, finish: str | None = None) -> list[TokenOutput]:
    ids = TEXT.encode(written)
    made = [TokenOutput(start + i, token_id, emitted_at=float(i)) for i, token_id in enumerate(ids)]
    if finish is not None:
        made[-1] = dataclasses.replace(made[-1], finish_reason=finish)
    return made


def end(index: int) -> TokenOutput:
    return TokenOutput(index, END, finish_reason="stop")


def test_text_comes_in_whole_characters_and_every_token_counts() -> None:
    one = choice()
    euro = tokens("a€", finish="length")
    assert one.push(euro[:2]) == TextChunk(0, "a", 2, emitted_at=1.0)
    assert one.push(euro[2:]) == TextChunk(0, "€", 2, finish_reason="length", emitted_at=3.0)
    assert (one.num_tokens, one.is_finished) == (4, True)


def test_the_token_that_ends_a_text_counts_and_has_no_text() -> None:
    one = choice()
    chunk = one.push([*tokens("ab"), end(2)])
    assert (chunk.text, chunk.num_tokens, chunk.finish_reason) == ("ab", 3, "stop")


def test_half_a_character_at_the_end_is_not_swallowed() -> None:
    chunk = choice().push([*tokens("€")[:2], TokenOutput(2, END, finish_reason="stop")])
    assert chunk.text == "\ufffd"


def test_a_stop_string_ends_the_choice_with_the_token_that_completed_it() -> None:
    one = choice(stop=("STOP",))
    assert one.push(tokens("say ST")).text == "say "
    chunk = one.push(tokens("OP and more", start=6, finish="length"))
    assert (chunk.text, chunk.num_tokens, chunk.finish_reason) == ("", 2, "stop")
    assert (one.num_tokens, one.is_finished) == (8, True)


def test_what_only_began_like_a_stop_string_is_given_back_at_the_end() -> None:
    chunk = choice(stop=("STOP",)).push(tokens("my ST", finish="length"))
    assert (chunk.text, chunk.finish_reason) == ("my ST", "length")


def test_a_stop_string_completed_by_the_last_token_is_a_stop() -> None:
    chunk = choice(stop=("b",)).push(tokens("ab", finish="length"))
    assert (chunk.text, chunk.finish_reason) == ("a", "stop")


def test_another_replica_goes_on_where_one_stopped() -> None:
    one = choice(stop=("STOP",))
    first = one.next_job()
    assert (first.prompt_ids, first.emitted_ids, first.reuse_prefix) == ((1, 2), (), False)
    text = one.push(tokens("€ S")[:2]).text
    second = one.next_job()
    assert second.sequence_id != first.sequence_id
    assert second.emitted_ids == TEXT.encode("€ S")[:2]
    text += one.push(tokens("€ S")[2:]).text
    text += one.push(tokens("TOP", start=5)).text
    assert text == "€ "
    assert one.num_tokens == 8


@pytest.mark.parametrize("index", [0, 2])
def test_a_token_repeated_or_left_out_is_our_fault(index: int) -> None:
    one = choice()
    one.push(tokens("a"))
    with pytest.raises(InternalError, match=f"token {index} came where 1 was due"):
        one.push([TokenOutput(index, 5)])


def test_a_sequence_that_the_engine_gave_up_is_an_error() -> None:
    with pytest.raises(InternalError, match="broke off: error"):
        choice().push([TokenOutput(0, 5, finish_reason="error")])


def test_each_choice_of_a_request_draws_with_its_own_seed() -> None:
    assert [choice(i, seed=7).next_job().params.seed for i in range(3)] == [7, 8, 9]
    assert choice(1).next_job().params.seed is None
    assert choice(1).next_job().sequence_id != choice(2).next_job().sequence_id


def test_logprobs_tell_the_bytes_of_each_token() -> None:
    one = choice(logprobs=1)
    a, *euro = tokens("a€")
    a = dataclasses.replace(a, logprob=-0.5, top_logprobs=((a.token_id, -0.5), (END, -2.0)))
    euro = [dataclasses.replace(part, logprob=-1.0) for part in euro]
    logprobs = one.push([a, *euro]).logprobs
    assert logprobs is not None
    assert (logprobs[0].token, logprobs[0].token_bytes, logprobs[0].logprob) == ("a", b"a", -0.5)
    assert logprobs[0].top == (("a", b"a", -0.5), ("<|end|>", b"<|end|>", -2.0))
    assert b"".join(part.token_bytes for part in logprobs[1:]).decode() == "€"
    assert choice().push([TokenOutput(0, 5)]).logprobs is None


def prompt(ids: tuple[int, ...], adapter: str | None = None, *, reuse: bool = True) -> Choice:
    return Choice(
        0,
        RequestId("r"),
        ids,
        SamplingParams(),
        stop=(),
        text=TEXT,
        reuse_prefix=reuse,
        adapter_id=None if adapter is None else AdapterId(adapter),
    )


def test_prompts_that_begin_alike_have_the_same_prefix_and_short_ones_none() -> None:
    system = tuple(range(64))
    assert prompt((*system, 7)).prefix == prompt((*system, 8, 9)).prefix
    assert prompt((*system, 7)).prefix != prompt((0, *system)).prefix
    assert prompt((*system, 7)).prefix != prompt((*system, 7), "polite@1").prefix
    assert prompt(system[:-1]).prefix is None
    assert prompt(system, reuse=False).prefix is None
